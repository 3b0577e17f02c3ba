"""What rank 0 tells the other ranks to do, as int32 numbers: a command, its numbers, then a batch's ids."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.parallel.rank import Rank
from gristmill.runtime.parallel.split import KINDS

if TYPE_CHECKING:
    from gristmill.runtime.parallel.cuda_rank import CudaRank

Ids = NDArray[np.int32]
FORWARD, HIDDEN, COPY, END, TIME = range(5)


def batch_command(hidden: bool, tokens: Ids, positions: Ids, slots: Ids, rows: Ids) -> bytes:
    head = np.array([HIDDEN if hidden else FORWARD, len(tokens), len(rows)], np.int32)
    return np.concatenate([head, tokens, positions, slots, rows]).astype(np.int32).tobytes()


def copy_command(source: int, target: int, length: int, start: int) -> bytes:
    return np.array([COPY, source, target, length, start], np.int32).tobytes()


def time_command(kind: str, repeats: int) -> bytes:
    """Times the exchanges of a kind, on GPUs."""
    return np.array([TIME, KINDS.index(kind), repeats], np.int32).tobytes()


def end_command() -> bytes:
    return np.array([END], np.int32).tobytes()


def obey(rank: Rank | CudaRank, connection: Connection) -> None:
    """Does what rank 0 says until it says end or is gone."""
    while True:
        try:
            given = np.frombuffer(connection.recv_bytes(), np.int32)
        except (EOFError, OSError):
            return
        if given[0] == END:
            return
        try:
            _run(rank, given)
        except GristmillError:
            continue  # rank 0 refuses it as well, in the same words, before anything was exchanged


def _run(rank: Rank | CudaRank, given: NDArray[Any]) -> None:
    if given[0] == COPY:
        rank.executor.copy_slot(*given[1:5].tolist())
        return
    if given[0] == TIME:
        rank.time_exchanges(KINDS[given[1]], int(given[2]))  # type: ignore[union-attr]
        return
    count, wanted = given[1:3].tolist()
    tokens, positions, slots, rows = np.split(given[3:], [count, 2 * count, 3 * count])
    assert len(rows) == wanted, "a command was cut short"
    rank.follow(tokens, positions, slots, rows, hidden=bool(given[0] == HIDDEN))
