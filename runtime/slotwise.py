"""What executors have alike that run one sequence at a time: a batch is cut by slots and put together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import NO_HIDDEN_STATES, Program, segment_row_bytes

Array = np.ndarray[Any, Any]


class SlotwiseExecutor(ABC):
    """What a Session needs, see runtime/session.py; the caches hold what the program says of them."""

    rows_agree = False  # one row and many are multiplied in different ways
    arena_bytes = 0  # the other runtime's own, not known

    def __init__(
        self, program: Program, weight_bytes: int, threads: int, max_len: int, max_slots: int
    ) -> None:
        self.max_tokens, self.vocabulary = program.limits.max_tokens, program.vocabulary
        self.threads, self.max_len, self.max_slots = threads, max_len, max_slots
        self.program, self.weight_bytes = program, weight_bytes
        self.kv_bytes = sum(cache.row_bytes() for cache in program.caches) * max_len * max_slots
        self.weight_bytes_per_token = _bytes_per_token(program)

    @abstractmethod
    def run(self, slot: int, tokens: Array, positions: Array, rows: Array, hidden: bool) -> list[Array]:
        """Logits [R, vocabulary] f32 of the `rows` [R] int64 of one slot's tokens [T] at the next positions,
        R >= 1; with `hidden` also the hidden states [R, hidden]."""

    @abstractmethod
    def copy(self, source: int, target: int, length: int, start: int) -> None:
        """Gives a slot the positions `start` to `length` of another."""

    def forward(self, tokens: Array, positions: Array, slots: Array, rows: Array) -> Array:
        """Logits [R, vocabulary] f32 of the rows named by `rows`; see Session.forward."""
        return self._forward(tokens, positions, slots, rows, hidden=False)[0]

    def forward_hidden(
        self, tokens: Array, positions: Array, slots: Array, rows: Array
    ) -> tuple[Array, Array]:
        """`forward`, and the hidden states [R, hidden] f32 of the same rows."""
        if self.program.hidden is None:
            raise GristmillError(NO_HIDDEN_STATES)
        logits, hidden = self._forward(tokens, positions, slots, rows, hidden=True)
        return logits, hidden

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Gives `target` positions `start` to `length` of `source`; those before, both hold alike."""
        if source != target:
            self.copy(source, target, length, start)

    def _forward(
        self, tokens: Array, positions: Array, slots: Array, rows: Array, hidden: bool
    ) -> list[Array]:
        """Where none of a slot's rows is asked for, one is computed for nothing."""
        found: list[list[Array]] = []
        places: list[Array] = []
        for slot, members in _by_slot(positions, slots):
            where = np.full(len(tokens), -1, np.int64)
            where[members] = np.arange(len(members))
            asked = np.flatnonzero(where[rows] >= 0)
            wanted = where[rows[asked]] if len(asked) else np.zeros(1, np.int64)
            results = self.run(slot, tokens[members], positions[members], wanted, hidden)
            found.append([result[: len(asked)] for result in results])
            places.append(asked)
        order = np.argsort(np.concatenate(places), kind="stable")
        return [np.concatenate(parts)[order] for parts in zip(*found, strict=True)]


def _by_slot(positions: Array, slots: Array) -> Iterator[tuple[int, Array]]:
    """Each slot with its rows in the order of their positions."""
    order = np.lexsort((positions, slots))
    for members in np.split(order, np.flatnonzero(np.diff(slots[order])) + 1):
        yield int(slots[members[0]]), members


def _bytes_per_token(program: Program) -> int:
    """What one row reads at least: of every product all, of an embedding a row."""
    total = 0
    for i in program.instructions:
        segments = program.weights[i.weight] if i.weight is not None else []
        total += sum(segment_row_bytes(s) * (1 if i.op == "embedding" else s.n) for s in segments)
    return total
