"""Greedy: the most likely token, the lowest id among equals."""

from __future__ import annotations

import numpy as np

from gristmill.runtime.errors import GristmillError


def most_likely(logits: np.ndarray) -> int:
    """The id with the largest of `logits` [V] f32."""
    token = int(np.argmax(logits))  # a NaN counts as the largest, so this one look finds it
    if not np.isfinite(logits[token]):
        raise GristmillError(
            f"the model gave {logits[token]} as a logit: damaged weights (see `gristmill verify`) or overflow"
        )
    return token
