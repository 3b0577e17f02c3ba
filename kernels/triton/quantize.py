"""Activations as int8 with a scale for each group of columns, as integer weights multiply them.

    s = max |x| / 127 of the group,  q = round(x 127 / max |x|) to nearest even

which is what the CPU's kernels do. Rows of q are padded with zeros to whole blocks of 64 columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .matrix import padded
from .overlap import let_next_begin, options, wait_for_inputs

BLOCK = 1024  # columns of a program
ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float near it has no bits behind the point


@dataclass(frozen=True)
class Quantized:
    """q: [T, columns] int8, the padded columns; scale: [T, ceil(k / group)] f32."""

    q: Tensor
    scale: Tensor
    group: int


@triton.jit
def largest_magnitude(x):
    """max |x| of each row of x [R, N] f32; no number where one is none: as integers its bits are the most."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)


@triton.jit
def rounded_groups(groups):
    """groups [G, GROUP] f32 as whole numbers from -127 to 127, and their scales [G]."""
    most = largest_magnitude(groups)
    step = tl.where(most > 0, 127.0 / most, 0.0)
    rounded = (groups * step[:, None] + ROUNDS) - ROUNDS
    rounded = tl.where((most < float("inf"))[:, None], rounded, 0.0)
    return rounded, most / 127.0 + most * 0.0  # what is no number stays so


@triton.jit
def store_groups(groups, group, token, there, q, scale, k):
    """groups [A, GROUP] f32, zero beyond k: those numbered ``group`` [A] of rows ``token`` [A] int64, where
    ``there`` [A]."""
    GROUP: tl.constexpr = groups.shape[1]
    rounded, scales = rounded_groups(groups)
    columns = (k + 63) // 64 * 64
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    to = q + token[:, None] * columns + column
    tl.store(to, rounded.to(tl.int8), there[:, None] & (column < columns))
    count = (k + GROUP - 1) // GROUP
    tl.store(scale + token * count + group, scales, there & (group < count))


@triton.jit
def store_quantized(value, first, q, scale, token, k, GROUP: tl.constexpr):
    """value [BLOCK] f32, 0 beyond k, of row ``token`` from the column ``first`` on, which begins a group."""
    count: tl.constexpr = value.shape[0] // GROUP
    group = first // GROUP + tl.arange(0, count)
    groups = tl.reshape(value, [count, GROUP])
    store_groups(groups, group, token.to(tl.int64) + group * 0, group >= 0, q, scale, k)


@triton.jit
def store_quantized_pieces(
    value, token, column, there, q, scale, k, WIDTH: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """value [H, BLOCK] f32: WIDTH columns each, whole groups, of rows ``token`` [H] from ``column`` [H] on;
    k, the columns of a row, is a multiple of 64."""
    pieces: tl.constexpr = value.shape[0]
    groups: tl.constexpr = value.shape[1] // GROUP
    rounded, scales = rounded_groups(tl.reshape(value, [pieces * groups, GROUP]))
    to = token.to(tl.int64) * k + column
    inside = tl.arange(0, groups * GROUP)[None, :]
    bytes = tl.reshape(rounded.to(tl.int8), [pieces, groups * GROUP])
    tl.store(q + to[:, None] + inside, bytes, there[:, None] & (inside < WIDTH))
    group = tl.arange(0, groups)[None, :]
    scales = tl.reshape(scales, [pieces, groups])
    tl.store(scale + (to // GROUP)[:, None] + group, scales, there[:, None] & (group * GROUP < WIDTH))


@triton.jit
def quantize_kernel(
    x, ldx, order, q, scale, k, GROUP: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """A part of a row; with ``order`` of x[:, order]."""
    let_next_begin(OVERLAP)
    token = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    column = first + tl.arange(0, BLOCK)
    source = column
    if order is not None:
        source = tl.load(order + column, column < k, 0)
    wait_for_inputs(OVERLAP)
    value = tl.load(x + token * ldx + source, column < k, 0.0).to(tl.float32)
    store_quantized(value, first, q, scale, token, k, GROUP)


def quantize(x: Tensor, to: Quantized, order: Tensor | None = None) -> None:
    """x [T, k] of any float type, rows any stride apart; order: [k] i32, a permutation of the columns."""
    tokens, k = x.shape
    block = min(BLOCK, max(128, triton.next_power_of_2(k)))
    quantize_kernel[(triton.cdiv(padded(k), block), tokens)](
        x, x.stride(0), order, to.q, to.scale, k, GROUP=to.group, BLOCK=block, num_warps=4, **options()
    )


def room(tokens: int, k: int, group: int) -> tuple[tuple[tuple[int, int], torch.dtype], ...]:
    """Shapes and types of a Quantized's tensors."""
    return ((tokens, padded(k)), torch.int8), ((tokens, -(-k // group)), torch.float32)
