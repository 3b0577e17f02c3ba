"""Rows of a matrix by their number."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .dequantize import constants, first_column, load_chunks, load_third_bits, whole_weights
from .matrix import Matrix


@triton.jit
def embedding_kernel(
    ids, offset, first, data, stride, scale, zero, groups, magic, residual, ldr, out, ldo, n, k, chunks,
    factor,
    FORMAT: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One token; `first` is the number of the matrix's first row; rows of other segments are left alone."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token) + offset - first
    mine = (row >= 0) & (row < n)
    rows = tl.minimum(tl.maximum(row, 0), n - 1).to(tl.int64)
    chunk = tl.minimum(tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS), chunks - 1)[:, None]
    inside = tl.arange(0, WIDTH)[None, :]
    raw = load_chunks(data, stride, rows, chunk, inside, k, FORMAT, RAGGED)
    third = load_third_bits(data, stride, rows, chunk) if FORMAT == "int3" else None
    for part in tl.static_range(PARTS):
        y = whole_weights(
            raw, third, magic, inside, scale, zero, groups, rows, chunk, part, FORMAT, GROUP, ZERO
        )
        column = first_column(chunk, part, FORMAT) + inside
        mask = (column < k) & mine
        y *= factor
        if residual is not None:
            y += tl.load(residual + token * ldr + column, mask, 0.0).to(tl.float32)
        tl.store(out + token * ldo + column, y.to(out.dtype.element_ty), mask)


def embedding(
    ids: Tensor,
    segments: Sequence[Matrix],
    out: Tensor,
    *,
    residual: Tensor | None = None,
    scale: float = 1.0,
    offset: int = 0,
) -> None:
    """out[t] = scale * W[ids[t] + offset] + residual[t]; one kernel for each segment of W.

    ids [T] int32, whose rows must exist: a token without one keeps what out holds. residual and out [T, k],
    floats of any type whose last dimension has stride 1; out must not be the residual if there are more
    segments.
    """
    assert tuple(out.shape) == (len(ids), segments[0].k) and out.stride(1) == 1
    first = 0
    for m in segments:
        chunks = min(128, triton.next_power_of_2(m.chunks))
        embedding_kernel[(len(ids), triton.cdiv(m.chunks, chunks))](
            ids, offset, first, m.data, m.data.stride(0), m.scale, m.zero, m.groups,
            residual=residual, ldr=0 if residual is None else residual.stride(0), out=out, ldo=out.stride(0),
            n=m.n, k=m.k, chunks=m.chunks, factor=scale, CHUNKS=chunks, num_warps=2, **constants(m),
        )  # fmt: skip
        first += m.n
