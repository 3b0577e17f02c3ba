"""Forwards that are timed: prefill in chunks and decoding as generation does it, and the least time that
their bytes and operations allow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from gristmill.runtime.decoding.next_tokens import most_likely_tokens
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.profile import PROBE_BYTES, Forward, Kind, Roofs, collect, random_ids, take_in
from gristmill.runtime.program import Program
from gristmill.runtime.session import Session

STREAM_BYTES = PROBE_BYTES  # more than caches hold: the memory's own speed
ROOM = 64  # positions left behind the longest context
LEAST_STREAM_BYTES = 1 << 20  # with fewer the probe would time its threads' meetings


@contextmanager
def filled_slot(session: Session, context: int) -> Iterator[int | None]:
    """A slot that holds ``context`` positions to be copied from; None where that is nothing to speak of, or
    where there is no slot to spare."""
    if context < 2 or session.max_slots < 2:
        yield None
        return
    with session.slot() as slot:
        take_in(session, slot, random_ids(session, context))
        yield slot


def prefill_seconds(session: Session, slot: int, context: int, rows: int) -> float:
    """Seconds in which a slot that holds ``context`` positions takes in ``rows`` more; it is rolled back by
    the next call."""
    ids = random_ids(session, rows)
    started = time.perf_counter()
    for begin, size in chunks(session, rows):
        positions = np.arange(context + begin, context + begin + size, dtype=np.int32)
        owner = np.full(size, slot, np.int32)
        last = np.array([size - 1] if begin + size == rows else [], np.int32)
        session._run(ids[begin : begin + size], positions, owner, last)
    return time.perf_counter() - started


def decode_seconds(session: Session, slots: Sequence[int], context: int, steps: int) -> float:
    """Seconds in which slots that hold ``context`` positions decode ``steps`` tokens each, greedily, all in
    one batch."""
    owners = np.array(slots, np.int32)
    tokens = np.full(len(owners), 1 % session.vocabulary, np.int32)
    started = time.perf_counter()
    for position in range(context, context + steps):
        tokens = most_likely_tokens(session, tokens, np.full(len(owners), position, np.int32), owners)
    return time.perf_counter() - started


def chunks(session: Session, rows: int) -> list[tuple[int, int]]:
    """(first row, rows) of the forwards that take in a prompt."""
    starts = range(0, rows, session.max_tokens)
    return [(start, min(session.max_tokens, rows - start)) for start in starts]


def floor_seconds(session: Session, roofs: Roofs, forward: Forward) -> float:
    """The least time of a forward, or of the chunks it has to be cut into."""
    found = 0.0
    for begin, size in chunks(session, forward.rows):
        part = Forward(size, forward.context + begin, forward.sequences)
        found += sum(kind.floor for kind in kinds_of(session.program, roofs, part))
    return found


def read_bytes(program: Program, forward: Forward) -> int:
    """Weights and cache rows that one forward reads."""
    return sum(kind.bytes for kind in kinds_of(program, Roofs(1.0, 1.0, 1.0), forward))


def mean_roofs(a: Roofs, b: Roofs) -> Roofs:
    """Of a look before and one after what they are for."""
    return Roofs((a.stream + b.stream) / 2, (a.floats + b.floats) / 2, (a.integers + b.integers) / 2)


def best_roofs(a: Roofs, b: Roofs) -> Roofs:
    """The higher ones of two looks, of which something else may have disturbed either."""
    return Roofs(max(a.stream, b.stream), max(a.floats, b.floats), max(a.integers, b.integers))


def kinds_of(program: Program, roofs: Roofs, forward: Forward) -> list[Kind]:
    """Kinds with their work and no times."""
    return collect(program, [0.0] * len(program.instructions), roofs, forward)


def stream_bytes(program: Program, forward: Forward) -> int:
    """Bytes that the read stream is measured over, to be the roof of this forward: as many as it reads, for
    what fits into a processor's caches is read from there again and again."""
    return min(STREAM_BYTES, max(LEAST_STREAM_BYTES, read_bytes(program, forward)))


def refuse_less(least: dict[str, tuple[float, float]]) -> None:
    """Name -> (value, least). Raises GristmillError for the first that is less."""
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise GristmillError(f"{name} is {value}, expected {lowest} or more")
