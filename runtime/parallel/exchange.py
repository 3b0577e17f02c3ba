"""What ranks send each other: parts of a sum, and columns of a value.

A sum adds the ranks' parts in the order of the ranks, element by element, whatever its size: so all ranks
get the same bits, in every run, and a row's do not depend on the rows beside it (a ring would add in an order
that depends on the place in the buffer). Few bytes go from each rank to all; of more, each rank sums a share
and gives it to the others, which moves 2 (world - 1) / world of the bytes instead of (world - 1) times them.

Where a processor is to spare, the linear before a sum does its rows in bands, and the sum of one band is
under way while the next is multiplied.

All of it is sends and receives: gloo runs its own collectives in threads of its own, which on busy
processors wait for a time slice (4 to 8 ms were seen where a send with a receive took 0.1).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray

from gristmill.runtime.parallel.layout import Span
from gristmill.runtime.parallel.split import KINDS, Exchange
from gristmill.runtime.program import LOGITS, Program

Floats = NDArray[np.float32]
TIMEOUT = timedelta(minutes=10)  # a rank may be stopped for a while; a dead one is noticed at once
SHARED_FROM = 1 << 16  # bytes from which on each rank sums a share


@dataclass
class Traffic:
    """Of one kind of exchange: how many, bytes that this rank sent, seconds until all was there, waits for
    slower ranks included."""

    count: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Pending:
    """A sum under way."""

    flat: Floats
    parts: list[Floats]
    works: list[Any]


def file_store(path: str, world: int) -> Any:
    """Where the ranks of one machine find each other: a file, and nothing that listens."""
    distributed: Any = torch.distributed
    return distributed.FileStore(path, world)


def gloo(store: Any, rank: int, world: int, local: bool) -> Any:
    """Gloo's connection between the ranks; local: all are on this machine, and talk through its loopback
    interface alone."""
    backend: Any = torch.distributed.ProcessGroupGloo  # its stubs lack most of it
    options = backend._Options()
    options._timeout = TIMEOUT
    options._threads = 1
    if local:
        options._devices = [backend.create_device(hostname="127.0.0.1")]
    else:
        options._devices = [backend.create_default_device()]
    return backend(store, rank, world, options)


class Group:
    """The ranks' connection, by torch.distributed's gloo; independent of torch's default group."""

    def __init__(self, store: Any, rank: int, world: int, local: bool) -> None:
        """local: see `gloo`."""
        self._gloo = gloo(store, rank, world, local)
        self.rank, self.world = rank, world
        self._buffers: dict[str, Floats] = {}

    def sum(self, part: Floats) -> int:
        """Adds up the ranks' ``part``, in place; returns the bytes sent."""
        flat = part.reshape(-1)
        if self.world > 2 and flat.nbytes >= SHARED_FROM:
            return self._sum_shared(flat)
        return self.end_sum(self.begin_sum(flat, 0))

    def _sum_shared(self, flat: Floats) -> int:
        """Each rank sums a share of the elements, then all have all shares."""
        borders = [flat.size * rank // self.world for rank in range(self.world + 1)]
        shares = [flat[a:b] for a, b in zip(borders, borders[1:], strict=False)]
        mine = shares[self.rank]
        parts = list(self._buffer("parts", self.world * mine.size).reshape(self.world, mine.size))
        self._swap(shares, parts)
        parts[self.rank][:] = mine
        np.add(parts[0], parts[1], out=mine)
        for other in parts[2:]:
            mine += other
        self._swap([mine] * self.world, shares)
        return flat.nbytes - mine.nbytes + mine.nbytes * (self.world - 1)

    def begin_sum(self, part: Floats, number: int) -> Pending:
        """Sends this rank's ``part`` and asks for the others'; number: of the band, of which two may be under
        way."""
        flat = part.reshape(-1)
        room = self._buffer(f"band{number % 2}", self.world * flat.size)
        parts = list(room.reshape(self.world, flat.size))
        return Pending(flat, parts, self._post([flat] * self.world, parts))

    def end_sum(self, pending: Pending) -> int:
        """The sum in its place, when all has come; returns the bytes sent."""
        for work in pending.works:
            work.wait()
        pending.parts[self.rank][:] = pending.flat
        np.add(pending.parts[0], pending.parts[1], out=pending.flat)
        for other in pending.parts[2:]:
            np.add(pending.flat, other, out=pending.flat)
        return pending.flat.nbytes * (self.world - 1)

    def gather(self, whole: Floats, owned: tuple[Span, ...]) -> int:
        """whole [rows, width]: each rank has computed the columns owned[rank] and gets the others."""
        sizes = [len(whole) * (stop - start) for start, stop in owned]
        room = self._buffer("parts", sum(sizes))
        parts = np.split(room, np.cumsum(sizes)[:-1])
        start, stop = owned[self.rank]
        mine = parts[self.rank]
        mine.reshape(len(whole), -1)[:] = whole[:, start:stop]
        self._swap([mine] * self.world, parts)
        for rank, (a, b) in enumerate(owned):
            if rank != self.rank:
                whole[:, a:b] = parts[rank].reshape(len(whole), -1)
        return mine.nbytes * (self.world - 1)

    def _swap(self, give: Sequence[Floats], take: Sequence[Floats]) -> None:
        """give[rank] goes to each other rank, what that gives comes into take[rank]; each contiguous."""
        for work in self._post(give, take):
            work.wait()

    def _post(self, give: Sequence[Floats], take: Sequence[Floats]) -> list[Any]:
        others = [rank for rank in range(self.world) if rank != self.rank]
        works = [self._gloo.recv([torch.from_numpy(take[rank])], rank, 0) for rank in others]
        works += [self._gloo.send([torch.from_numpy(give[rank])], rank, 0) for rank in others]
        return works

    def _buffer(self, name: str, size: int) -> Floats:
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.zeros(size, np.float32)
        return self._buffers[name][:size]


class Exchanges:
    """The exchanges of a rank's program, over the executor's memory."""

    def __init__(
        self, group: Group, program: Program, exchanges: list[Exchange], arena: NDArray[np.uint8],
        band: int,
    ) -> None:  # fmt: skip
        """band: rows of a linear that are multiplied at a time, 0: all."""
        self._group, self._program, self._arena = group, program, arena
        at = sorted({exchange.before - 1 for exchange in exchanges})
        self.after = at
        self.band = [band if self._can_overlap(index, exchanges) else 0 for index in at]
        self._pending: Pending | None = None
        self._bands = 0
        self._due = [[e for e in exchanges if e.before - 1 == index] for index in at]
        self.traffic: dict[str, Traffic] = {}
        self.reset()

    def reset(self) -> None:
        """Begins a forward."""
        self._pending, self._bands = None, 0
        self.traffic = {kind: Traffic() for kind in KINDS}

    def run(self, stop: int, first: int, rows: int, total: int, logits: Floats) -> None:
        """What is due at the stop of that number, for so many rows from ``first`` on of a forward's."""
        for exchange in self._due[stop]:
            value = self._value(exchange, total, logits)
            if not value.size:
                continue
            found = self.traffic[exchange.kind]
            began = time.perf_counter()
            if rows < total:
                self._sum_band(value, first, rows, found)
            elif exchange.owned is None:
                found.bytes += self._group.sum(value)
            else:
                found.bytes += self._group.gather(value, exchange.owned)
            found.count += first + rows == total
            found.seconds += time.perf_counter() - began

    def _sum_band(self, value: Floats, first: int, rows: int, found: Traffic) -> None:
        """Begins the sum of this band, then ends the one before; the last one ends its own."""
        before, number = self._pending, self._bands
        self._pending = self._group.begin_sum(value[first : first + rows], number)
        self._bands += 1
        if before is not None:
            found.bytes += self._group.end_sum(before)
        if first + rows == len(value):
            found.bytes += self._group.end_sum(self._pending)
            self._pending, self._bands = None, 0

    def _can_overlap(self, index: int, exchanges: list[Exchange]) -> bool:
        """Whether the instruction is a linear whose sum alone is due behind it."""
        due = [e for e in exchanges if e.before - 1 == index]
        instruction = self._program.instructions[index]
        summed = len(due) == 1 and due[0].owned is None and due[0].view == instruction.out
        if (
            not summed
            or instruction.op != "linear"
            or self._program.values[instruction.out.value].rows != "T"
        ):
            return False
        before = self._program.instructions[index - 1]
        return before.op != "linear" or before.views["in"] != instruction.views["in"]

    def _value(self, exchange: Exchange, rows: int, logits: Floats) -> Floats:
        """[rows, width] of the whole value."""
        if exchange.view.value == LOGITS:
            return logits
        value = self._program.values[exchange.view.value]
        count = rows if value.rows == "T" else len(logits)
        data = self._arena[value.offset : value.offset + 4 * count * value.width].view(np.float32)
        return cast(Floats, data.reshape(count, value.width))
