"""What follows a product, for all kernels that end one: softcap(scale * activation(y) [* up]) + residual."""

from __future__ import annotations

import triton
import triton.language as tl

from .handover import prepare
from .overlap import let_next_begin, wait_for_inputs


@triton.jit
def tanh(x):
    """By one exponential; an absolute error of 1e-7, no overflow."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """One of kernels.reference.linear.ACTIVATIONS."""
    if ACTIVATION == "silu":
        return x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    else:
        return x


@triton.jit
def finish(y, up, factor, softcap, ACTIVATION: tl.constexpr, SOFTCAP: tl.constexpr):
    """y and up (None without a gate) are sums with their biases."""
    y = activate(y, ACTIVATION)
    if up is not None:
        y *= up
    y *= factor
    return softcap * tanh(y / softcap) if SOFTCAP else y


@triton.jit
def write(
    y, out, ldo, residual, ldr, token, column, mask, factor, softcap,
    GLU: tl.constexpr, ACTIVATION: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Finishes sums y [B, T] and stores them at out[token, column]; token [T], column and mask [B], [B, T].

    With GLU the first half of y's rows are gates and the second their up projections, and column and mask
    have half as many rows. The residual may be out itself.
    """
    if GLU:
        halves = tl.reshape(y, [2, y.shape[0] // 2, y.shape[1]])
        y, up = tl.split(tl.permute(halves, [1, 2, 0]))
        y = finish(y, up, factor, softcap, ACTIVATION, SOFTCAP)
    else:
        y = finish(y, None, factor, softcap, ACTIVATION, SOFTCAP)
    at = token.to(tl.int64)[None, :]
    if residual is not None:
        y += tl.load(residual + at * ldr + column[:, None], mask, 0.0).to(tl.float32)
    tl.store(out + at * ldo + column[:, None], y.to(out.dtype.element_ty), mask)


@triton.jit
def weight_rows(tile, n_out, GLU: tl.constexpr, ROWS: tl.constexpr):
    """Which rows of the weight tile number `tile` multiplies, [ROWS], and the output columns that it ends in.

    With GLU half of the rows are gates and half their up projections. Columns beyond n_out are not clamped.
    """
    row = tl.arange(0, ROWS)
    if GLU:
        half: tl.constexpr = ROWS // 2
        rows = tl.minimum(tile * half + row % half, n_out - 1) + row // half * n_out
        column = tile * half + tl.arange(0, half)
    else:
        column = tile * ROWS + row
        rows = tl.minimum(column, n_out - 1)
    return rows, column


@triton.jit
def deliver(
    y, bias, residual, ldr, out, ldo, work, work_width, split, token, tokens, rows, column, n_out, factor,
    softcap, GLU: tl.constexpr, ACTIVATION: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Where a kernel's sums y [B, T] go: finished to out, or with `work` as they are to ``split``'s place."""
    mask = (column < n_out)[:, None] & (token < tokens)[None, :]
    if work is not None:
        place = (split * tokens + token).to(tl.int64)[None, :] * work_width
        tl.store(work + place + column[:, None], y, mask)
    else:
        if bias is not None:
            y += tl.load(bias + rows).to(tl.float32)[:, None]
        write(y, out, ldo, residual, ldr, token, column, mask, factor, softcap, GLU, ACTIVATION, SOFTCAP)


@triton.jit
def _summed(work, splits, width, bias, token, tokens, row, mask):
    """Partial products of weight rows ``row`` [BLOCK] for a token, in the order of splits, and the bias."""
    y = tl.zeros(row.shape, tl.float32)
    for split in range(splits):
        at = (split * tokens + token).to(tl.int64) * width
        y += tl.load(work + at + row, mask, 0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + row, mask, 0.0).to(tl.float32)
    return y


@triton.jit
def combine_kernel(
    work, splits, width, bias, residual, ldr, out, ldo, tokens, n_out, factor, softcap,
    next_q, next_scale, next_floats, next_squares, next_weight, counters,
    GLU: tl.constexpr, ACTIVATION: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    NEXT_GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sums partial products work [splits, tokens, width], then the epilogue; BLOCK: columns of out.

    A program has whole groups of what the next product is handed over, so nothing needs to be counted.
    """
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n_out
    y, up = _summed(work, splits, width, bias, token, tokens, column, mask), None
    if GLU:
        up = _summed(work, splits, width, bias, token, tokens, n_out + column, mask)
    y = finish(y, up, factor, softcap, ACTIVATION, SOFTCAP)
    at = token.to(tl.int64)
    if residual is not None:
        y += tl.load(residual + at * ldr + column, mask, 0.0).to(tl.float32)
    tl.store(out + at * ldo + column, y.to(out.dtype.element_ty), mask)
    if NEXT_GROUP:
        count: tl.constexpr = BLOCK // NEXT_GROUP
        group = tl.program_id(0) * count + tl.arange(0, count)
        prepare(
            tl.reshape(tl.where(mask, y, 0.0), [count, NEXT_GROUP]), token + group * 0, group,
            group * NEXT_GROUP < n_out, n_out, next_q, next_scale, next_floats, next_squares, next_weight,
            NEXT_GROUP,
        )  # fmt: skip
