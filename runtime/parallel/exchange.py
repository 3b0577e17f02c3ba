"""What ranks send each other: parts of a sum, and columns of a value.

A sum adds the ranks' parts in the order of the ranks, element by element, whatever its size: so all ranks get
the same bits, in every run, and a row's do not depend on the rows beside it (a ring would add in an order that
depends on the place in the buffer). Few bytes go from each rank to all; of more, each rank sums a share and
gives it to the others, which moves 2 (world - 1) / world of the bytes instead of (world - 1) times them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from gristmill.runtime.parallel.layout import Span
from gristmill.runtime.parallel.split import Exchange
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


class Group:
    """The ranks' connection, by torch.distributed's gloo; independent of torch's default group."""

    def __init__(self, store: Any, rank: int, world: int, local: bool) -> None:
        """local: all ranks are on this machine, and talk through its loopback interface alone."""
        options = dist.ProcessGroupGloo._Options()
        options._timeout = TIMEOUT
        options._threads = 1
        if local:
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        else:
            options._devices = [dist.ProcessGroupGloo.create_default_device()]
        self._gloo = dist.ProcessGroupGloo(store, rank, world, options)
        self.rank, self.world = rank, world
        self._buffers: dict[str, Floats] = {}

    def sum(self, part: Floats) -> int:
        """Adds up the ranks' ``part``, in place; returns the bytes sent."""
        flat = part.reshape(-1)
        if self.world > 2 and flat.nbytes >= SHARED_FROM:
            return self._sum_shared(flat)
        parts = self._gathered(flat)
        np.add(parts[0], parts[1], out=flat)
        for other in parts[2:]:
            flat += other
        return flat.nbytes * (self.world - 1)

    def _sum_shared(self, flat: Floats) -> int:
        share = -(-flat.size // self.world)
        sent = self._buffer("sent", share * self.world)
        sent[: flat.size] = flat
        sent[flat.size :] = 0
        came = self._buffer("came", share * self.world)
        work = self._gloo.alltoall_base(torch.from_numpy(came), torch.from_numpy(sent), [], [])
        work.wait()
        parts = came.reshape(self.world, share)
        for other in parts[1:]:
            parts[0] += other
        whole = self._gathered(parts[0])
        flat[:] = whole.reshape(-1)[: flat.size]
        return 2 * 4 * share * (self.world - 1)

    def gather(self, whole: Floats, owned: tuple[Span, ...]) -> int:
        """whole [rows, width]: each rank has computed the columns owned[rank] and gets the others."""
        widest = max(b - a for a, b in owned)
        start, stop = owned[self.rank]
        mine = self._buffer("sent", len(whole) * widest).reshape(len(whole), widest)
        mine[:, : stop - start] = whole[:, start:stop]
        parts = self._gathered(mine.reshape(-1)).reshape(self.world, len(whole), widest)
        for rank, (a, b) in enumerate(owned):
            if rank != self.rank:
                whole[:, a:b] = parts[rank, :, : b - a]
        return mine.nbytes * (self.world - 1)

    def _gathered(self, flat: Floats) -> Floats:
        """[world, elements] of all ranks."""
        parts = self._buffer("parts", self.world * flat.size).reshape(self.world, flat.size)
        outputs = [torch.from_numpy(part) for part in parts]
        self._gloo.allgather([outputs], [torch.from_numpy(flat)]).wait()
        return parts

    def _buffer(self, name: str, size: int) -> Floats:
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = np.zeros(size, np.float32)
        return self._buffers[name][:size]


class Exchanges:
    """The exchanges of a rank's program, over the executor's memory."""

    def __init__(self, group: Group, program: Program, exchanges: list[Exchange], arena: NDArray[np.uint8]) -> None:
        self._group, self._program, self._arena = group, program, arena
        at = sorted({exchange.before - 1 for exchange in exchanges})
        self.after = at
        self._due = [[e for e in exchanges if e.before - 1 == index] for index in at]
        self.traffic: dict[str, Traffic] = {}
        self.reset()

    def reset(self) -> None:
        self.traffic = {"all_reduce": Traffic(), "all_gather": Traffic()}

    def run(self, stop: int, rows: int, logits: Floats) -> None:
        """What is due at the stop of that number, in a forward of so many rows."""
        for exchange in self._due[stop]:
            value = self._value(exchange, rows, logits)
            if not value.size:
                continue
            began = time.perf_counter()
            if exchange.owned is None:
                sent = self._group.sum(value)
            else:
                sent = self._group.gather(value, exchange.owned)
            found = self.traffic[exchange.kind]
            found.count += 1
            found.bytes += sent
            found.seconds += time.perf_counter() - began

    def _value(self, exchange: Exchange, rows: int, logits: Floats) -> Floats:
        """[rows, width] of the whole value."""
        if exchange.view.value == LOGITS:
            return logits
        value = self._program.values[exchange.view.value]
        count = rows if value.rows == "T" else len(logits)
        data = self._arena[value.offset : value.offset + 4 * count * value.width].view(np.float32)
        return cast(Floats, data.reshape(count, value.width))
