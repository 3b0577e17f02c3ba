"""Norm, rope and Hadamard rotation of heads, and the append of keys and values to the cache, in one kernel.

One program takes one head of one row: a query goes to the caller's buffer, a key or a value is rounded to the
cache's format and written at (slot, head, position). Rounding is the CPU's (kernels/cpu/cache.inc): int8 and
int4 keep the best of 16 grids by squared error, fp8 scales the row's largest number to 448.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .cache import CacheRows, LayerCache, data_columns, scale_planes
from .overlap import let_next_begin, options, wait_for_inputs

TINY = tl.constexpr(1e-35)  # the inverse of less would overflow; such rows count as zero or constant


@triton.jit
def _rope_kernel(positions, inv_freq, cos, sin, scale, HALF: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    position = tl.load(positions + row).to(tl.float32)
    angle = position * tl.load(inv_freq + at, at < HALF, 0.0)
    tl.store(cos + row * HALF + at, tl.cos(angle) * scale, at < HALF)
    tl.store(sin + row * HALF + at, tl.sin(angle) * scale, at < HALF)


def rope_tables(positions: Tensor, inv_freq: Tensor, scale: float, cos: Tensor, sin: Tensor) -> None:
    """cos and sin [T, dims / 2] f32 of positions [T] i32 times inv_freq [dims / 2] f32, times ``scale``.

    Angles are rounded to f32 as on the CPU, and reduced exactly, so that position 131,072 is as good as any.
    """
    half = inv_freq.shape[0]
    assert cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape == (len(positions), half)
    _rope_kernel[(len(positions),)](
        positions, inv_freq, cos, sin, scale, HALF=half, BLOCK=triton.next_power_of_2(half), num_warps=1
    )


@triton.jit
def _turn(x, cos, sin, DIMS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Rope of the first DIMS columns (arXiv 2104.09864, eq. 34); cos, sin: [DIMS / 2] of this row."""
    at = tl.arange(0, BLOCK)
    if INTERLEAVED:
        pair, second, partner = at // 2, at % 2, at ^ 1
    else:
        second = (at >= DIMS // 2).to(tl.int32)
        pair = at - second * (DIMS // 2)
        partner = tl.where(second != 0, pair, at + DIMS // 2)
    turns = at < DIMS
    other = tl.gather(x, tl.where(turns, partner, at), 0)
    c = tl.load(cos + pair, turns, 1.0)
    s = tl.load(sin + pair, turns, 0.0)
    return x * c + tl.where(second != 0, other, -other) * s


@triton.jit
def _hadamard(x, PASSES: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Each 2^PASSES columns times the Walsh-Hadamard matrix: butterflies, then the orthonormal factor."""
    at = tl.arange(0, BLOCK)
    for i in tl.static_range(PASSES):
        other = tl.gather(x, at ^ (1 << i), 0)
        x = tl.where((at >> i & 1) != 0, other - x, x + other)
    return x * FACTOR


@triton.jit
def _stored(value, HALF: tl.constexpr):
    if HALF:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    return value


@triton.jit
def _on_grid(x, step, offset, LEVELS: tl.constexpr):
    """The nearest point of each grid: adding 1.5 * 2^23 leaves no room for a fraction."""
    q = tl.fma(x - offset[:, None], (1.0 / step)[:, None], 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(q, 0.0), LEVELS)


@triton.jit
def _best_grid(x, inside, LEVELS: tl.constexpr, NARROWEST: tl.constexpr, HALF: tl.constexpr):
    """q [G, W] from 0 to LEVELS, step [G] and offset [G] with x ~ step * q + offset, row by row.

    A step of range / LEVELS just holds the range, but few columns round by luck: of 16 steps the one with the
    least squared error is kept. Where a number is none, the step is none and q is 0.
    """
    most = tl.max(tl.where(inside, x, float("-inf")), 1)
    least = tl.min(tl.where(inside, x, float("inf")), 1)
    poison = tl.sum(tl.where(inside, x * 0.0, 0.0), 1)
    middle = 0.5 * most + 0.5 * least
    best_step, best_offset = poison, _stored(middle, HALF)
    best_error = tl.full(middle.shape, float("inf"), tl.float32)
    for i in tl.static_range(16):
        step = _stored((NARROWEST + i / 32) * ((most - least) / LEVELS), HALF)
        offset = _stored(tl.fma(-0.5 * LEVELS + 0.0 * step, step, middle), HALF)
        missed = tl.fma(_on_grid(x, step, offset, LEVELS), step[:, None], offset[:, None]) - x
        error = tl.sum(tl.where(inside, missed * missed, 0.0), 1)
        better = (step > TINY) & (error < best_error)
        best_error = tl.where(better, error, best_error)
        best_step = tl.where(better, step, best_step)
        best_offset = tl.where(better, offset, best_offset)
    q = tl.where((best_step > 0)[:, None], _on_grid(x, best_step, best_offset, LEVELS), 0.0)
    return q, best_step, best_offset


@triton.jit
def _e4m3(value):
    """The bits of the nearest e4m3 number, ties to even, 448 beyond it (kernels/cpu/fp8.h)."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    odd = magnitude >> 20 & 1
    code = (magnitude - 0x3C000000 + 0x7FFFF + odd) >> 20
    # a subnormal: adding 2^14 lines the mantissa up with the 2^-9 grid and rounds
    small = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, code)
    code = tl.where(magnitude >= 0x43E00000, 0x7E, code)
    return (code | (bits >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def _write_row(
    x, data, scales, row, ring_at, ring, DIM: tl.constexpr, TYPE: tl.constexpr, STRIDE: tl.constexpr,
    PLANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [BLOCK], zero beyond DIM, as row ``ring_at`` of the (slot, head) numbered ``row``."""
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    data += (row * ring + ring_at) * STRIDE
    if PLANES:
        scales += row * ring * PLANES + ring_at
    if TYPE == "int8":
        q, step, offset = _best_grid(x[None, :], inside[None, :], 255.0, 1.0, False)
        tl.store(data + at[None, :], (q - 128.0).to(tl.int8), inside[None, :])
        one = tl.arange(0, 1)
        tl.store(scales + one, step)
        tl.store(scales + ring + one, tl.fma(step, 128.0 + 0.0 * step, offset))
    elif TYPE == "fp8":
        amax = tl.max(tl.abs(x), 0)
        poison = tl.sum(x * 0.0, 0)
        tiny = amax < TINY
        codes = _e4m3(x * tl.where(tiny, 0.0, 448.0 / amax))
        tl.store(data + at, tl.where(poison == 0, codes, 0), inside)
        tl.store(scales, tl.where(tiny, 0.0, amax / 448.0) + poison)
    elif TYPE == "int4":
        q, step, offset = _best_grid(
            tl.reshape(x, (BLOCK // 32, 32)), tl.reshape(inside, (BLOCK // 32, 32)), 15.0, 0.75, True
        )
        group = tl.arange(0, BLOCK // 32)
        tl.store(scales + 2 * group * ring, step.to(tl.float16), group < PLANES // 2)
        tl.store(scales + (2 * group + 1) * ring, offset.to(tl.float16), group < PLANES // 2)
        q = tl.where(tl.reshape(inside, (BLOCK // 32, 32)), q, 0.0).to(tl.int32)
        low, high = tl.split(tl.permute(tl.reshape(q, (BLOCK // 64, 2, 32)), (0, 2, 1)))
        byte = tl.reshape(low | high << 4, (BLOCK // 2,)).to(tl.uint8)
        where = tl.arange(0, BLOCK // 2)
        tl.store(data + where, byte, where < STRIDE)
    else:
        tl.store(data + at, x.to(data.dtype.element_ty), inside)


@triton.jit
def _prepared(
    x, norm, cos, sin, eps, DIM: tl.constexpr, DIMS: tl.constexpr, INTERLEAVED: tl.constexpr,
    PASSES: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head of a query or a key at ``x``, normed and rotated; zero beyond DIM."""
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, at < DIM, 0.0).to(tl.float32)
    if norm is not None:
        value = value * (1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / DIM + eps))
        value = value * tl.load(norm + at, at < DIM, 0.0).to(tl.float32)
    if DIMS:
        value = _turn(value, cos, sin, DIMS, INTERLEAVED, BLOCK)
    if PASSES:
        value = _hadamard(value, PASSES, FACTOR, BLOCK)
    return value


@triton.jit
def _append_head(
    k, v, k_data, k_scales, v_data, v_scales, k_norm, cos, sin, slot, ring_at, head, ring, eps,
    KV_HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    DIMS: tl.constexpr, INTERLEAVED: tl.constexpr, PASSES: tl.constexpr, FACTOR: tl.constexpr,
    K_TYPE: tl.constexpr, K_BYTES: tl.constexpr, K_PLANES: tl.constexpr, K_BLOCK: tl.constexpr,
    V_TYPE: tl.constexpr, V_BYTES: tl.constexpr, V_PLANES: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's key, or from KV_HEADS on its value, of one head to the cache."""
    if head < KV_HEADS:
        value = _prepared(k + head * K_DIM, k_norm, cos, sin, eps, K_DIM, DIMS, INTERLEAVED, PASSES, FACTOR,
                          K_BLOCK)  # fmt: skip
        _write_row(value, k_data, k_scales, slot * KV_HEADS + head, ring_at, ring, K_DIM, K_TYPE, K_BYTES,
                   K_PLANES, K_BLOCK)  # fmt: skip
    else:
        head -= KV_HEADS
        at = tl.arange(0, V_BLOCK)
        value = tl.load(v + head * V_DIM + at, at < V_DIM, 0.0).to(tl.float32)
        _write_row(value, v_data, v_scales, slot * KV_HEADS + head, ring_at, ring, V_DIM, V_TYPE, V_BYTES,
                   V_PLANES, V_BLOCK)  # fmt: skip


@triton.jit
def _append_kernel(
    q, k, v, queries, k_data, k_scales, v_data, v_scales, q_norm, k_norm, cos, sin, positions, slots,
    q_stride, k_stride, v_stride, queries_stride, ring, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    DIMS: tl.constexpr, INTERLEAVED: tl.constexpr, PASSES: tl.constexpr, FACTOR: tl.constexpr,
    K_TYPE: tl.constexpr, K_BYTES: tl.constexpr, K_PLANES: tl.constexpr, K_BLOCK: tl.constexpr,
    V_TYPE: tl.constexpr, V_BYTES: tl.constexpr, V_PLANES: tl.constexpr, V_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Heads of a row, by the second index: HEADS queries (0 where they need no work), keys, values."""
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cos += t * (DIMS // 2)
    sin += t * (DIMS // 2)
    if HEADS:  # noqa: SIM102  (a constant: without queries there is nothing to compile)
        if head < HEADS:
            value = _prepared(q + t * q_stride + head * K_DIM, q_norm, cos, sin, eps, K_DIM, DIMS,
                              INTERLEAVED, PASSES, FACTOR, K_BLOCK)  # fmt: skip
            at = tl.arange(0, K_BLOCK)
            out = queries + t * queries_stride + head * K_DIM
            tl.store(out + at, value.to(queries.dtype.element_ty), at < K_DIM)
    if head >= HEADS:
        slot = tl.load(slots + t).to(tl.int64)
        ring_at = tl.load(positions + t) % ring
        _append_head(
            k + t * k_stride, v + t * v_stride, k_data, k_scales, v_data, v_scales, k_norm, cos, sin, slot,
            ring_at, head - HEADS, ring, eps, KV_HEADS, K_DIM, V_DIM, DIMS, INTERLEAVED, PASSES, FACTOR,
            K_TYPE, K_BYTES, K_PLANES, K_BLOCK, V_TYPE, V_BYTES, V_PLANES, V_BLOCK,
        )  # fmt: skip


@dataclass(frozen=True)
class Rotary:
    """cos, sin: [T, dims / 2] f32 from `rope_tables`; the first ``dims`` columns of a head turn."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @property
    def dims(self) -> int:
        return 2 * self.cos.shape[1]


def _block(rows: CacheRows) -> int:
    return max(64 if rows.dtype == "int4" else 16, triton.next_power_of_2(rows.dim))


def append(
    q: Tensor | None, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cache: LayerCache,
    queries: Tensor | None = None, q_norm: Tensor | None = None, k_norm: Tensor | None = None,
    norm_eps: float = 0.0, rope: Rotary | None = None, hadamard: int = 0,
) -> None:  # fmt: skip
    """Writes keys and values of rows to the cache, and their queries, normed and rotated, to ``queries``.

    q: [T, heads * k_dim], None where queries need no work; k: [T, kv_heads * k_dim]; v: [T, kv_heads *
    v_dim], all of any float types; positions, slots: [T] i32; queries: [T, heads * k_dim]; q_norm, k_norm:
    [k_dim]; hadamard: columns of a block of the transform, a power of two that divides k_dim, 0 = none.
    Rows must have stride-1 columns. No two rows may name the same slot and position.
    """
    heads = 0 if q is None else q.shape[1] // cache.k.dim
    assert (q is None) == (queries is None) and k.shape == (len(k), cache.kv_heads * cache.k.dim)
    assert v.shape == (len(k), cache.kv_heads * cache.v.dim) and len(positions) == len(slots) == len(k)
    assert not hadamard or (cache.k.dim % hadamard == 0 and hadamard & (hadamard - 1) == 0)
    dims = 0 if rope is None else rope.dims
    assert dims <= cache.k.dim, f"rope of {dims} columns, heads of {cache.k.dim}"
    _append_kernel[(len(k), heads + 2 * cache.kv_heads)](
        q, k, v, queries, cache.k.data, cache.k.scales, cache.v.data, cache.v.scales, q_norm, k_norm,
        rope.cos if rope else positions, rope.sin if rope else positions, positions, slots,
        0 if q is None else q.stride(0), k.stride(0), v.stride(0),
        0 if queries is None else queries.stride(0), cache.ring, norm_eps,
        HEADS=heads, KV_HEADS=cache.kv_heads, K_DIM=cache.k.dim, V_DIM=cache.v.dim,
        DIMS=dims, INTERLEAVED=rope is not None and rope.interleaved,
        PASSES=max(0, hadamard.bit_length() - 1), FACTOR=hadamard**-0.5 if hadamard else 1.0,
        K_TYPE=cache.k.dtype, K_BYTES=data_columns(cache.k.dtype, cache.k.dim),
        K_PLANES=scale_planes(cache.k.dtype, cache.k.dim), K_BLOCK=_block(cache.k),
        V_TYPE=cache.v.dtype, V_BYTES=data_columns(cache.v.dtype, cache.v.dim),
        V_PLANES=scale_planes(cache.v.dtype, cache.v.dim), V_BLOCK=_block(cache.v),
        num_warps=1, **options(),
    )  # fmt: skip
