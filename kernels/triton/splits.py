"""A context in splits that programs of their own go through, and what these leave, put together again.

A split's length depends on the row's own position alone. Each split leaves m, l and acc of its online softmax
in base 2; they are added up in the order of the context, whichever split was last:

    M = max m,  total = sum 2^(m - M) l,  out = sum 2^(m - M) acc / total
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .append import rounded_product
from .overlap import let_next_begin, options, wait_for_inputs
from .quantize import Quantized, store_quantized_pieces

LOG2E = tl.constexpr(math.log2(math.e))
SPLIT = tl.constexpr(256)  # positions of the shortest split
FLOATS_OF_THREAD = 32


@triton.jit
def split_length(position, WINDOW: tl.constexpr, SPLITS: tl.constexpr):
    """Positions of a split for a row at ``position``: SPLIT, doubled until SPLITS of them hold what it sees.

    A window may begin and end within splits, so two of them are kept for its ends.
    """
    most: tl.constexpr = SPLITS - 2 if WINDOW else SPLITS
    seen = position + 1
    if WINDOW:
        seen = tl.minimum(seen, WINDOW)
    length = tl.full((), SPLIT, tl.int32)
    while length * most < seen:
        length *= 2
    return length


@triton.jit
def oldest_seen(position, WINDOW: tl.constexpr):
    """The first position that a row at ``position`` sees."""
    return tl.maximum(position - WINDOW + 1, 0) if WINDOW else position * 0


@triton.jit
def splits_of(position, WINDOW: tl.constexpr, SPLITS: tl.constexpr):
    """Of a row at ``position``: the length of splits, the first one that it sees, and how many it sees."""
    length = split_length(position, WINDOW, SPLITS)
    first = oldest_seen(position, WINDOW) // length
    return length, first, position // length - first + 1


@triton.jit
def _sink(sinks, head, there):
    """The sink's logit of each ``head`` [H] in base 2."""
    return rounded_product(tl.load(sinks + head, there, 0.0).to(tl.float32), LOG2E)


@triton.jit
def largest_with_sink(largest, sinks, head, there):
    """``largest`` [H], or the sink's logit where that is more."""
    if sinks is not None:
        largest = tl.maximum(largest, _sink(sinks, head, there))
    return largest


