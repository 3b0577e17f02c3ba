"""The self-test of an artifact: what it computed where it was made, to be computed again where it is used.

The record holds a text, its ids, and for its last positions the highest logits. The same program and weights
give nearly the same numbers on every machine (the order of sums in float parts may differ between instruction
sets), so a small tolerance is enough and a wrong weight, a wrong tokenizer or a wrong kernel shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.runtime.artifact import SELFTEST
from gristmill.runtime.errors import GristmillError

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

TEXT = "The quick brown fox jumps over the lazy dog. def add(a, b): return a + b"
POSITIONS = 4  # of the text's end are recorded
HIGHEST = 8  # logits of each
# Of the largest logit. The record is the CPU's; a GPU multiplies activations that are rounded to 16 bits and
# not to integers of 8, which moves logits by far more than the order of sums does.
TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}


def record(session: Session, text: str = TEXT) -> dict[str, Any]:
    """The content of selftest.json: computed with `session` as it is now."""
    ids = (
        session.tokenizer.encode(text)
        if session.has_tokenizer
        else [i % session.vocabulary for i in range(16)]
    )
    ids = (ids or [0])[: min(32, session.max_len, session.max_tokens)]
    logits = _last_logits(session, ids)
    tops = np.argsort(-logits, axis=1, kind="stable")[:, :HIGHEST]
    values = np.take_along_axis(logits, tops, axis=1)
    if not np.isfinite(logits).all():
        raise GristmillError(
            "the compiled model gives logits that are not finite; use a wider format (weights f32 or bf16)"
        )
    return {
        "text": text if session.has_tokenizer else None,
        "ids": ids,
        "positions": list(range(len(ids) - len(logits), len(ids))),
        "highest": [
            {"ids": t.tolist(), "logits": [float(x) for x in v]} for t, v in zip(tops, values, strict=True)
        ],
    }


def check(session: Session, device: str = "cpu") -> dict[str, Any]:
    """Repeats the stored self-test on the session's device; returns {"tokens", "largest_difference"}. Raises
    GristmillError where it fails.
    """
    assert session.artifact is not None
    stored = session.artifact.json(SELFTEST)
    try:
        ids = [int(i) for i in stored["ids"]]
        expected = np.array([entry["logits"] for entry in stored["highest"]], np.float32)
        columns = np.array([entry["ids"] for entry in stored["highest"]], np.int64)
        fits = expected.shape == columns.shape and expected.ndim == 2 and 0 < len(expected) <= len(ids)
        fits = fits and columns.min() >= 0 and columns.max() < session.vocabulary
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise GristmillError(f"{SELFTEST} is malformed; compile the model again") from error
    if not fits:
        raise GristmillError(f"{SELFTEST} does not fit this model; compile the model again")
    if stored.get("text") is not None and session.tokenizer.encode(stored["text"])[: len(ids)] != ids:
        raise GristmillError(
            "self-test failed: the tokenizer gives other ids than where the artifact was made"
        )
    found = np.take_along_axis(_last_logits(session, ids)[-len(expected) :], columns, axis=1)
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE[device] * max(1.0, float(np.abs(expected).max())):
        raise GristmillError(
            f"self-test failed: logits differ by {difference:.3g} from those it was made with; run verify"
        )
    return {"tokens": len(ids), "largest_difference": difference}


def _last_logits(session: Session, ids: list[int]) -> np.ndarray:
    count = len(ids)
    rows = range(max(0, count - POSITIONS), count)
    with session.slot() as slot:
        return session.forward(ids, range(count), [slot] * count, list(rows))
