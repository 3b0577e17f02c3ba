"""Weights from their stored bits: device functions that every product shares, and a kernel that writes them out.

See `matrix` for chunks and parts. Rows and chunks past the end are clamped, not masked: what they give is never
stored or is multiplied by an activation of 0, and a load without a mask stays one wide load.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .matrix import ZEROS, Matrix


@triton.jit
def first_column(chunk, part: tl.constexpr, FORMAT: tl.constexpr):
    """The first of the WIDTH columns of a part of a chunk."""
    if FORMAT == "int4":
        return chunk // 2 * 64 + chunk % 2 * 16 + 32 * part
    elif FORMAT == "int3" or FORMAT == "int2":
        return chunk * 64 + 16 * part
    elif FORMAT == "int8" or FORMAT == "fp8":
        return chunk * 16
    elif FORMAT == "f32":
        return chunk * 4
    else:
        return chunk * 8


@triton.jit
def load_chunks(data, stride, rows, chunk, k, FORMAT: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr):
    """The stored elements of chunks [C] of rows [B]: [B, C, WIDTH]; rows int64, stride in elements."""
    inside = tl.arange(0, WIDTH)[None, None, :]
    if FORMAT == "int3":
        at = chunk * 24
    else:
        at = chunk * WIDTH
    pointers = data + (rows * stride)[:, None, None] + at[None, :, None] + inside
    if RAGGED:  # float rows that end within a chunk
        return tl.load(pointers, at[None, :, None] + inside < k, 0.0, eviction_policy="evict_first")
    return tl.load(pointers, eviction_policy="evict_first")


@triton.jit
def load_third_bits(data, stride, rows, chunk):
    """The 64 third bits of each int3 block: [B, C] int64, bit c is column c's."""
    words = data.to(tl.pointer_type(tl.int64), bitcast=True)
    at = (rows * (stride // 8))[:, None] + (chunk * 3 + 2)[None, :]
    return tl.load(words + at, eviction_policy="evict_first")


@triton.jit
def part_values(raw, third, part: tl.constexpr, FORMAT: tl.constexpr, WIDTH: tl.constexpr):
    """q as f32, or the float weight, of one part of the chunks: [B, C, WIDTH]."""
    if FORMAT == "int4":
        return ((raw >> (4 * part)) & 15).to(tl.float32)
    elif FORMAT == "int2":
        return ((raw >> (2 * part)) & 3).to(tl.float32)
    elif FORMAT == "int3":
        bits = (third >> (16 * part)).to(tl.int32)[:, :, None] >> tl.arange(0, WIDTH)[None, None, :]
        return (((raw >> (2 * part)) & 3).to(tl.int32) | (bits & 1) << 2).to(tl.float32)
    elif FORMAT == "fp8":
        return raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return raw.to(tl.float32)


@triton.jit
def load_scales(scale, groups, rows, group):
    """The scales of groups [C] in rows [B]: [B, C] f32."""
    return tl.load(scale + (rows * groups)[:, None] + group[None, :]).to(tl.float32)


@triton.jit
def load_zeros(zero, groups, rows, group, FORMAT: tl.constexpr):
    """The zero points of groups [C] in rows [B]: [B, C] f32."""
    if FORMAT == "int8":
        return tl.load(zero + (rows * groups)[:, None] + group[None, :]).to(tl.float32)
    pairs = (groups + 1) // 2
    packed = tl.load(zero + (rows * pairs)[:, None] + (group // 2)[None, :])
    return (packed.to(tl.int32) >> (group % 2 * 4)[None, :] & 15).to(tl.float32)


@triton.jit
def part_weights(
    raw, third, scale, zero, groups, rows, chunk,
    part: tl.constexpr, FORMAT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """The weights of one part of the chunks, f32 [B, C, WIDTH]; with GROUP 0 not yet times the row's scale."""
    values = part_values(raw, third, part, FORMAT, WIDTH)
    if GROUP == 0:
        group = chunk * 0
    else:
        group = tl.minimum(first_column(chunk, part, FORMAT) // GROUP, groups - 1)
    if zero is not None:
        values -= load_zeros(zero, groups, rows, group, FORMAT)[:, :, None]
    elif ZERO != 0:
        values -= ZERO
    if GROUP != 0:
        values *= load_scales(scale, groups, rows, group)[:, :, None]
    return values


@triton.jit
def dequantize_kernel(
    data, stride, scale, zero, groups, out, ldo, n, k, chunks,
    FORMAT: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(first, n - 1).to(tl.int64)
    chunk = tl.minimum(tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS), chunks - 1)
    raw = load_chunks(data, stride, rows, chunk, k, FORMAT, WIDTH, RAGGED)
    third = load_third_bits(data, stride, rows, chunk) if FORMAT == "int3" else None
    for part in tl.static_range(PARTS):
        w = part_weights(raw, third, scale, zero, groups, rows, chunk, part, FORMAT, WIDTH, GROUP, ZERO)
        if scale is not None and GROUP == 0:
            w *= tl.load(scale + rows).to(tl.float32)[:, None, None]
        columns = first_column(chunk, part, FORMAT)[None, :, None] + tl.arange(0, WIDTH)[None, None, :]
        tl.store(out + (rows * ldo)[:, None, None] + columns, w.to(out.dtype.element_ty), columns < k)


def constants(matrix: Matrix) -> dict[str, Any]:
    """The arguments of a kernel that follow from a matrix's format."""
    return {
        "FORMAT": matrix.format,
        "WIDTH": matrix.width,
        "PARTS": matrix.parts,
        "RAGGED": matrix.is_float and matrix.k % matrix.width != 0,
        "GROUP": matrix.group,
        "ZERO": ZEROS.get(matrix.format, 0) if matrix.symmetric else 0,
    }


def dequantize(matrix: Matrix, out: Tensor) -> None:
    """out [n, k] = the matrix's weights, rounded to out's type; out's rows may have any stride."""
    assert tuple(out.shape) == (matrix.n, matrix.k) and out.stride(1) == 1
    rows, chunks = 16, 32
    grid = (triton.cdiv(matrix.n, rows), triton.cdiv(matrix.chunks, chunks))
    dequantize_kernel[grid](
        matrix.data, matrix.data.stride(0), matrix.scale, matrix.zero, matrix.groups,
        out, out.stride(0), matrix.n, matrix.k, matrix.chunks,
        ROWS=rows, CHUNKS=chunks, num_warps=4, **constants(matrix),
    )  # fmt: skip
