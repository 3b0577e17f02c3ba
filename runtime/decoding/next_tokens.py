"""What follows a batch: tokens drawn by the executor where it can, else the logits to choose from here."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from gristmill.runtime.decoding.draws import Draws
from gristmill.runtime.decoding.greedy import most_likely, refuse_not_finite

if TYPE_CHECKING:
    from gristmill.runtime.decoding.sequence import Sequence
    from gristmill.runtime.session import Session


def run(
    session: Session,
    tokens: np.ndarray,
    positions: np.ndarray,
    slots: np.ndarray,
    rows: np.ndarray,
    wanted: Collection[tuple[Sequence, int]],
) -> np.ndarray:
    """Runs the batch: logits [R, V] f32 of ``rows``, or the tokens [R] i32 that the executor drew from them,
    -1 where they are not finite.

    wanted: of every sequence in turn how many of the rows are its last ones, each a token further on.
    """
    drawable = len(rows) and draws_tokens(session)
    if not (drawable and all(sequence.drawable for sequence, count in wanted if count)):
        return session._run(tokens, positions, slots, rows)
    each = [(sequence, ahead) for sequence, count in wanted for ahead in range(count)]
    draws = Draws.of(
        [sequence.options for sequence, _ in each],
        [sequence.result.seed for sequence, _ in each],
        [len(sequence.tokens) - 1 + ahead for sequence, ahead in each],
        [sequence.number for sequence, _ in each],
    )
    return session._draw(tokens, positions, slots, rows, draws)


def most_likely_token(session: Session, token: int, position: int, slot: int) -> int:
    """Runs one row of a slot that the caller took, and gives the token that follows."""
    tokens, positions, slots, rows = (np.full(1, n, np.int32) for n in (token, position, slot, 0))
    if draws_tokens(session):
        return drawn(session._draw(tokens, positions, slots, rows, Draws.greedy(1))[0])
    return most_likely(session._run(tokens, positions, slots, rows)[0])


def most_likely_tokens(
    session: Session, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray
) -> np.ndarray:
    """The same of one row [i32] in each of several slots: the tokens [T] i32 that follow."""
    rows = np.arange(len(tokens), dtype=np.int32)
    if draws_tokens(session):
        found = session._draw(tokens, positions, slots, rows, Draws.greedy(len(rows)))
        return np.array([drawn(token) for token in found], np.int32)
    return np.array([most_likely(row) for row in session._run(tokens, positions, slots, rows)], np.int32)


def draws_tokens(session: Session) -> bool:
    """Whether the session's executor draws tokens itself, so that no logits have to come to the host."""
    return bool(getattr(session.executor, "draws_tokens", False))


def drawn(token: np.int32) -> int:
    """A token that the executor drew. Raises GristmillError where the logits were not finite."""
    if token < 0:
        refuse_not_finite("a number that is not finite")
    return int(token)
