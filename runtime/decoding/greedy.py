"""Greedy: the most likely token, the lowest id among equals."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from gristmill.runtime.errors import GristmillError


def most_likely(logits: np.ndarray) -> int:
    """The id with the largest of `logits` [V] f32."""
    token = int(np.argmax(logits))  # a NaN counts as the largest, so this one look finds it
    if not np.isfinite(logits[token]):
        refuse_not_finite(logits[token])
    return token


def refuse_not_finite(logit: Any) -> NoReturn:
    """Raises the GristmillError for a largest logit that is not finite."""
    raise GristmillError(
        f"the model gave {logit} as a logit: damaged weights (see `gristmill verify`) or overflow"
    )
