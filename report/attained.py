"""What this project's kernels attain of a device's roofs: the figures between a floor and an expectation.

A device measured by a probe brings its own (`report.cpu_probe`); the tables here serve all others, and are
the one place where they are assumed. For a product of n * k weights with m rows of activations

    memory   bytes / (reached * bandwidth) + n * fetch
    compute  (n k / one + n * finish) * (1 + more * (m - 1))   for few rows, which have kernels of their own
             2 n k * (m + unpack) / rate                       for more
             (to unpack a weight costs as much as multiplying it by some rows)

and attention over a cache has the second form, with the queries that share a head of it as rows. What is
written for GPUs agreed within 9 % with one run of benchmarks/bench_gpu.py on an H200 (2026-11-27, the
Llama-3.1-8B shape in int4, int8, fp8 and bf16: one sequence, 16 sequences of int4, prompts of 2048 in
forwards of 512 and 2048); other GPUs, long contexts and the other formats are extrapolated. The kernels have
changed since: fewer of them and other instructions are counted here, and have not been measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from gristmill.report.devices import DeviceSpec

FEW_ROWS = 4  # up to here both executors have kernels that are made to read weights

# ---- GPUs

# Instructions of a lane for each weight of a product with one row of f32 activations: those of the loop that
# ptxas makes for sm_90a of kernels/triton/linear_decode.py (Triton 3.6, the table's configs), divided by the
# weights that a lane takes in a turn. By format, and whether a row has several scales. "bench_gpu.py --paper
# --compile" counts them again.
INSTRUCTIONS = {
    ("f32", False): 4.62, ("bf16", False): 4.88, ("f16", False): 4.41, ("fp8", False): 3.91,
    ("int8", False): 6.62, ("int8", True): 7.12, ("int4", True): 5.55, ("int3", True): 7.97,
    ("int2", True): 4.68,
}  # fmt: skip
# The same of kernels/triton/linear_integer.py, where activations are int8.
INTEGER_INSTRUCTIONS = {"int8": 1.28, "int4": 1.62, "int3": 2.58, "int2": 1.42}
LANES = 128  # that a multiprocessor issues for in a cycle: four schedulers of 32
MORE_INSTRUCTIONS = 2.0  # for each further row: a load and a multiply-add; not measured
REACHED = 0.92  # of the data sheet's bandwidth, by a kernel that only reads
ISSUED = 0.6  # of the instructions that schedulers could issue
KERNEL_SECONDS = 2.7e-6  # between the kernels of a graph, each of which waits for the one before
OTHER_SECONDS = 0.0  # norms are done by the products around them, but for the first and the last
PEAK_SHARE = 0.44  # of dense bf16 products, with many rows and all that is beside them
F32_PEAK_SHARE = 0.5  # of f32 products, which are not on tensor cores; not measured
UNPACK_ROWS = 32.0  # that dequantizing takes as long as
ATTENTION_REACHED = 0.6  # the target of the kernel; not measured

# ---- CPUs that no probe has measured

# Shares of the read stream while decoding one sequence of the TinyLlama-1.1B shape on two threads of an Intel
# Xeon with AVX-512 VNNI, 2026-11-24: README and benchmarks/results/2026-11-24-speed-tinyllama-1.1b*.csv.
CPU_REACHED = {
    "f32": 0.98, "bf16": 0.98, "f16": 0.98, "fp8": 0.63,
    "int8": 0.9, "int4": 0.86, "int3": 0.75, "int2": 0.75,
}  # fmt: skip
CPU_PEAK_SHARE = 0.56  # of the peak of f32 or bytes in a prompt of 512, there
CPU_UNPACK_ROWS = 12.0  # from the batches of 8 in the same files
CPU_ATTENTION = 0.25  # of the f32 peak, from the contexts of 1,900 there
CPU_STEP_SECONDS = 3e-6  # a barrier


@dataclass(frozen=True)
class Product:
    """Products of one weight format; see the module's docstring.

    reached: share of the bandwidth, above 1 where the stream that was measured is slower; fetch, finish:
    seconds for each row of weights, for the wait until its first bytes come from memory and for adding up
    its sums; one: weights per second; more: share of a row's time; rate: operations per second; unpack: rows.
    """

    reached: float
    rate: float
    unpack: float
    one: float = math.inf
    more: float = 1.0
    fetch: float = 0.0
    finish: float = 0.0

    def compute_seconds(self, n: int, k: int, rows: int) -> float:
        """Seconds of arithmetic with weights [n, k] and so many rows of activations."""
        if rows <= FEW_ROWS and math.isfinite(self.one):
            return n * (k / self.one + self.finish) * (1 + self.more * (rows - 1))
        return 2.0 * n * k * (rows + self.unpack) / self.rate


@dataclass(frozen=True)
class Attention:
    """Attention over one type of cache. reached: share of the bandwidth; rate: operations per second with
    many queries for each head of the cache; unpack: what preparing a position costs, in queries."""

    reached: float
    rate: float
    unpack: float = 0.0

    def compute_seconds(self, operations: float, queries: int) -> float:
        """queries: heads of a query for each head of the cache, times rows of a sequence."""
        return operations / self.rate * (1 + self.unpack / max(queries, 1))


@dataclass(frozen=True)
class Attained:
    """What kernels attain of one device.

    products: by weight format ("int8-row": with one scale for a row, where that differs); attention: by type
    of cache. linear, attend, other: seconds that an instruction takes besides its work; forward: seconds of a
    forward besides its instructions; gate: seconds for each column that a gated linear writes. misses: of
    forwards that read so many bytes over and over, the share that comes from memory and not from a cache,
    sizes ascending. source: where all of it comes from.
    """

    products: dict[str, Product]
    attention: dict[str, Attention]
    linear: float
    attend: float
    other: float
    forward: float
    source: str
    gate: float = 0.0
    misses: tuple[tuple[int, float], ...] = ()

    def missing(self, read_bytes: int, cache_bytes: int) -> float:
        """The share of what forwards read that no cache keeps for the next: between the sizes that were
        measured by the logarithm. Else none up to half of the last cache, which others use as well, and all
        beyond twice its size."""
        if self.misses:
            sizes, shares = zip(*self.misses, strict=True)
            return float(np.interp(np.log(max(read_bytes, 1)), np.log(sizes), shares))
        if not cache_bytes:
            return 1.0
        return min(1.0, max(0.0, (read_bytes - cache_bytes / 2) / (1.5 * cache_bytes)))

    def product(self, name: str, group: int) -> Product:
        """Of weights in a format, with ``group`` columns to a scale (0: the row)."""
        row = f"{name}-row"
        return self.products[row if not group and row in self.products else name]


def assumed(spec: DeviceSpec) -> Attained:
    """What the tables say of a device that no probe has measured."""
    return _gpu(spec) if spec.kind == "gpu" else _cpu(spec)


def _gpu(spec: DeviceSpec) -> Attained:
    issue = ISSUED * spec.processors * LANES * spec.clock
    products = {}
    for (name, grouped), of_floats in INSTRUCTIONS.items():
        count = INTEGER_INSTRUCTIONS.get(name, of_floats)
        key = name if grouped or (name, True) not in INSTRUCTIONS else f"{name}-row"
        rate = F32_PEAK_SHARE * spec.f32_ops if name == "f32" else PEAK_SHARE * spec.f16_ops
        products[key] = Product(
            REACHED, rate, UNPACK_ROWS, one=issue / count, more=MORE_INSTRUCTIONS / count
        )
    attention = Attention(ATTENTION_REACHED, PEAK_SHARE * spec.f16_ops)
    return Attained(
        products, dict.fromkeys(("f32", "f16", "int8", "fp8", "int4"), attention), KERNEL_SECONDS,
        KERNEL_SECONDS, OTHER_SECONDS, KERNEL_SECONDS,
        f"assumed: {REACHED:.0%} of the bandwidth, {ISSUED:.0%} of the instruction rate, "
        f"{PEAK_SHARE:.0%} of the bf16 peak, {1e6 * KERNEL_SECONDS:g} us a kernel, as one H200 gave with the "
        "Llama-3.1-8B shape (2026-11-27)",
    )  # fmt: skip


def _cpu(spec: DeviceSpec) -> Attained:
    products = {}
    for name, reached in CPU_REACHED.items():
        peak = spec.int8_ops if name.startswith("int") and spec.int8_ops else spec.f32_ops
        products[name] = Product(reached, CPU_PEAK_SHARE * peak, CPU_UNPACK_ROWS)
    attention = Attention(CPU_REACHED["f16"], CPU_ATTENTION * spec.f32_ops)
    return Attained(
        products, dict.fromkeys(("f32", "f16", "int8", "fp8", "int4"), attention), CPU_STEP_SECONDS,
        CPU_STEP_SECONDS, 0.0, CPU_STEP_SECONDS,
        "assumed: the shares of the roofs that the TinyLlama-1.1B shape reached on two threads of a Xeon "
        "with AVX-512 VNNI (benchmarks/results, 2026-11-24)",
    )  # fmt: skip
