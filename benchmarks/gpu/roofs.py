"""Time on a device, and the two roofs of the same run: bytes read and bf16 products per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import triton
import triton.language as tl
from torch import Tensor

from gristmill.runtime.cuda.graphs import captured

Run = Callable[[], object]
LAUNCH_AHEAD_CYCLES = 200_000_000  # some 100 ms in which the host gets ahead of the device


@dataclass(frozen=True)
class Clock:
    """Seconds by CUDA events on a device, by the host's clock without one."""

    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, run: Run, repeats: int) -> float:
        """Of one run, the mean over as many as there are repeats, one after the other without a pause."""
        if not self.on_gpu:
            begin = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - begin) / repeats
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / repeats

    def each(self, runs: Sequence[Run]) -> list[float]:
        """Of every one of the runs, launched once in their order: the device's time, not the host's.

        The device sleeps until the host has launched them all; the time between two events has some
        microsecond of its own in it.
        """
        if not self.on_gpu:
            return [self.seconds(run, 1) for run in runs]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        torch.cuda._sleep(LAUNCH_AHEAD_CYCLES)
        events[0].record()
        for run, event in zip(runs, events[1:]):
            run()
            event.record()
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:])]

    def graphed(self, run: Run) -> Run:
        """The same as one replay of a CUDA Graph; without a device as it is."""
        if self.on_gpu:
            graph = captured(run)

            def replay(kept: Run = run) -> None:  # the graph does not keep the memory that it works on
                graph.replay()

            return replay
        run()
        return run


@triton.jit
def read_kernel(x, out, steps, BLOCK: tl.constexpr):
    """out[p] = the sum of the p-th steps * BLOCK of x [n] i32: a stream that is read once and not kept."""
    at = tl.program_id(0).to(tl.int64) * steps * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(steps):
        total += tl.load(x + at + step * BLOCK, eviction_policy="evict_first")
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


@dataclass(frozen=True)
class Reader:
    """One way to read memory: elements of a step, steps of a program, warps."""

    block: int
    steps: int
    warps: int

    def launch(self, x: Tensor, out: Tensor) -> None:
        programs = x.numel() // (self.block * self.steps)
        read_kernel[(programs,)](x, out, self.steps, BLOCK=self.block, num_warps=self.warps)


READERS = [
    Reader(block, steps, warps)
    for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8), (8192, 16))
    for steps in (4, 16)
]


class ReadRoof:
    """Bytes per second that this device reads, by the fastest of several kernels and torch.sum."""

    def __init__(self, clock: Clock, size: int, readers: Sequence[Reader] = READERS) -> None:
        self.clock = clock
        self.x = torch.ones(size // 4, dtype=torch.int32, device=clock.device)
        self.out = torch.zeros(size // 4096, dtype=torch.int32, device=clock.device)
        runs: dict[str, Run] = {f"{r}": self._reading(r) for r in readers}
        runs["torch.sum"] = lambda: torch.sum(self.x.view(torch.float32))
        times = {}
        for name, run in runs.items():
            run()
            times[name] = clock.seconds(run, 3)
        self.name = min(times, key=lambda name: times[name])
        self._run = runs[self.name]
        self._check(readers[0])

    def _reading(self, reader: Reader) -> Run:
        return lambda: reader.launch(self.x, self.out)

    def _check(self, reader: Reader) -> None:
        """The kernel reads all of it: ones add up to their number."""
        self.out.zero_()
        reader.launch(self.x, self.out)
        programs = self.x.numel() // (reader.block * reader.steps)
        read, expected = int(self.out.sum()), programs * reader.block * reader.steps
        assert read == expected and expected > 0, f"the roof's kernel read {read} of {expected} numbers"

    def sample(self) -> float:
        """Bytes per second, now."""
        return self.x.nbytes / self.clock.seconds(self._run, 3)


def matmul_roof(clock: Clock, sizes: Sequence[tuple[int, int, int]], rounds: int) -> tuple[float, str]:
    """Operations per second of torch.matmul in bf16, the best over m, n, k, and which these were."""
    best, name = 0.0, ""
    for m, n, k in sizes:
        a, b = (torch.randn(shape, device=clock.device).bfloat16() for shape in ((m, k), (n, k)))
        out = torch.empty(m, n, dtype=torch.bfloat16, device=clock.device)

        def run(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> None:
            torch.matmul(a, b.t(), out=out)

        run()
        found = 2 * m * n * k / median(clock.seconds(run, 3) for _ in range(rounds))
        if found > best:
            best, name = found, f"{m} x {n} x {k}"
    return best, name
