"""Where the time of a forward goes that several GPUs share."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from gristmill.runtime.cuda.probe import CudaProbe
from gristmill.runtime.parallel.split import KINDS, Exchange
from gristmill.runtime.profile import PROBE_BYTES, Forward, Profile, Roofs, Transfer, prepared
from gristmill.runtime.program import LOGITS

if TYPE_CHECKING:
    from gristmill.runtime.parallel.executor import ParallelExecutor
    from gristmill.runtime.session import Session

REPEATS = 20


class ParallelCudaProbe(CudaProbe):
    """All devices as one roof for the work of all; times are those of rank 0's device, which is taken for as
    fast as the others."""

    def __init__(self, session: Session, executor: ParallelExecutor) -> None:
        super().__init__(executor.rank.executor, session)
        self._all = executor

    def read_stream(self, size: int = PROBE_BYTES) -> float:
        """10^9 bytes per second of all devices together."""
        return self._all.world * super().read_stream(size)

    def roofs(self, stream_gb_s: float) -> Roofs:
        own = super().roofs(stream_gb_s)
        return replace(own, integers=self._all.world * own.integers, floats=self._all.world * own.floats)

    def communication(self, forward: Forward) -> float:
        """Seconds of the exchanges between the devices."""
        with prepared(self._session, forward) as run:
            run()
            return sum(transfer.seconds for transfer in self._transfers(forward, REPEATS))

    def profile(
        self, roofs: Roofs, forward: Forward, repeats: int, filled: int | None = None,
        seconds: float = math.inf,
    ) -> Profile:  # fmt: skip
        found = super().profile(roofs, forward, repeats, filled, seconds)
        with prepared(self._session, forward, filled) as run:
            run()
            transfers = self._transfers(forward, repeats)
        exchanged = sum(transfer.seconds for transfer in transfers)
        return replace(found, seconds=found.seconds + exchanged, transfers=transfers)

    def _transfers(self, forward: Forward, repeats: int) -> tuple[Transfer, ...]:
        """Kind by kind, of the batch that was run last."""
        found = []
        for kind in KINDS:
            exchanges = self._all.rank.exchanges.of(kind)
            if exchanges:
                sent = sum(self._sent(exchange, forward) for exchange in exchanges)
                found.append(Transfer(kind, len(exchanges), sent, self._all.time_exchanges(kind, repeats)))
        return tuple(found)

    def _sent(self, exchange: Exchange, forward: Forward) -> int:
        """Bytes that rank 0 sends, by what an exchange needs at least."""
        program, value, world = self._all.rank.made.program, exchange.view.value, self._all.world
        of_batch = value != LOGITS and program.values[value].rows == "T"
        rows = forward.sequences * (forward.rows if of_batch else 1)
        if exchange.owned is not None:
            start, stop = exchange.owned[0]
            return (world - 1) * 4 * rows * (stop - start)
        return 2 * (world - 1) * 4 * rows * program.values[value].width // world