@triton.jit
def deliver_heads(
    total, acc, largest, sinks, token, head, there, out, out_stride, q, q_scale,
    HEADS: tl.constexpr, V_DIM: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes acc [H, V] / total [H], the sink counted, as ``head`` [H] of rows ``token`` [H]; with GROUP as
    int8 too."""
    if sinks is not None:
        total += tl.exp2(_sink(sinks, head, there) - largest)
    value = acc / total[:, None]
    column = tl.arange(0, acc.shape[1])[None, :]
    to = token.to(tl.int64)[:, None] * out_stride + head[:, None] * V_DIM + column
    tl.store(out + to, value.to(out.dtype.element_ty), there[:, None] & (column < V_DIM))
    if GROUP:
        store_quantized_pieces(value, token, head * V_DIM, there, q, q_scale, HEADS * V_DIM, V_DIM, GROUP)


@triton.jit
def combine_heads(
    m_parts, l_parts, acc_parts, sinks, position, token, head, there, out, out_stride, q, q_scale,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Adds up what splits left of ``head`` [H] of the row ``token``, past L1: other programs wrote it."""
    length, first, count = splits_of(position, WINDOW, SPLITS)
    at = token.to(tl.int64) * SPLITS
    each = tl.arange(0, SPLITS)[:, None]
    all_parts = (at + (first + each) % SPLITS) * HEADS + head[None, :]
    known = (each < count) & there[None, :]
    m = tl.load(m_parts + all_parts, known, float("-inf"), cache_modifier=".cg")
    l = tl.load(l_parts + all_parts, known, 0.0, cache_modifier=".cg")
    largest = largest_with_sink(tl.max(m, 0), sinks, head, there)
    total = tl.sum(rounded_product(tl.exp2(m - largest[None, :]), l), 0)
    column = tl.arange(0, V_BLOCK)[None, None, :]
    acc = tl.zeros((head.shape[0], V_BLOCK), tl.float32)
    for start in range(0, count, STEP):
        some = start + tl.arange(0, STEP)[:, None]
        where = (at + (first + some) % SPLITS) * HEADS + head[None, :]
        inside = (some < count) & there[None, :]
        parts = tl.load(
            acc_parts + where[:, :, None] * V_DIM + column, inside[:, :, None] & (column < V_DIM), 0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        m_of_some = tl.load(m_parts + where, inside, float("-inf"), cache_modifier=".cg")
        weight = tl.exp2(m_of_some - largest[None, :])
        acc += tl.sum(rounded_product(parts, weight[:, :, None]), 0)
    deliver_heads(
        total, acc, largest, sinks, token + head * 0, head, there, out, out_stride, q, q_scale, HEADS, V_DIM,
        GROUP,
    )  # fmt: skip


@triton.jit
def _combine_kernel(
    m_parts, l_parts, acc_parts, sinks, positions, out, out_stride, q, q_scale,
    KV_HEADS: tl.constexpr, HEADS_EACH: tl.constexpr, H: tl.constexpr, SPLITS: tl.constexpr,
    STEP: tl.constexpr, WINDOW: tl.constexpr, V_DIM: tl.constexpr, V_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The heads of one row that share a kv head."""
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    token = tl.program_id(0)
    of_group = tl.arange(0, H)
    combine_heads(
        m_parts, l_parts, acc_parts, sinks, tl.load(positions + token), token,
        tl.program_id(1) * HEADS_EACH + of_group, of_group < HEADS_EACH, out, out_stride, q, q_scale,
        KV_HEADS * HEADS_EACH, SPLITS, STEP, WINDOW, V_DIM, V_BLOCK, GROUP,
    )  # fmt: skip


@dataclass(frozen=True)
class Partials:
    """What splits leave to be combined, f32: m and l [T, splits, heads], acc [T, splits, heads, v_dim].

    arrived: [T, kv_heads] i32, how many of a row's splits have left theirs; 0 between launches.
    """

    m: Tensor
    l: Tensor
    acc: Tensor
    arrived: Tensor


def partials_size(rows: int, heads: int, splits: int, v_dim: int) -> int:
    """Floats that splits leave to be combined; none where there is one."""
    return rows * heads * splits * (2 + v_dim) if splits > 1 else 0


def cut_partials(
    space: Tensor, arrived: Tensor, rows: int, heads: int, kv_heads: int, splits: int, v_dim: int
) -> Partials:
    """Room for the partials of a batch of ``rows`` rows, out of ``space`` [partials_size() or more] f32 and
    ``arrived`` [rows * kv_heads or more] i32, which is zero."""
    count = rows * heads * splits
    m, l, acc = space[: count * (2 + v_dim)].split([count, count, count * v_dim])
    shape = (rows, splits, heads)
    counters = arrived[: rows * kv_heads].view(rows, kv_heads)
    return Partials(m.view(shape), l.view(shape), acc.view(*shape, v_dim), counters)


def allocate_partials(
    rows: int, heads: int, kv_heads: int, splits: int, v_dim: int, device: torch.device | str = "cuda"
) -> Partials:
    """The same in memory of its own."""
    space = torch.empty(rows * heads * splits * (2 + v_dim), device=device)
    arrived = torch.zeros(rows * kv_heads, dtype=torch.int32, device=device)
    return cut_partials(space, arrived, rows, heads, kv_heads, splits, v_dim)


def combine_step(heads: int, splits: int, v_block: int, warps: int) -> int:
    """Splits whose partials of ``heads`` heads a program has under way at once."""
    fit = FLOATS_OF_THREAD * 32 * warps // (triton.next_power_of_2(heads) * v_block)
    return max(1, min(fit, splits, 16))


def combine(
    partials: Partials, positions: Tensor, out: Tensor, window: int, v_block: int, warps: int,
    sinks: Tensor | None = None, quantized: Quantized | None = None,
) -> None:  # fmt: skip
    """The result of each row of positions [T] i32 out of what its splits left, as `attend` gives it;
    warps: of a program, on which the order of sums depends."""
    (splits, heads, v_dim), kv_heads = partials.acc.shape[1:], partials.arrived.shape[1]
    each = heads // kv_heads
    to = (None, None) if quantized is None else (quantized.q, quantized.scale)
    _combine_kernel[(len(positions), kv_heads)](
        partials.m, partials.l, partials.acc, sinks, positions, out, out.stride(0), *to,
        KV_HEADS=kv_heads, HEADS_EACH=each, H=triton.next_power_of_2(each), SPLITS=splits,
        STEP=combine_step(each, splits, v_block, warps), WINDOW=window, V_DIM=v_dim, V_BLOCK=v_block,
        GROUP=quantized.group if quantized else 0, num_warps=warps, **options(),
    )  # fmt: skip
