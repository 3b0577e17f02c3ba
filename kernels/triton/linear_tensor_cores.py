"""Products for 5 rows and more: weights become 16-bit floats in registers and go through the tensor cores.

The product is computed transposed, [rows of the weight] x [tokens], so that the weights are the first
operand: that one may come from registers on every tensor core, the second is activations as they lie in
memory, and a tile of 16 tokens wastes nothing, where 16 as the first dimension would be padded to 64 on
Hopper.

A weight is scaled in f32 and then rounded to the type that is multiplied (bf16 or f16), except where a row
has one scale, which multiplies the sum. f32 weights multiply in f32 (no tf32). With `x_scale`, fp8 weights
multiply activations that `quantize_fp8_kernel` rounded to e4m3 by rows: twice the tensor core rate, at the
cost of activations of 4 significant bits, and hence not the default.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dequantize import first_column, load_chunks, load_third_bits, part_weights
from .epilogue import deliver, weight_rows


@triton.jit
def tile_weights(
    raw, third, magic, inside, scale, zero, groups, rows, chunk, dtype: tl.constexpr, part: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """One part of the chunks as the first operand of a product: [B, C * WIDTH] of dtype."""
    if FORMAT == "fp8" and dtype == tl.float8e4nv:
        w = raw.to(tl.float8e4nv, bitcast=True)
    else:
        w = part_weights(
            raw, third, magic, inside, scale, zero, groups, rows, chunk, part, FORMAT, GROUP, ZERO
        ).to(dtype)
    return tl.reshape(w, [w.shape[0], w.shape[1] * w.shape[2]])


@triton.jit
def tile_activations(
    x, ldx, token, tokens, first, k, dtype: tl.constexpr, part: tl.constexpr, FORMAT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """What that part multiplies, the second operand: [CHUNKS * WIDTH, T], 0 beyond k and beyond tokens."""
    index = tl.arange(0, CHUNKS * WIDTH)
    column = first_column(first + index // WIDTH, part, FORMAT) + index % WIDTH
    mask = (column < k)[None, :] & (token < tokens)[:, None]
    values = tl.load(x + token.to(tl.int64)[:, None] * ldx + column[None, :], mask, 0)
    if dtype == tl.float8e4nv:
        return tl.trans(values.to(dtype, bitcast=True))
    else:
        return tl.trans(values.to(dtype))


@triton.jit
def tensor_core_kernel(
    x, ldx, x_scale, data, stride, scale, zero, groups, magic, bias, residual, ldr, out, ldo, work,
    work_width, tokens, n_out, k, chunks, split_chunks, factor, softcap,
    FORMAT: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, RAGGED: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, GLU: tl.constexpr, ACTIVATION: tl.constexpr,
    SOFTCAP: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """TOKENS rows of out, or with `work` the sums of split program_id(2) alone, at their place.

    program_id(0) counts tiles of tokens: those that run together share the weights they read.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    rows, column = weight_rows(tl.program_id(1), n_out, GLU, ROWS)
    rows = rows.to(tl.int64)
    rows3, inside = rows[:, None, None], tl.arange(0, WIDTH)[None, None, :]
    first = tl.program_id(2) * split_chunks
    y = tl.zeros([ROWS, TOKENS], tl.float32)
    for at in range(first, tl.minimum(first + split_chunks, chunks), CHUNKS):
        chunk = tl.minimum(at + tl.arange(0, CHUNKS), chunks - 1)[None, :, None]
        raw = load_chunks(data, stride, rows3, chunk, inside, k, FORMAT, RAGGED)
        third = load_third_bits(data, stride, rows3, chunk) if FORMAT == "int3" else None
        for part in tl.static_range(PARTS):
            w = tile_weights(
                raw, third, magic, inside, scale, zero, groups, rows3, chunk, DTYPE, part, FORMAT, GROUP, ZERO
            )
            x_part = tile_activations(x, ldx, token, tokens, at, k, DTYPE, part, FORMAT, WIDTH, CHUNKS)
            y = tl.dot(w, x_part, y, input_precision="ieee")
    if scale is not None and GROUP == 0:
        y *= tl.load(scale + rows).to(tl.float32)[:, None]
    if x_scale is not None:
        y *= tl.load(x_scale + token, token < tokens, 0.0)[None, :]
    deliver(
        y, bias, residual, ldr, out, ldo, work, work_width, tl.program_id(2), token, tokens, rows, column,
        n_out, factor, softcap, GLU, ACTIVATION, SOFTCAP,
    )  # fmt: skip


@triton.jit
def quantize_fp8_kernel(x, ldx, out, x_scale, k, BLOCK: tl.constexpr):
    """Each row of x to e4m3, its largest magnitude to 448: out [tokens, k] as bytes, x_scale [tokens] f32."""
    token = tl.program_id(0).to(tl.int64)
    most = tl.zeros([BLOCK], tl.float32)
    for at in range(0, k, BLOCK):
        column = at + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.abs(tl.load(x + token * ldx + column, column < k, 0.0).to(tl.float32)))
    scale = tl.maximum(tl.max(most, 0), 1e-30) / 448
    tl.store(x_scale + token, scale)
    for at in range(0, k, BLOCK):
        column = at + tl.arange(0, BLOCK)
        values = tl.load(x + token * ldx + column, column < k, 0.0).to(tl.float32) / scale
        values = tl.minimum(tl.maximum(values, -448.0), 448.0).to(tl.float8e4nv)
        tl.store(out + token * k + column, values.to(tl.uint8, bitcast=True), column < k)
