"""What a device can do, and where the time of a forward goes on it, for `gristmill bench`.

A kind of instruction is timed alone: all of its instructions, one after the other, as a graph that is
replayed between two events. Launched one by one, small kernels would show how fast Python launches them. What
fits into the L2 cache between two replays is read from there, in a small model more than in a real decode.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gristmill.kernels.triton.stream import read
from gristmill.runtime.cuda.graphs import captured
from gristmill.runtime.profile import (
    PROBE_BYTES,
    Forward,
    Profile,
    Roofs,
    collect,
    kind_of,
    prepared,
)

if TYPE_CHECKING:
    from gristmill.runtime.cuda.executor import CudaExecutor
    from gristmill.runtime.session import Session

Seconds = Callable[[Callable[[], None], int], float]  # of one call, the median of so many


@dataclass(frozen=True)
class Sizes:
    """What a probe works on: bytes that are read, far more than any cache holds; width of the matrices that
    are multiplied; repeats of either.
    """

    stream: int = 512 << 20
    matrix: int = 8192
    repeats: int = 20


def event_seconds(launch: Callable[[], None], repeats: int, among_threads: bool = False) -> float:
    """By CUDA events around replays of what ``launch`` launches; among_threads: see `captured`."""
    graph = captured(launch, among_threads=among_threads)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) / 1e3


def wall_seconds(launch: Callable[[], None], repeats: int) -> float:
    """By the clock, for kernels that run in the calling thread."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        launch()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


class CudaProbe:
    """Measures the device of an executor; see runtime/profile.py, whose CpuProbe does it for the CPU."""

    def __init__(
        self, executor: CudaExecutor, session: Session, sizes: Sizes | None = None,
        seconds: Seconds | None = None,
    ) -> None:  # fmt: skip
        self._executor, self._session, self._sizes = executor, session, sizes or Sizes()
        on_device = executor.device.type == "cuda"
        self._seconds = seconds or (event_seconds if on_device else wall_seconds)
        processors = executor.processors
        self._memory = torch.ones(self._sizes.stream // 4, dtype=torch.int32, device=executor.device)
        self._read = torch.zeros(8 * processors, dtype=torch.int32, device=executor.device)

    def read_stream(self, size: int = PROBE_BYTES) -> float:
        """10^9 bytes per second that the device reads of ``size`` bytes, or of the probe's where those are
        fewer."""
        memory = self._memory[: max(1, size // 4)]
        seconds = self._seconds(lambda: read(memory, self._read), self._sizes.repeats)
        return memory.nbytes / seconds / 1e9

    def roofs(self, stream_gb_s: float) -> Roofs:
        """With the peak of products of bf16 matrices for all products: beside int8 activations too, which are
        multiplied where there are few rows and memory is what bounds them."""
        width = self._sizes.matrix
        x, y, out = (
            torch.zeros(width, width, dtype=torch.bfloat16, device=self._executor.device) for _ in range(3)
        )
        x.normal_()
        y.normal_()
        seconds = self._seconds(partial(_multiply, x, y, out), self._sizes.repeats)
        peak = 2 * width**3 / seconds
        return Roofs(1e9 * stream_gb_s, peak, peak)

    def communication(self, forward: Forward) -> float:
        """Seconds that the host's ids take to the device, and tokens, or logits where the host draws, take
        back: median of the repeats."""
        executor, count = self._executor, forward.rows * forward.sequences
        ids = np.zeros(count, np.int32)
        batch = {"tokens": ids, "positions": ids, "slots": ids, "rows": ids[: forward.sequences]}

        def move() -> None:
            with executor._current():
                executor._batch.fill(batch)
                if executor.draws_tokens:
                    executor._drawing.read(forward.sequences)
                else:
                    executor._values.logits[: forward.sequences].cpu()
                if executor.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()

        move()
        return wall_seconds(move, self._sizes.repeats)

    def profile(
        self, roofs: Roofs, forward: Forward, repeats: int, filled: int | None = None,
        seconds: float = math.inf,
    ) -> Profile:  # fmt: skip
        """Profile a forward kind by kind; the seconds of a kind are shared out evenly to its instructions,
        those that others do for it included (norms of few rows).

        Raises GristmillError where it does not fit into the session.
        """
        program = self._session.program
        kinds: dict[str, list[int]] = {}
        for index, instruction in enumerate(program.instructions):
            kinds.setdefault(kind_of(program, instruction), []).append(index)
        times = [0.0] * len(program.instructions)
        with prepared(self._session, forward, filled) as run:
            run()
            for indices in kinds.values():
                launch = self._executor.relaunch(indices)
                seconds = self._seconds(launch, repeats)
                for index in indices:
                    times[index] = seconds / len(indices)
        return Profile(forward, collect(program, times, roofs, forward), sum(times), None)


def _multiply(x: Tensor, y: Tensor, out: Tensor) -> None:
    torch.mm(x, y, out=out)
