"""Keys and values of a cache as ONNX tensors, and the artifact's int8 rows in standard operators.

An int8 row of a head is bytes q, a step and an offset, both f32: step * q + offset. They are the best by
squared error of 16 grids, as kernels/reference/cache.py has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from gristmill.export.onnx_graph import Graph
from gristmill.runtime.program import CacheSpec

GRIDS = 16  # candidates for a row's step, narrower by 1/32 of the range each
LEVELS = 255
LEAST_STEP = 1e-35  # rows of a smaller range count as constant
KINDS = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "int8": TensorProto.UINT8}
DTYPES = tuple(KINDS)


@dataclass(frozen=True)
class Part:
    """One tensor of a cache, [batch, kv_heads, length, dim]; name: what follows the number of the cache."""

    name: str
    kind: int
    kv_heads: int
    dim: int

    def shape(self, length: str) -> list[int | str]:
        return ["batch", self.kv_heads, length, self.dim]


def dtype_of(spec: CacheSpec, name: str) -> str:
    """name: "key" or "value"."""
    return spec.k_dtype if name == "key" else spec.v_dtype


def parts(spec: CacheSpec, name: str) -> list[Part]:
    """The tensors of a cache's keys or values; runtime/onnx/executor.py makes the same."""
    dtype, dim = dtype_of(spec, name), spec.k_dim if name == "key" else spec.v_dim
    found = [Part(name, KINDS[dtype], spec.kv_heads, dim)]
    if dtype == "int8":
        found += [Part(f"{name}_{part}", TensorProto.FLOAT, spec.kv_heads, 1) for part in ("step", "offset")]
    return found


def rounded(g: Graph, x: str) -> list[str]:
    """Rows x [..., D] f32 as bytes [..., D], steps and offsets [..., 1]."""
    last = g.integers(-1)
    high, low = (g.op(kind, x, last, keepdims=1) for kind in ("ReduceMax", "ReduceMin"))
    half = g.constant(0.5)
    middle = g.op("Add", g.op("Mul", high, half), g.op("Mul", low, half))
    shares = g.constant(1 + np.arange(GRIDS) / 32)
    steps = g.op("Mul", g.op("Div", g.op("Sub", high, low), g.constant(LEVELS)), shares)  # [..., GRIDS]
    reach = g.op("Mul", _double(g, steps), g.constant(LEVELS / 2, np.float64))
    offsets = _single(g, g.op("Sub", _double(g, middle), reach))
    usable = g.op("Greater", steps, g.constant(LEAST_STEP))
    error = g.op("Where", usable, _errors(g, x, steps, offsets, usable), g.constant(np.inf, np.float64))
    best = g.op("ArgMin", error, axis=-1, keepdims=1)
    step, offset = (g.op("GatherElements", grid, best, axis=-1) for grid in (steps, offsets))
    varies = g.op("Greater", g.op("ReduceMax", steps, last, keepdims=1), g.constant(LEAST_STEP))
    step, offset = g.op("Where", varies, step, g.constant(0.0)), g.op("Where", varies, offset, middle)
    q = _levels(g, x, g.op("Where", varies, step, g.constant(1.0)), offset)
    return [g.op("Cast", q, to=TensorProto.UINT8), step, offset]


def values(g: Graph, q: str, step: str, offset: str) -> str:
    """Rows [..., D] f32 of bytes, steps and offsets."""
    found: str = g.op("Add", g.op("Mul", g.op("Cast", q, to=TensorProto.FLOAT), step), offset)
    return found


def hadamard(g: Graph, x: str, block: int) -> str:
    """Each `block` columns of the last axis of x [batch, heads, sequence, D], a power of two, times the
    orthonormal Walsh-Hadamard matrix."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    weight = g.weight(f"hadamard.{block}", (matrix / math.sqrt(block)).astype(np.float32))
    blocks = g.op("Reshape", x, g.integers(0, 0, 0, -1, block))
    found: str = g.op("Reshape", g.op("MatMul", blocks, weight), g.op("Shape", x))
    return found


def _errors(g: Graph, x: str, steps: str, offsets: str, usable: str) -> str:
    """Sum of the squares that each grid is off, [..., GRIDS] f64."""
    x, last = g.op("Unsqueeze", x, g.integers(-2)), g.integers(-1)
    whole = g.op("Where", usable, steps, g.constant(1.0))
    columns = [g.op("Unsqueeze", grid, last) for grid in (whole, steps, offsets)]
    q = _double(g, _levels(g, x, columns[0], columns[2]))  # [..., GRIDS, D]
    y = g.op("Add", g.op("Mul", q, _double(g, columns[1])), _double(g, columns[2]))
    off = g.op("Sub", y, _double(g, x))
    found: str = g.op("ReduceSum", g.op("Mul", off, off), last, keepdims=0)
    return found


def _levels(g: Graph, x: str, step: str, offset: str) -> str:
    """The nearest of the levels 0 to 255, f32."""
    scaled = g.op("Mul", g.op("Sub", x, offset), g.op("Reciprocal", step))
    found: str = g.op("Clip", g.op("Round", scaled), g.constant(0.0), g.constant(float(LEVELS)))
    return found


def _double(g: Graph, x: str) -> str:
    found: str = g.op("Cast", x, to=TensorProto.DOUBLE)
    return found


def _single(g: Graph, x: str) -> str:
    found: str = g.op("Cast", x, to=TensorProto.FLOAT)
    return found
