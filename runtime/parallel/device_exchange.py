"""What ranks with a GPU each send each other, by NCCL and without the host: sums and columns of values that
lie on the devices. Where Triton's interpreter runs the kernels, the same by gloo, on CPU tensors.

A sum is the library's own all-reduce: all ranks get the same bits, and a run those of another of the same
bucket of rows, captured in a graph or not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from gristmill.runtime.parallel.exchange import TIMEOUT
from gristmill.runtime.parallel.layout import Span
from gristmill.runtime.parallel.split import Exchange


def nccl(store: Any, rank: int, world: int) -> Any:
    """NCCL's connection between the devices that are current in each rank."""
    backend: Any = torch.distributed.ProcessGroupNCCL  # only in CUDA's builds
    options = backend.Options()
    options._timeout = TIMEOUT
    return backend(store, rank, world, options)


class DeviceGroup:
    """The ranks' connection; backend: one of torch.distributed's process groups."""

    def __init__(self, backend: Any, rank: int, world: int) -> None:
        self._backend, self.rank, self.world = backend, rank, world

    def sum(self, part: Tensor) -> None:
        """Adds up the ranks' ``part``, contiguous, in place."""
        self._backend.allreduce([part]).wait()

    def gather(self, whole: Tensor, owned: Sequence[Span]) -> None:
        """whole [rows, width]: each rank has computed the columns owned[rank] and gets the others."""
        widest = max(stop - start for start, stop in owned)
        start, stop = owned[self.rank]
        mine = whole.new_zeros(len(whole), widest)
        mine[:, : stop - start] = whole[:, start:stop]
        parts = list(whole.new_empty(self.world, len(whole), widest))
        self._backend.allgather([parts], [mine]).wait()
        for (start, stop), part in zip(owned, parts, strict=True):
            whole[:, start:stop] = part[:, : stop - start]

    def abort(self) -> None:
        """Ends what is under way, where a rank that is gone would be waited for without end."""
        end = getattr(self._backend, "abort", None)
        if end is not None:
            end()


class DeviceExchanges:
    """The exchanges of a rank's program, as what comes between its instructions; see cuda/launch.py."""

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self._due: dict[int, list[Exchange]] = defaultdict(list)
        for exchange in exchanges:
            self._due[exchange.before - 1].append(exchange)
        self._group: DeviceGroup | None = None
        self.only: str | None = None  # the kind that is done, to time it alone

    def connect(self, group: DeviceGroup) -> None:
        self._group = group

    def abort(self) -> None:
        """Ends what is under way, where it was connected."""
        if self._group is not None:
            self._group.abort()

    def values(self, index: int) -> list[int]:
        return [exchange.view.value for exchange in self._at(index)]

    def run(self, index: int, whole: Sequence[Tensor]) -> None:
        assert self._group is not None, "a rank that was not connected"
        for exchange, value in zip(self._at(index), whole, strict=True):
            if exchange.owned is None:
                self._group.sum(value)
            else:
                self._group.gather(value, exchange.owned)

    def of(self, kind: str) -> list[Exchange]:
        """Those of a kind in a forward."""
        return [exchange for due in self._due.values() for exchange in due if exchange.kind == kind]

    def _at(self, index: int) -> list[Exchange]:
        due = self._due.get(index, [])
        return due if self.only is None else [exchange for exchange in due if exchange.kind == self.only]
