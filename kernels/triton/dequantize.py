"""Weights from their stored bits: device functions that all products share, and a kernel that stores them.

See `matrix` for chunks and parts. Rows and chunks past the end are clamped, not masked: what they give is
never stored or is multiplied by an activation of 0, and a load without a mask stays one wide load.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .matrix import MAGIC, OFFSETS, ZEROS, Matrix


@triton.jit
def first_column(chunk, part: tl.constexpr, FORMAT: tl.constexpr):
    """The first of the WIDTH columns of a part of a chunk."""
    if FORMAT == "int4":
        return chunk // 4 * 64 + chunk % 4 * 8 + 32 * part
    elif FORMAT == "int3" or FORMAT == "int2":
        return chunk // 2 * 64 + chunk % 2 * 8 + 16 * part
    elif FORMAT == "f32":
        return chunk * 4
    else:
        return chunk * 8


@triton.jit
def load_chunks(data, stride, rows, chunk, inside, k, FORMAT: tl.constexpr, RAGGED: tl.constexpr):
    """The stored elements of chunks; rows (int64), chunk and inside (0..WIDTH) of shapes that broadcast.

    stride is that of a row in elements.
    """
    if FORMAT == "int3":
        at = chunk // 2 * 24 + chunk % 2 * 8 + inside
    else:
        at = first_column(chunk, 0, "f32" if FORMAT == "f32" else "int8") + inside
    pointers = data + rows * stride + at
    if RAGGED:  # float rows that end within a chunk
        return tl.load(pointers, at < k, 0.0, eviction_policy="evict_first")
    return tl.load(pointers, eviction_policy="evict_first")


@triton.jit
def load_third_bits(data, stride, rows, chunk):
    """The 64 third bits of each chunk's int3 block, shifted so that bit 16 j + i is column i's of part j."""
    words = data.to(tl.pointer_type(tl.int64), bitcast=True)
    bits = tl.load(words + rows * (stride // 8) + (chunk // 2 * 3 + 2), eviction_policy="evict_first")
    return bits >> chunk % 2 * 8


@triton.jit
def part_values(raw, third, magic, inside, part: tl.constexpr, FORMAT: tl.constexpr):
    """q + OFFSETS[format] as f32, or the float weight, of one part of the chunks.

    q goes right below the exponent of a power of two, the offset: a shift and a mask make the float, where a
    conversion would be one more instruction, of which a multiprocessor does only a quarter as many. `magic`
    is the exponent's bits, an argument of the kernel: of two constants one would need an instruction more.
    """
    if FORMAT == "int4":
        values = (raw.to(tl.int32) << (19 - 4 * part)) & 0x780000 | magic
    elif FORMAT == "int2":
        values = (raw.to(tl.int32) << (21 - 2 * part)) & 0x600000 | magic
    elif FORMAT == "int3":
        low = (raw.to(tl.int32) << (20 - 2 * part)) & 0x300000 | magic
        values = ((third >> (16 * part)).to(tl.int32) << (22 - inside)) & 0x400000 | low
    elif FORMAT == "int8":  # 128 more flips the sign bit
        values = (raw.to(tl.uint8, bitcast=True).to(tl.int32) << 15) ^ magic
    elif FORMAT == "fp8":
        values = raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        values = raw.to(tl.float32)
    return values.to(tl.float32, bitcast=True)


@triton.jit
def part_group(chunk, groups, part: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr):
    """The group of columns that a part of a chunk lies in."""
    if GROUP == 0:
        return chunk * 0
    return tl.minimum(first_column(chunk, part, FORMAT) // GROUP, groups - 1)


@triton.jit
def load_scales(scale, groups, rows, group):
    """The scales of groups in rows, f32."""
    return tl.load(scale + rows * groups + group).to(tl.float32)


@triton.jit
def load_zeros(zero, groups, rows, group, FORMAT: tl.constexpr):
    """The zero points of groups in rows, f32."""
    if FORMAT == "int8":
        return tl.load(zero + rows * groups + group).to(tl.float32)
    packed = tl.load(zero + rows * ((groups + 1) // 2) + group // 2)
    return (packed.to(tl.int32) >> (group % 2 * 4) & 15).to(tl.float32)


@triton.jit
def part_weights(
    raw, third, magic, inside, scale, zero, groups, rows, chunk,
    part: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """The weights of one part of the chunks, f32; with GROUP 0 not yet times the row's scale."""
    values = part_values(raw, third, magic, inside, part, FORMAT)
    group = part_group(chunk, groups, part, FORMAT, GROUP)
    if zero is not None:
        values -= load_zeros(zero, groups, rows, group, FORMAT) + ZERO
    elif ZERO != 0:
        values -= ZERO
    if GROUP != 0:
        values *= load_scales(scale, groups, rows, group)
    return values


@triton.jit
def whole_weights(
    raw, third, magic, inside, scale, zero, groups, rows, chunk,
    part: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """part_weights times the row's scale where that is the only one."""
    values = part_weights(
        raw, third, magic, inside, scale, zero, groups, rows, chunk, part, FORMAT, GROUP, ZERO
    )
    if scale is not None and GROUP == 0:
        values *= tl.load(scale + rows).to(tl.float32)
    return values


@triton.jit
def dequantize_kernel(
    data, stride, scale, zero, groups, magic, out, ldo, n, k, chunks,
    FORMAT: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    rows = tl.minimum(row, n - 1).to(tl.int64)[:, None, None]
    chunk = tl.minimum(chunk, chunks - 1)[None, :, None]
    inside = tl.arange(0, WIDTH)[None, None, :]
    raw = load_chunks(data, stride, rows, chunk, inside, k, FORMAT, RAGGED)
    third = load_third_bits(data, stride, rows, chunk) if FORMAT == "int3" else None
    for part in tl.static_range(PARTS):
        w = whole_weights(
            raw, third, magic, inside, scale, zero, groups, rows, chunk, part, FORMAT, GROUP, ZERO
        )
        column = first_column(chunk, part, FORMAT) + inside
        tl.store(out + rows * ldo + column, w.to(out.dtype.element_ty), column < k)


def constants(matrix: Matrix) -> dict[str, Any]:
    """The arguments of a kernel that follow from a matrix's format."""
    return {
        "magic": MAGIC.get(matrix.format, 0),
        "FORMAT": matrix.format,
        "WIDTH": matrix.width,
        "PARTS": matrix.parts,
        "RAGGED": matrix.is_float and matrix.k % matrix.width != 0,
        "GROUP": matrix.group,
        "ZERO": OFFSETS.get(matrix.format, 0) + (ZEROS.get(matrix.format, 0) if matrix.symmetric else 0),
    }


def dequantize(matrix: Matrix, out: Tensor) -> None:
    """out [n, k] = the matrix's weights, rounded to out's type; out's rows may have any stride."""
    assert tuple(out.shape) == (matrix.n, matrix.k) and out.stride(1) == 1
    rows, chunks = 16, 32
    grid = (triton.cdiv(matrix.n, rows), triton.cdiv(matrix.chunks, chunks))
    dequantize_kernel[grid](
        matrix.data, matrix.data.stride(0), matrix.scale, matrix.zero, matrix.groups,
        out=out, ldo=out.stride(0), n=matrix.n, k=matrix.k, chunks=matrix.chunks,
        ROWS=rows, CHUNKS=chunks, num_warps=4, **constants(matrix),
    )  # fmt: skip
