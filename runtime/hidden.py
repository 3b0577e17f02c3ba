"""A forward that gives hidden states beside the logits, on slots that the caller took or on those of
Session.forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import NO_HIDDEN_STATES

if TYPE_CHECKING:
    from gristmill.runtime.session import Session


def run_hidden(
    session: Session,
    tokens: np.ndarray,
    positions: np.ndarray,
    slots: np.ndarray,
    rows: np.ndarray,
    *,
    held: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [R, V] f32 and hidden states [R, H] f32 of a batch; `held`: on slots taken from session._slots.

    Raises GristmillError as Session.forward does, and where the program has no hidden states to give.
    """
    if session.program.hidden is None:
        raise GristmillError(NO_HIDDEN_STATES)
    executor: Any = session.executor
    found: tuple[np.ndarray, np.ndarray] = session._execute(
        executor.forward_hidden, tokens, positions, slots, rows, held
    )
    return found
