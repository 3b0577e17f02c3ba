"""Products for 1 to 4 rows: the weights' stream is all there is to it, so nothing goes through shared memory.

    y[t, n] = sum over groups g of s[n, g] (sum_k q[n, k] x[t, k] - z[n, g] sum_k x[t, k])

A program takes ROWS rows of the weight and walks their columns in steps of CHUNKS chunks (see `matrix`). A
thread loads one chunk of each of its rows at once, and all of these are in flight together. Each group's part
of a chunk is scaled once, behind its sum; threads keep their own sums until the end, where one reduction over
the program adds them in a fixed order. Partial sums of splits go to a workspace, and `combine_kernel` adds
those in order too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dequantize import (
    first_column,
    load_chunks,
    load_scales,
    load_third_bits,
    load_zeros,
    part_group,
    part_values,
)
from .epilogue import deliver, weight_rows
from .handover import hand_over, row_factor
from .overlap import let_next_begin, wait_for_inputs

# Tensors are [chunks, tokens, rows, inside a chunk]. Triton gives the last dimension to a thread, as far as
# its loads are wide, and then the lanes of a warp to the first dimension that has room: the chunks.


@triton.jit
def load_part(x, ldx, token, tokens, chunk, inside, k, part: tl.constexpr, FORMAT: tl.constexpr):
    """The activations that a part of the chunks multiplies, f32 [C, T, 1, W], 0 beyond k and tokens."""
    column = first_column(chunk, part, FORMAT) + inside
    mask = (column < k) & (token < tokens)
    return tl.load(x + token * ldx + column, mask, 0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def halves(x):
    """The two halves of the last dimension, which a thread has whole."""
    last: tl.constexpr = x.shape[3] // 2
    parted = tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], 2, last])
    return tl.split(tl.permute(parted, (0, 1, 2, 4, 3)))


@triton.jit
def part_sums(
    raw, third, magic, x, ldx, token, tokens, chunk, k, part: tl.constexpr, FORMAT: tl.constexpr
):  # fmt: skip
    """Sums of the products of a part of the chunks, [C, T, B, 1], and those of x alone, [C, T, 1, 1].

    A thread loads 4 activations of 32 bits at once, where it has 8 weights: these are taken half by half, or
    every step would send them through shared memory to other threads.
    """
    if raw.shape[3] == 8 and x.dtype.element_ty.primitive_bitwidth == 32:
        low, high = halves(raw)
        sums, x_sums = _sums(low, third, magic, x, ldx, token, tokens, chunk, k, 0, part, FORMAT)
        more, more_x = _sums(high, third, magic, x, ldx, token, tokens, chunk, k, 4, part, FORMAT)
        return sums + more, x_sums + more_x
    else:
        return _sums(raw, third, magic, x, ldx, token, tokens, chunk, k, 0, part, FORMAT)


@triton.jit
def _sums(
    raw, third, magic, x, ldx, token, tokens, chunk, k, first: tl.constexpr, part: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """The same of the columns of raw, of which the part has ``first`` before them."""
    inside = first + tl.arange(0, raw.shape[3])[None, None, None, :]
    x_part = load_part(x, ldx, token, tokens, chunk, inside, k, part, FORMAT)
    values = part_values(raw, third, magic, inside, part, FORMAT)
    return tl.sum(values * x_part, 3, keep_dims=True), tl.sum(x_part, 3, keep_dims=True)


@triton.jit
def group_scale(
    scale, zero, groups, rows, chunk,
    part: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Scale and zero point (with what kernels add to q) of the group that a part lies in, [C, 1, B, 1].

    Constants where there are none; with GROUP 0 the scale is left to the end.
    """
    group = part_group(chunk, groups, part, FORMAT, GROUP)
    s, z = 1.0, ZERO + 0.0
    if GROUP != 0:
        s = load_scales(scale, groups, rows, group)
    if zero is not None:
        z = load_zeros(zero, groups, rows, group, FORMAT) + ZERO
    return s, z


