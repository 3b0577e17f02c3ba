"""What a calibration will take, told before it starts: peak memory, time and disk.

Memory and disk follow from shapes. Time is the number of floating point operations over the rate of a small
product measured here and now, so that a busy machine says so.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..passes.graph import Traced, arguments, aten, is_op, ours, shape
from ..quant import methods
from ..quant.scheme import Scheme
from ..quant.search import CANDIDATES_ABOUT
from ..runtime.machine import resident_bytes
from . import tune_scales
from .calibration_set import CalibrationSet
from .interpret import steps
from .walk import CHUNK_ROWS

if TYPE_CHECKING:
    from .calibrate import Recipe

# Products with H of N x K x K that a matrix takes, each 2 N K^2 operations: see quant/methods.py.
SEARCH_PRODUCTS = 3
GPTQ_PRODUCTS = 11
AWQ_CANDIDATES = 29
# Multiply-adds in the time that a candidate takes for a weight: 512 of them, the rest is rounding.
AWQ_CANDIDATE = 1200
BLOCK = 128
# What small steps cost beside products: columns are rounded one by one.
COLUMN_BYTES_PER_WEIGHT = 3 * 64 * 8
# Arrays of the size of a chunk of weights that quantizing it needs at its peak.
CHUNK_ARRAYS = 11
# f64 matrices [K, K] alive at the peak of factoring H.
HESSIANS = 4
RATE_SIDE = 1024
RATE_SECONDS = 0.5
# Share of that product's rate that a calibration gets: its products are larger than caches, and copies, fresh
# pages and single steps lie between them. Seen for gptq and for both phases of awq on a 1.1B shape.
ATTAINED = 0.4


@dataclass(frozen=True)
class Estimate:
    """peak_bytes: resident size of the whole process; seconds: at the rate measured; disk_bytes: of the
    store, beside the artifact."""

    peak_bytes: int
    seconds: float
    disk_bytes: int

    def __str__(self) -> str:
        minutes = self.seconds / 60
        spent = f"{minutes:.0f} min" if minutes >= 2 else f"{self.seconds:.0f} s"
        return (
            f"about {spent}, {self.peak_bytes / 2**30:.2f} GiB of memory at the peak, "
            f"{self.disk_bytes / 2**30:.2f} GiB of disk while it runs"
        )


def estimate(traced: Traced, samples: CalibrationSet, recipe: Recipe, choices: Sequence[Scheme]) -> Estimate:
    """Estimate a run over ``samples``; choices: the formats that a budget measures."""
    linears = [
        _Linear.of(traced, n) for n in traced.graph.find_nodes(op="call_function", target=ours.linear.default)
    ]
    rows, streams = samples.tokens, 2 if recipe.asymmetric_error else 1
    epochs = recipe.epochs(traced, rows)
    tuning = tune_scales.peak_bytes(traced, samples.length) if epochs else 0.0
    peak = resident_bytes() + max(_peak_bytes(traced, rows, streams, recipe), tuning)
    operations = sum(_operations(linear, rows, streams, recipe, len(choices)) for linear in linears)
    operations += tune_scales.operations(traced, rows, epochs)
    stored = sum(linear.n * linear.k for linear in linears)  # a byte a weight, at most
    widest = max(linear.hidden for linear in linears)
    return Estimate(int(peak), operations / operations_per_second(), stored + 2 * 4 * rows * widest * streams)


@dataclass(frozen=True)
class _Linear:
    """All matrices of a linear as one [n, k]; hidden: the width of what it adds to, else 0."""

    n: int
    k: int
    hidden: int

    @staticmethod
    def of(traced: Traced, node: fx.Node) -> _Linear:
        a = arguments(node)
        shapes = [traced.weights[w.name].shape for w in a["weights"]]
        hidden = shape(node)[-1] if a["residual"] is not None else 0
        return _Linear(sum(n for n, _ in shapes), shapes[0][1], hidden)


def _operations(linear: _Linear, rows: int, streams: int, recipe: Recipe, choices: int) -> float:
    n, k = linear.n, linear.k
    method = recipe.method
    total = 0.0
    if method.calibrated:
        products = SEARCH_PRODUCTS + (GPTQ_PRODUCTS if method.gptq else 0)
        total += 2.0 * n * k * (products * k + CANDIDATES_ABOUT * BLOCK)
        total += 2.0 * rows * (n * k * streams + k * k * streams)
        total += n * k * COLUMN_BYTES_PER_WEIGHT * 2 if method.gptq else 0
        total += 3.0 * k**3 if method.gptq else 0
    if method.awq or choices:
        total += 2.0 * rows * n * k
    if method.awq:
        total += 2.0 * AWQ_CANDIDATES * n * k * AWQ_CANDIDATE
    if choices:
        total += 2.0 * rows * k * k + choices * 2.0 * n * k * (2 * k + CANDIDATES_ABOUT * BLOCK)
    return total


def _peak_bytes(traced: Traced, rows: int, streams: int, recipe: Recipe) -> float:
    """The largest sum, over the nodes, of values alive and what the node needs at work."""
    alive: dict[fx.Node, int] = {}
    peak = 0.0
    for node, finished in steps(traced):
        held = 4.0 * rows * streams * sum(alive.values())
        alive[node] = 0 if is_op(node, aten.slice.Tensor) else shape(node)[-1]
        is_last = any(user.op == "output" for user in node.users)
        out = 0.0 if is_last else 4.0 * rows * streams * alive[node]
        if is_op(node, ours.linear.default):
            peak = max(
                peak, held + _work_bytes(_Linear.of(traced, node), recipe), held + out + _run_bytes(node)
            )
        peak = max(peak, held + out)
        for source in finished:
            alive.pop(source, None)
    return peak


def _work_bytes(linear: _Linear, recipe: Recipe) -> float:
    n, k = linear.n, linear.k
    factoring = 8.0 * k * k * (HESSIANS if recipe.method.gptq else 2) + 4.0 * n * k
    chunk = 4.0 * CHUNK_ARRAYS * min(n * k, methods.CHUNK_WEIGHTS)
    quantizing = 8.0 * k * k + 4.0 * n * k * 3 + chunk
    return max(factoring, quantizing)


def _run_bytes(node: fx.Node) -> float:
    """Weights and one chunk of rows with its intermediate values."""
    weights = [math.prod(w.meta["val"].shape) for w in arguments(node)["weights"] if "val" in w.meta]
    return 4.0 * sum(weights) + 4.0 * CHUNK_ROWS * 3 * shape(node)[-1]


def operations_per_second() -> float:
    """Floating point operations per second that a calibration gets on this machine as busy as it is, from the
    median time of some small products: another process may have the processor for a moment."""
    a = torch.ones(RATE_SIDE, RATE_SIDE)
    a @ a
    times: list[float] = []
    while sum(times) < RATE_SECONDS or len(times) < 5:
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    return ATTAINED * 2.0 * RATE_SIDE**3 / statistics.median(times)
