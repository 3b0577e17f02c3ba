"""The tokens that follow a batch: drawn by the executor where it can, else here from the logits it gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gristmill.runtime.decoding.draws import Draws
from gristmill.runtime.decoding.greedy import most_likely, refuse_not_finite

if TYPE_CHECKING:
    from gristmill.runtime.decoding.generate import Running
    from gristmill.runtime.session import Session


def next_tokens(
    session: Session,
    tokens: np.ndarray,
    positions: np.ndarray,
    slots: np.ndarray,
    rows: np.ndarray,
    ready: Sequence[Running],
) -> Iterator[int]:
    """Runs the batch and gives the next token of each of ``ready``, whose last rows are ``rows``.

    Raises GristmillError at the token whose logits are not finite; the batch has run by then.
    """
    if not ready or not draws_tokens(session):
        logits = session._run(tokens, positions, slots, rows)
        return (sequence.choose(row) for sequence, row in zip(ready, logits, strict=True))
    draws = Draws.of(
        [sequence.options for sequence in ready],
        [sequence.result.seed for sequence in ready],
        [len(sequence.tokens) - 1 for sequence in ready],
    )
    return map(_drawn, session._draw(tokens, positions, slots, rows, draws))


def most_likely_token(session: Session, token: int, position: int, slot: int) -> int:
    """Runs one row of a slot that the caller took, and gives the token that follows."""
    tokens, positions, slots, rows = (np.full(1, n, np.int32) for n in (token, position, slot, 0))
    if draws_tokens(session):
        return _drawn(session._draw(tokens, positions, slots, rows, Draws.greedy(1))[0])
    return most_likely(session._run(tokens, positions, slots, rows)[0])


def draws_tokens(session: Session) -> bool:
    """Whether the session's executor draws tokens itself, so that no logits have to come to the host."""
    return bool(getattr(session.executor, "draws_tokens", False))


def _drawn(token: np.int32) -> int:
    if token < 0:
        refuse_not_finite("a number that is not finite")
    return int(token)
