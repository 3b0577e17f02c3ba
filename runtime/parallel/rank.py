"""One rank on the CPU: the C++ executor of its program, which stops where the ranks exchange values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.runtime.parallel.exchange import Exchanges, Group
from gristmill.runtime.parallel.slices import sliced_weights
from gristmill.runtime.parallel.split import GATHER_PAYS, split
from gristmill.runtime.program import Program
from gristmill.runtime.session import native

if TYPE_CHECKING:
    from gristmill.runtime.parallel.cuda_rank import CudaRank

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Share:
    """What a rank opens. threads: its own; gather_pays: see `split`;
    band: rows of a linear whose sum is under way while the next are multiplied, 0: none is. device: "cuda"
    for the GPU of the rank's number, which threads, hugepages and band are not for."""

    rank: int
    world: int
    threads: int
    max_len: int
    max_slots: int
    hugepages: bool = False
    gather_pays: int = GATHER_PAYS
    band: int = 0
    device: str = "cpu"


def open_rank(program: Program, weights: Path, share: Share) -> Rank | CudaRank:
    """Raises GristmillError where the program cannot be split so, or its share does not fit the device."""
    if share.device == "cpu":
        return Rank(program, weights, share)
    from gristmill.runtime.parallel.cuda_rank import CudaRank

    return CudaRank(program, weights, share)


class Rank:
    """Opened by the parent and by each worker; `connect` before the first forward."""

    def __init__(self, program: Program, weights: Path, share: Share) -> None:
        self._share, self._band = share, share.band
        self.made = split(program, share.rank, share.world, share.gather_pays)
        with sliced_weights(weights, self.made) as own:
            self.executor = native().Executor(
                self.made.program.to_bytes(), own, threads=share.threads, max_len=share.max_len,
                max_slots=share.max_slots, huge_pages=share.hugepages, base_weights=str(weights),
                partial=True,
            )  # fmt: skip

    def join(self, store: Any) -> None:
        """Connects to the other ranks, which all meet at the store."""
        self.connect(Group(store, self._share.rank, self._share.world, local=True))

    def connect(self, group: Group) -> None:
        self.exchanges = Exchanges(
            group, self.made.program, self.made.exchanges, self.executor.arena, self._band
        )

    def forward(
        self, tokens: Array, positions: Array, slots: Array, rows: Array, hidden: bool = False
    ) -> Any:
        """Logits [R, vocabulary], and with ``hidden`` the hidden states; all ranks get the same."""
        self.exchanges.reset()
        run = self.executor.forward_hidden if hidden else self.executor.forward

        def between(stop: int, first: int, count: int, logits: Array) -> None:
            self.exchanges.run(stop, first, count, len(tokens), logits)

        return run(
            tokens,
            positions,
            slots,
            rows,
            after=self.exchanges.after,
            band=self.exchanges.band,
            between=between,
        )

    def follow(self, tokens: Array, positions: Array, slots: Array, rows: Array, hidden: bool) -> None:
        """`forward`, where rank 0 has the result."""
        self.forward(tokens, positions, slots, rows, hidden)

    def watch(self, alive: Callable[[], None]) -> None:
        """Of no use here: gloo notices that a rank is gone."""

    def close(self) -> None:
        """There is nothing to end."""
