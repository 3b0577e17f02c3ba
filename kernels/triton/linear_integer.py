"""Products of integer weights with int8 activations, for few rows: four at a time, by dp4a.

    y[t, n] = sum over groups g of sw[n, g] sx[t, g] (sum_k q[n, k] x[t, k] - z[n, g] sum_k x[t, k])

The inner sums are of integers and exact. A program takes ROWS rows of the weight and walks their columns in
steps of QUADS quads: 16 stored bytes of a row, which a thread loads at once. A quad has PARTS parts of 16
consecutive columns (`part_column`); where these lie in its words, a shift and a mask make four signed bytes
of them, which stand for UNIT times the weight:

    int8  the words as they are                        UNIT 1
    int4  nibble part of each byte, moved up           UNIT 16
    int2  crumb part of each byte, moved up            UNIT 64
    int3  as int2, a third bit above each: 8 bytes behind the quad's 16 have those of its 64 columns   UNIT 32

Here a weight takes less than one instruction, where the product in floats takes six and is bound by them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dequantize import load_zeros
from .epilogue import deliver, weight_rows
from .handover import hand_over, row_factor
from .matrix import ZEROS, Matrix
from .overlap import let_next_begin, wait_for_inputs
from .target import INTERPRETED

UNITS = {"int8": 1, "int4": 16, "int3": 32, "int2": 64}
SIGNS = tl.constexpr(0x80808080 - 2**32)  # of four bytes: turns a number above zero point into a signed one
NIBBLES = tl.constexpr(0xF0F0F0F0 - 2**32)
CRUMBS = tl.constexpr(0xC0C0C0C0 - 2**32)
ONES = tl.constexpr(0x01010101)


@triton.jit
def dot4(a, b, total):
    """total + the sum of four products of signed bytes, i32."""
    if INTERPRETED:
        for byte in tl.static_range(4):
            total += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def part_column(quad, part: tl.constexpr, FORMAT: tl.constexpr):
    """The first of the 16 columns of a part of a quad."""
    if FORMAT == "int8":
        return quad * 16
    elif FORMAT == "int4":
        return quad // 2 * 64 + quad % 2 * 16 + 32 * part
    else:
        return quad * 64 + 16 * part


@triton.jit
def load_quads(words, stride, rows, quad, inside, quads, FORMAT: tl.constexpr):
    """Four words of each row, 0 beyond the last quad; stride is that of a row in words."""
    step: tl.constexpr = 6 if FORMAT == "int3" else 4
    at = words + rows * stride + quad * step + inside
    return tl.load(at, quad < quads, 0, eviction_policy="evict_first")


@triton.jit
def load_third_bits(words, stride, rows, quad, quads):
    """Of int3: bit c is that of column c of the quad's 64."""
    pairs = words.to(tl.pointer_type(tl.int64), bitcast=True)
    at = pairs + rows * (stride // 2) + quad * 3 + 2
    return tl.load(at, quad < quads, 0, eviction_policy="evict_first")


@triton.jit
def signed_bytes(raw, third, inside, part: tl.constexpr, FORMAT: tl.constexpr):
    """UNIT times (q - the zero point of symmetric weights) of a part's 4 columns for each word."""
    if FORMAT == "int8":
        return raw
    elif FORMAT == "int4":
        if part == 0:
            raw = raw << 4
        return (raw & NIBBLES) ^ SIGNS
    elif FORMAT == "int2":
        return ((raw << (6 - 2 * part)) & CRUMBS) ^ SIGNS
    else:
        low = (raw >> 1 if part == 3 else raw << (5 - 2 * part)) & 0x60606060
        bits = (third >> (16 * part + 4 * inside)).to(tl.int32) & 15
        spread = bits * 0x00204081 & ONES  # bit i to byte i
        return low | ((spread << 7) ^ SIGNS)


@triton.jit
def quad_products(
    raw, third, xq, ldx, xs, x_groups, scale, zero, groups, rows, quad, token, tokens, inside, quads,
    FORMAT: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr,
    UNIT: tl.constexpr, MIDDLE: tl.constexpr,
):  # fmt: skip
    """The products of quads, f32 [Q, T, B, 1], but for the row's scale with GROUP 0; quad [Q, 1, 1, 1], token
    [1, T, 1, 1], rows [1, 1, B, 1], inside [1, 1, 1, 4]."""
    halves: tl.constexpr = 2 if X_GROUP == 32 and PARTS > 1 else 1  # the parts of a half lie in one group
    parts: tl.constexpr = PARTS // halves
    there = (quad < quads) & (token < tokens)
    products = tl.zeros([quad.shape[0], token.shape[1], rows.shape[2], 1], tl.float32)
    for half in tl.static_range(halves):
        dots = tl.zeros([quad.shape[0], token.shape[1], rows.shape[2], 4], tl.int32)
        sums = tl.zeros([quad.shape[0], token.shape[1], 1, 4], tl.int32)
        for part in tl.static_range(parts):
            at = part_column(quad, half * parts + part, FORMAT) // 4 + inside
            x = tl.load(xq + token * ldx + at, there, 0)
            dots = dot4(signed_bytes(raw, third, inside, half * parts + part, FORMAT), x, dots)
            if zero is not None:
                sums = dot4(x, x * 0 + ONES, sums)
        column = part_column(quad, half * parts, FORMAT)
        dot = tl.sum(dots, 3, keep_dims=True).to(tl.float32)
        x_group = tl.minimum(column // X_GROUP, x_groups - 1)  # beyond k there are zeros
        unit = tl.load(xs + token * x_groups + x_group, there, 0.0)
        group = quad * 0 if GROUP == 0 else tl.minimum(column // GROUP, groups - 1)
        if zero is not None:
            above = UNIT * (load_zeros(zero, groups, rows, group, FORMAT) - MIDDLE)
            dot -= above * tl.sum(sums, 3, keep_dims=True).to(tl.float32)
        if GROUP != 0:
            unit = unit * tl.load(scale + rows * groups + group).to(tl.float32)
        products += unit * dot
    return products


@triton.jit
def integer_kernel(
    xq, ldx, xs, x_groups, words, stride, scale, zero, groups, bias, residual, ldr, out, ldo, work,
    work_width, tokens, n_out, quads, split_quads, factor, softcap, squares, square_count, eps, next_q,
    next_scale, next_floats, next_squares, next_weight, counters,
    FORMAT: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr,
    UNIT: tl.constexpr, MIDDLE: tl.constexpr, GLU: tl.constexpr, ACTIVATION: tl.constexpr,
    SOFTCAP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
    SQUARES: tl.constexpr, NEXT_GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """TOKENS rows of out, or with `work` the sums of split program_id(1), at their place.

    The next step's weights are asked for before a step's are multiplied, the first ones before x is there.
    """
    let_next_begin(OVERLAP)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    rows, column = weight_rows(tl.program_id(0), n_out, GLU, ROWS)
    rows = rows.to(tl.int64)
    rows4, token4 = rows[None, None, :, None], token[None, :, None, None]
    inside = tl.arange(0, 4)[None, None, None, :]
    first = tl.program_id(1) * split_quads
    end = tl.minimum(first + split_quads, quads)
    quad = (first + tl.arange(0, QUADS))[:, None, None, None]
    raw = load_quads(words, stride, rows4, quad, inside, end, FORMAT)
    third = None
    if FORMAT == "int3":
        third = load_third_bits(words, stride, rows4, quad, end)
    wait_for_inputs(OVERLAP)
    rms = None
    if SQUARES:
        rms = row_factor(squares, square_count, eps, token, tokens, SQUARES)
    total = tl.zeros([QUADS, TOKENS, ROWS, 1], tl.float32)
    for at in range(first, end, QUADS):
        quad = (at + tl.arange(0, QUADS))[:, None, None, None]
        next_raw = load_quads(words, stride, rows4, quad + QUADS, inside, end, FORMAT)
        if FORMAT == "int3":
            next_third = load_third_bits(words, stride, rows4, quad + QUADS, end)
        total += quad_products(
            raw, third, xq, ldx, xs, x_groups, scale, zero, groups, rows4, quad, token4, tokens, inside, end,
            FORMAT, PARTS, GROUP, X_GROUP, UNIT, MIDDLE,
        )  # fmt: skip
        raw = next_raw
        if FORMAT == "int3":
            third = next_third
    y = tl.trans(tl.sum(tl.sum(total, 3), 0)) * (1.0 / UNIT)
    if GROUP == 0:
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


@triton.jit
def nibbles(raw, part: tl.constexpr):
    """16 (q - 8) of one nibble of each byte, int8; four bytes at a time."""
    if INTERPRETED:
        moved = raw << 4 if part == 0 else raw
        return ((moved & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
    elif part == 0:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0xF0F0F0F0, 0x80808080, 0x6A; }",
            "=r,r", [raw], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0xF0F0F0F0, 0x80808080, 0x6A;",
            "=r,r", [raw], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def integer_tile_kernel(
    xq, ldx, xs, x_groups, data, stride, scale, zero, groups, bias, residual, ldr, out, ldo, work,
    work_width, tokens, n_out, split_groups, factor, softcap, squares, square_count, eps, next_q, next_scale,
    next_floats, next_squares, next_weight, counters,
    FORMAT: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr,
    UNIT: tl.constexpr, MIDDLE: tl.constexpr, GLU: tl.constexpr, ACTIVATION: tl.constexpr,
    SOFTCAP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, SQUARES: tl.constexpr,
    NEXT_GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The same for more rows on the tensor cores, an activation group after the other; int8 and int4 alone.

    Groups of 32 columns of int4, which are halves of what is stored together, are not for this one.
    """
    let_next_begin(OVERLAP)
    width: tl.constexpr = X_GROUP // PARTS  # bytes of a row's group
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    rows, column = weight_rows(tl.program_id(0), n_out, GLU, ROWS)
    rows = rows.to(tl.int64)
    byte = tl.arange(0, width)
    first_of = byte if PARTS == 1 else byte // 32 * 64 + byte % 32
    first = tl.program_id(1) * split_groups
    end = tl.minimum(first + split_groups, x_groups)
    stored = (data + rows * stride)[:, None] + byte[None, :]
    given = xq + token.to(tl.int64)[None, :] * ldx + first_of[:, None]
    there = (token < tokens)[None, :]
    wait_for_inputs(OVERLAP)
    rms = None
    if SQUARES:
        rms = row_factor(squares, square_count, eps, token, tokens, SQUARES)
    y = tl.zeros([ROWS, TOKENS], tl.float32)
    for group in range(first, end):
        # bytes and activations are padded to blocks of 64 columns, which a last group may pass
        inside = (group * X_GROUP + first_of < ldx)[:, None]
        raw = tl.load(stored + group * width, (group * width + byte < stride)[None, :], 0)
        dots = tl.zeros([ROWS, TOKENS], tl.int32)
        x_sums = tl.zeros([TOKENS], tl.int32)
        for part in tl.static_range(PARTS):
            w = raw if PARTS == 1 else nibbles(raw, part)
            x = tl.load(given + group * X_GROUP + 32 * part, inside & there, 0)
            dots = tl.dot(w, x, dots, out_dtype=tl.int32)
            if zero is not None:
                x_sums += tl.sum(x.to(tl.int32), 0)
        sums = dots.to(tl.float32)
        of = group * 0 if GROUP == 0 else tl.minimum(group * X_GROUP // GROUP, groups - 1)
        if zero is not None:
            above = UNIT * (load_zeros(zero, groups, rows, of, FORMAT) - MIDDLE)
            sums -= above[:, None] * x_sums.to(tl.float32)[None, :]
        sums *= tl.load(xs + token * x_groups + group, token < tokens, 0.0)[None, :]
        if GROUP != 0:
            sums *= tl.load(scale + rows * groups + of).to(tl.float32)[:, None]
        y += sums
    y *= 1.0 / UNIT
    if GROUP == 0:
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


def constants(matrix: Matrix) -> dict[str, object]:
    """The arguments of the kernel that follow from a matrix."""
    return {
        "FORMAT": matrix.format, "PARTS": matrix.parts, "GROUP": matrix.group,
        "UNIT": UNITS[matrix.format], "MIDDLE": ZEROS.get(matrix.format, 0),
    }  # fmt: skip