@triton.jit
def chunk_products(
    x, ldx, raw, third, scale, zero, groups, magic, rows, chunk, token, tokens, k, last,
    FORMAT: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """The products of chunks, f32 [C, T, B, 1]."""
    stored = tl.minimum(chunk, last)
    # Ahead of the arithmetic, so as not to wait twice a step, though ptxas moves these loads behind it.
    s, z = group_scale(scale, zero, groups, rows, stored, PARTS - 1, FORMAT, GROUP, ZERO)
    if GROUP == 32 and PARTS > 1:  # a chunk lies in two groups
        s0, z0 = group_scale(scale, zero, groups, rows, stored, 0, FORMAT, GROUP, ZERO)
    total = tl.zeros([chunk.shape[0], token.shape[1], rows.shape[2], 1], tl.float32)
    sums = total
    x_sums = tl.zeros([chunk.shape[0], token.shape[1], 1, 1], tl.float32)
    for part in tl.static_range(PARTS):
        more, more_x = part_sums(raw, third, magic, x, ldx, token, tokens, chunk, k, part, FORMAT)
        sums += more
        x_sums += more_x
        if GROUP == 32 and PARTS > 1 and part == PARTS // 2 - 1:
            total = s0 * (sums - z0 * x_sums)
            sums = tl.zeros_like(sums)
            x_sums = tl.zeros_like(x_sums)
    total += s * (sums - z * x_sums)
    return total


@triton.jit
def decode_kernel(
    x, ldx, data, stride, scale, zero, groups, magic, bias, residual, ldr, out, ldo, work, work_width,
    tokens, n_out, k, chunks, split_chunks, factor, softcap, squares, square_count, eps, next_q, next_scale,
    next_floats, next_squares, next_weight, counters,
    FORMAT: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, GLU: tl.constexpr, ACTIVATION: tl.constexpr, SOFTCAP: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, SQUARES: tl.constexpr,
    NEXT_GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out[t, :] for t < tokens <= TOKENS, or with `work` the sums of split program_id(1), at its place.

    The next step's weights are asked for before a step's are multiplied, the first ones before x is there; of
    fp8, which takes the registers to be converted, a step's own.
    """
    ahead: tl.constexpr = FORMAT != "fp8"
    let_next_begin(OVERLAP)
    token = tl.arange(0, TOKENS)
    rows, column = weight_rows(tl.program_id(0), n_out, GLU, ROWS)
    rows = rows.to(tl.int64)
    rows4, token4 = rows[None, None, :, None], token[None, :, None, None]
    inside = tl.arange(0, WIDTH)[None, None, None, :]
    first = tl.program_id(1) * split_chunks
    end = tl.minimum(first + split_chunks, chunks)
    chunk = (first + tl.arange(0, CHUNKS))[:, None, None, None]
    stored = tl.minimum(chunk, chunks - 1)
    raw = load_chunks(data, stride, rows4, stored, inside, k, FORMAT, RAGGED)
    third = None
    if FORMAT == "int3":
        third = load_third_bits(data, stride, rows4, stored)
    wait_for_inputs(OVERLAP)
    rms = None
    if SQUARES:
        rms = row_factor(squares, square_count, eps, token, tokens, SQUARES)
    total = tl.zeros([CHUNKS, TOKENS, ROWS, 1], tl.float32)
    for at in range(first, end, CHUNKS):
        chunk = (at + tl.arange(0, CHUNKS))[:, None, None, None]
        following = chunk + CHUNKS if ahead else chunk
        following = tl.minimum(following, end - 1)  # the last chunk again at the end, from a cache
        next_raw = load_chunks(data, stride, rows4, following, inside, k, FORMAT, RAGGED)
        if FORMAT == "int3":
            next_third = load_third_bits(data, stride, rows4, following)
        if not ahead:
            raw = next_raw
        total += chunk_products(
            x, ldx, raw, third, scale, zero, groups, magic, rows4, chunk, token4, tokens, k, chunks - 1,
            FORMAT, PARTS, GROUP, ZERO,
        )  # fmt: skip
        raw = next_raw
        if FORMAT == "int3":
            third = next_third
    y = tl.trans(tl.sum(tl.sum(total, 3), 0))
    if scale is not None and GROUP == 0:
        y *= tl.load(scale + rows).to(tl.float32)[:, None]
    if rms is not None:
        y *= rms[None, :]
    deliver(
        y, bias, residual, ldr, out, ldo, work, work_width, tl.program_id(1), token, tokens, rows, column,
        n_out, factor, softcap, GLU, ACTIVATION, SOFTCAP,
    )  # fmt: skip
    if NEXT_GROUP:
        hand_over(
            out, ldo, tl.program_id(0), token, tokens, n_out, next_q, next_scale, next_floats, next_squares,
            next_weight, counters, ROWS // 2 if GLU else ROWS, NEXT_GROUP,
        )  # fmt: skip
