"""Where the time of a tensor-parallel forward goes: rank 0's instructions, and what the ranks exchange."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gristmill.runtime.parallel.exchange import Traffic
from gristmill.runtime.profile import QUARTILE, CpuProbe, Forward, Profile, Roofs, Transfer, prepared

if TYPE_CHECKING:
    from gristmill.runtime.parallel.executor import ParallelExecutor
    from gristmill.runtime.session import Session

REPEATS = 20


class ParallelProbe(CpuProbe):
    """The CPU with the threads of all ranks, as one roof for the work of all; times are rank 0's."""

    def __init__(self, session: Session, executor: ParallelExecutor) -> None:
        super().__init__(session)
        self._executor = executor

    def profile(
        self, roofs: Roofs, forward: Forward, repeats: int, filled: int | None = None,
        seconds: float = math.inf,
    ) -> Profile:  # fmt: skip
        self._executor.history.clear()
        found = super().profile(roofs, forward, repeats, filled, seconds)
        transfers = _transfers(self._executor.history)
        exchanged = sum(transfer.seconds for transfer in transfers)
        around = max(0.0, (found.around or 0.0) - exchanged)
        return replace(
            found, seconds=found.seconds + exchanged, shared_phases=None, around=around, transfers=transfers
        )

    def communication(self, forward: Forward) -> float:
        """Seconds that rank 0 is in exchanges, waits for slower ranks included; the lower quartile."""
        executor = self._executor
        with prepared(self._session, forward) as run:
            executor.history.clear()
            executor.profile(True)
            try:
                for _ in range(REPEATS):
                    run()
            finally:
                executor.profile(False)
        return sum(transfer.seconds for transfer in _transfers(executor.history))


def _transfers(history: list[dict[str, Traffic]]) -> tuple[Transfer, ...]:
    """Kind by kind, of one forward; the first warms up."""
    kept = history[1:] or history
    found = []
    for name in kept[0] if kept else ():
        seconds = float(np.quantile([traffic[name].seconds for traffic in kept], QUARTILE))
        found.append(Transfer(name, kept[0][name].count, kept[0][name].bytes, seconds))
    return tuple(transfer for transfer in found if transfer.count)
