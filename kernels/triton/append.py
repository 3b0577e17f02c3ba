"""Norm, rope and Hadamard rotation of heads, and the append of keys and values to the cache.

Attention of few rows prepares its queries itself, and where every row is its slot's only one appends too.
`append` is for rows that see each other, and prepares the queries of many. Keys and values are rounded to the
cache's format and written at (slot, head, position). Rounding is the CPU's (kernels/cpu/cache.inc): int8 and
int4 keep the best of 16 grids by squared error, fp8 scales the row's largest number to 448.

A key or a value is held in COPIES equal copies [COPIES, D], one of each warp, so that sums over it stay
within the warp; each copy tries its share of the grids, and the first one is written. Products that a sum
follows are rounded by themselves (`rounded_product`), so that both kernels that append write the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .cache import LayerCache, cache_constants
from .overlap import let_next_begin, options, wait_for_inputs
from .quantize import largest_magnitude

TINY = tl.constexpr(1e-35)  # the inverse of less would overflow; such rows count as zero or constant
GRIDS = tl.constexpr(16)
NO_GRID = tl.constexpr(1 << 40)  # ranks behind all grids


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
def rounded_product(a, b):
    """a * b, rounded before anything is added to it: a multiply and an add would become one instruction."""
    return tl.fma(a, b, 0.0)


@triton.jit
def sum_of_pairs(x):
    """Sums [R] of the rows of x [R, N]: neighbours, then neighbouring sums, in one order on any layout."""
    for _ in tl.static_range(12):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2)
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def _turning(DIMS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Of each column [1, BLOCK]: the one that it turns with, its pair, whether it is the pair's second."""
    at = tl.arange(0, BLOCK)[None, :]
    if INTERLEAVED:
        return at ^ 1, at // 2, at % 2
    else:
        half: tl.constexpr = DIMS // 2
        return (at + half) % DIMS, at % half, at // half


@triton.jit
def load_heads(
    x, there, norm, cos, sin, row, DIM: tl.constexpr, DIMS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All that `prepared` needs of heads at the pointers x [R], of rows ``row`` [R] of the batch.

    f32: the heads [R, BLOCK], zero beyond DIM and where not ``there`` [R]; for each of DIMS columns the one
    that rope turns it with; the norm's weights of both [1, BLOCK]; cosines and sines. What is not needed is
    the heads again.
    """
    at = tl.arange(0, BLOCK)[None, :]
    value = tl.load(x[:, None] + at, there[:, None] & (at < DIM), 0.0).to(tl.float32)
    other, weight, other_weight, c, s = value, value, value, value, value
    if DIMS:
        partner, pair, second = _turning(DIMS, INTERLEAVED, BLOCK)
        turns = there[:, None] & (at < DIMS)
        angle = row.to(tl.int64)[:, None] * (DIMS // 2) + pair
        other = tl.load(x[:, None] + partner, turns, 0.0).to(tl.float32)
        c = tl.load(cos + angle, turns, 1.0)
        s = tl.load(sin + angle, turns, 0.0)
    if norm is not None:
        weight = tl.load(norm + at, at < DIM, 0.0).to(tl.float32)
        if DIMS:
            other_weight = tl.load(norm + partner, at < DIMS, 0.0).to(tl.float32)
    return value, other, weight, other_weight, c, s


@triton.jit
def _hadamard(x, PASSES: tl.constexpr, FACTOR: tl.constexpr):
    """Each 2^PASSES columns times the Walsh-Hadamard matrix: butterflies, then the orthonormal factor."""
    at = tl.arange(0, x.shape[1])[None, :]
    for i in tl.static_range(PASSES):
        other = tl.gather(x, tl.broadcast_to(at ^ (1 << i), x.shape), 1)
        x = tl.where((at >> i & 1) != 0, other - x, x + other)
    return rounded_product(x, FACTOR)


@triton.jit
def prepared(
    value, other, weight, other_weight, c, s, eps, NORMED: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, INTERLEAVED: tl.constexpr, PASSES: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Heads from `load_heads` normed, turned by their angles (arXiv 2104.09864, eq. 34) and rotated:
    [R, BLOCK] f32, zero beyond DIM."""
    if NORMED:
        inverse = (1.0 / tl.sqrt_rn(sum_of_pairs(rounded_product(value, value)) / DIM + eps))[:, None]
        value = rounded_product(value * inverse, weight)
        other = rounded_product(other * inverse, other_weight)
    if DIMS:
        partner, pair, second = _turning(DIMS, INTERLEAVED, value.shape[1])
        value = tl.fma(value, c, tl.where(second != 0, other, -other) * s)
    if PASSES:
        value = _hadamard(value, PASSES, FACTOR)
    return value


@triton.jit
def _stored(value, HALF: tl.constexpr):
    if HALF:
        value = tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
    return value


@triton.jit
def _grid(i, most, least, LEVELS: tl.constexpr, NARROWEST: tl.constexpr, HALF: tl.constexpr):
    """Step and offset of grid ``i``; the step range / LEVELS just holds the range."""
    step = _stored((NARROWEST + i.to(tl.float32) / 32) * ((most - least) / LEVELS), HALF)
    return step, _stored(tl.fma(step, -0.5 * LEVELS, 0.5 * most + 0.5 * least), HALF)


@triton.jit
def _on_grid(x, step, offset, LEVELS: tl.constexpr):
    """The nearest point of each grid: adding 1.5 * 2^23 leaves no room for a fraction."""
    q = tl.fma(x - offset[:, :, None], (1.0 / step)[:, :, None], 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(q, 0.0), LEVELS)


@triton.jit
def _ranked_grids(x, inside, LEVELS: tl.constexpr, NARROWEST: tl.constexpr, HALF: tl.constexpr):
    """Of x [C, G, W]: most, least and 0, or what is no number, of each row [C, G], and the best of the grids
    that each copy tries, as squared error and number in one integer [C, G].

    A grid that just holds the range is not always best: few columns round by luck.
    """
    most = tl.max(tl.where(inside, x, float("-inf")), 2)
    least = tl.min(tl.where(inside, x, float("inf")), 2)
    poison = tl.sum(tl.where(inside, x * 0.0, 0.0), 2)
    rank = tl.full(most.shape, NO_GRID, tl.int64)
    for turn in tl.static_range(GRIDS // x.shape[0]):
        i = turn * x.shape[0] + tl.arange(0, x.shape[0])[:, None]
        step, offset = _grid(i, most, least, LEVELS, NARROWEST, HALF)
        nearest = _on_grid(x, step, offset, LEVELS)
        missed = tl.fma(nearest, step[:, :, None], offset[:, :, None]) - x
        error = tl.sum(tl.where(inside, rounded_product(missed, missed), 0.0), 2)
        this = error.to(tl.int32, bitcast=True).to(tl.int64) * GRIDS + i  # floats that are positive, in order
        rank = tl.minimum(rank, tl.where((step > TINY) & (error < float("inf")), this, NO_GRID))
    return most, least, poison, rank


@triton.jit
def _on_best_grid(
    x, most, least, poison, rank, LEVELS: tl.constexpr, NARROWEST: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """q [C, G, W] from 0 to LEVELS, step and offset [C, G] with x ~ step * q + offset.

    The first of the grids with the least error is taken. Where a number is none, the step is none and q is 0.
    """
    best = tl.min(rank, 0)[None, :]
    step, offset = _grid(best % GRIDS, most, least, LEVELS, NARROWEST, HALF)
    step = tl.where(best < NO_GRID, step, poison)
    offset = tl.where(best < NO_GRID, offset, _stored(0.5 * most + 0.5 * least, HALF))
    q = tl.where((step > 0)[:, :, None], _on_grid(x, step, offset, LEVELS), 0.0)
    return q, step, offset


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
def _groups(x, TYPE: tl.constexpr):
    """[C, BLOCK] as [C, G, W], the columns that share a grid behind each other."""
    width: tl.constexpr = 32 if TYPE == "int4" else x.shape[1]
    return tl.reshape(x, (x.shape[0], x.shape[1] // width, width))


@triton.jit
def _ranked(x, DIM: tl.constexpr, TYPE: tl.constexpr):
    """`_ranked_grids` of a row x [C, BLOCK] where its format has grids."""
    inside = _groups(tl.arange(0, x.shape[1])[None, :] < DIM, TYPE)
    if TYPE == "int8":
        return _ranked_grids(_groups(x, TYPE), inside, 255.0, 1.0, False)
    elif TYPE == "int4":
        return _ranked_grids(_groups(x, TYPE), inside, 15.0, 0.75, True)
    else:
        return 0, 0, 0, 0


@triton.jit
def _write_scale(scale, scales, which, ring, PLANES: tl.constexpr):
    """scale [C, G] of the first copy to planes 2 g + ``which``.

    A lane of the warp that has it writes, of 32 lanes that would write neighbours: so Triton gives each copy
    a warp here too, and nothing goes through shared memory.
    """
    copies: tl.constexpr = scale.shape[0]
    groups: tl.constexpr = scale.shape[1]
    lanes: tl.constexpr = 32 // groups
    each = tl.broadcast_to(scale[:, :, None], (copies, groups, lanes))
    each = tl.reshape(each, (copies, 32)).to(scales.dtype.element_ty)
    copy, at = tl.arange(0, copies)[:, None], tl.arange(0, 32)[None, :]
    plane = at // lanes * 2 + which
    inside = (copy == 0) & (at % lanes == 0) & (plane < PLANES)
    tl.store(scales + (copy * 0 + plane * ring + at % lanes), each, inside)


@triton.jit
def _write_row(
    x, most, least, poison, rank, data, scales, row, ring_at, ring, DIM: tl.constexpr, TYPE: tl.constexpr,
    STRIDE: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """x [C, BLOCK], zero beyond DIM, as row ``ring_at`` of the (slot, head) numbered ``row``."""
    block: tl.constexpr = x.shape[1]
    copy = tl.arange(0, x.shape[0])[:, None]
    first, none = copy == 0, copy * 0
    at = none + tl.arange(0, block)[None, :]
    data += (row * ring + ring_at) * STRIDE
    if PLANES:
        scales += row * ring * PLANES + ring_at
    if TYPE == "int8":
        q, step, offset = _on_best_grid(_groups(x, TYPE), most, least, poison, rank, 255.0, 1.0, False)
        tl.store(data + at, (tl.reshape(q, x.shape) - 128.0).to(tl.int8), first & (at < DIM))
        _write_scale(step, scales, 0, ring, PLANES)
        _write_scale(tl.fma(step, 128.0, offset), scales, 1, ring, PLANES)
    elif TYPE == "fp8":
        amax = largest_magnitude(x)[:, None]
        tiny = amax < TINY
        codes = _e4m3(x * tl.where(tiny, 0.0, 448.0 / amax))
        tl.store(data + at, tl.where(amax < float("inf"), codes, 0), first & (at < DIM))
        scale = tl.where(tiny, 0.0, amax / 448.0) + amax * 0.0  # what is no number stays so
        _write_scale(scale, scales, 0, ring, PLANES)
    elif TYPE == "int4":
        q, step, offset = _on_best_grid(_groups(x, TYPE), most, least, poison, rank, 15.0, 0.75, True)
        _write_scale(step, scales, 0, ring, PLANES)
        _write_scale(offset, scales, 1, ring, PLANES)
        q = tl.where(at < DIM, tl.reshape(q, x.shape), 0.0).to(tl.int32)
        halves = tl.reshape(q, (x.shape[0], block // 64, 2, 32))
        low, high = tl.split(tl.permute(halves, (0, 1, 3, 2)))
        byte = tl.reshape(low | high << 4, (x.shape[0], block // 2)).to(tl.uint8)
        where = none + tl.arange(0, block // 2)[None, :]
        tl.store(data + where, byte, first & (where < STRIDE))
    else:
        tl.store(data + at, x.to(data.dtype.element_ty), first & (at < DIM))


@triton.jit
def load_new(
    k, v, t, head, k_stride, v_stride, k_norm, cos, sin, DIMS: tl.constexpr, INTERLEAVED: tl.constexpr,
    COPIES: tl.constexpr, K_DIM: tl.constexpr, K_BLOCK: tl.constexpr, V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
):  # fmt: skip
    """What `load_heads` loads of the key of one head of row t, and the value: [COPIES, BLOCK]s in f32."""
    copy = tl.arange(0, COPIES)
    key, other, weight, other_weight, c, s = load_heads(
        k + t * k_stride + head * K_DIM + copy * 0, copy >= 0, k_norm, cos, sin, t + copy * 0,
        K_DIM, DIMS, INTERLEAVED, K_BLOCK,
    )  # fmt: skip
    at = copy[:, None] * 0 + tl.arange(0, V_BLOCK)[None, :]
    value = tl.load(v + t * v_stride + head * V_DIM + at, at < V_DIM, 0.0).to(tl.float32)
    return key, other, weight, other_weight, c, s, value


@triton.jit
def store_new(
    key, other, weight, other_weight, c, s, value, eps, k_data, k_scales, v_data, v_scales, row, ring_at,
    ring, NORMED: tl.constexpr, DIMS: tl.constexpr, INTERLEAVED: tl.constexpr, PASSES: tl.constexpr,
    FACTOR: tl.constexpr,
    K_DIM: tl.constexpr, K_TYPE: tl.constexpr, K_BYTES: tl.constexpr, K_PLANES: tl.constexpr,
    V_DIM: tl.constexpr, V_TYPE: tl.constexpr, V_BYTES: tl.constexpr, V_PLANES: tl.constexpr,
):  # fmt: skip
    """What `load_new` loaded to row ``ring_at`` of the (slot, head) numbered ``row``.

    Grids are tried for both before the copies of either agree on theirs, which takes a barrier.
    """
    key = prepared(
        key, other, weight, other_weight, c, s, eps, NORMED, K_DIM, DIMS, INTERLEAVED, PASSES, FACTOR
    )
    k_most, k_least, k_poison, k_rank = _ranked(key, K_DIM, K_TYPE)
    v_most, v_least, v_poison, v_rank = _ranked(value, V_DIM, V_TYPE)
    _write_row(key, k_most, k_least, k_poison, k_rank, k_data, k_scales, row, ring_at, ring, K_DIM, K_TYPE,
               K_BYTES, K_PLANES)  # fmt: skip
    _write_row(value, v_most, v_least, v_poison, v_rank, v_data, v_scales, row, ring_at, ring, V_DIM, V_TYPE,
               V_BYTES, V_PLANES)  # fmt: skip


@triton.jit
def _append_kernel(
    q, k, v, queries, q_norm, k_norm, cos, sin, eps, k_data, k_scales, v_data, v_scales, positions, slots,
    q_stride, k_stride, v_stride, queries_stride, ring,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, COPIES: tl.constexpr,
    DIMS: tl.constexpr, INTERLEAVED: tl.constexpr, PASSES: tl.constexpr, FACTOR: tl.constexpr,
    K_DIM: tl.constexpr, K_BLOCK: tl.constexpr, K_TYPE: tl.constexpr, K_BYTES: tl.constexpr,
    K_PLANES: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, V_TYPE: tl.constexpr, V_BYTES: tl.constexpr,
    V_PLANES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Heads of a row, by the second index: HEADS queries (0 where these are left alone), keys with values."""
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if HEADS:  # noqa: SIM102  (a constant: without queries there is nothing to compile)
        if head < HEADS:
            one = tl.arange(0, 1)
            raw, other, weight, other_weight, c, s = load_heads(
                q + t * q_stride + head * K_DIM + one, one == 0, q_norm, cos, sin, t + one, K_DIM, DIMS,
                INTERLEAVED, K_BLOCK,
            )  # fmt: skip
            query = prepared(
                raw, other, weight, other_weight, c, s, eps, q_norm is not None, K_DIM, DIMS, INTERLEAVED,
                PASSES, FACTOR,
            )  # fmt: skip
            at = tl.arange(0, K_BLOCK)[None, :]
            to = queries + t * queries_stride + head * K_DIM + at
            tl.store(to, query.to(queries.dtype.element_ty), at < K_DIM)
    if head >= HEADS:
        kv_head = head - HEADS
        key, other, weight, other_weight, c, s, value = load_new(
            k, v, t, kv_head, k_stride, v_stride, k_norm, cos, sin, DIMS, INTERLEAVED, COPIES, K_DIM, K_BLOCK,
            V_DIM, V_BLOCK,
        )  # fmt: skip
        row = tl.load(slots + t).to(tl.int64) * KV_HEADS + kv_head
        store_new(
            key, other, weight, other_weight, c, s, value, eps, k_data, k_scales, v_data, v_scales, row,
            tl.load(positions + t) % ring, ring, k_norm is not None, DIMS, INTERLEAVED, PASSES, FACTOR,
            K_DIM, K_TYPE, K_BYTES, K_PLANES, V_DIM, V_TYPE, V_BYTES, V_PLANES,
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


@dataclass(frozen=True)
class Preparation:
    """What is done to heads of queries and keys before they are multiplied or stored.

    q_norm, k_norm: [k_dim], weights of an RMS norm; rope: angles of the batch's rows; hadamard: columns of a
    block of the transform, a power of two that divides k_dim, 0 = none.
    """

    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm_eps: float = 0.0
    rope: Rotary | None = None
    hadamard: int = 0

    @property
    def of_queries(self) -> bool:
        """Whether queries need any."""
        return self.rope is not None or self.q_norm is not None or self.hadamard > 0

    @property
    def angles(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.rope is None else (self.rope.cos, self.rope.sin)

    def constants(self, dim: int) -> dict[str, Any]:
        """What kernels are compiled for, with heads of ``dim`` columns."""
        dims, block = 0 if self.rope is None else self.rope.dims, self.hadamard
        assert dims <= dim, f"rope of {dims} columns, heads of {dim}"
        assert not block or (dim % block == 0 and block & (block - 1) == 0), f"{block} columns of {dim}"
        return {
            "DIMS": dims, "INTERLEAVED": self.rope is not None and self.rope.interleaved,
            "PASSES": max(0, block.bit_length() - 1), "FACTOR": block**-0.5 if block else 1.0,
        }  # fmt: skip


AS_THEY_ARE = Preparation()


def check_new(k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cache: LayerCache) -> None:
    """Keys and values of a batch have the shapes that `append` says."""
    assert k.shape == (len(k), cache.kv_heads * cache.k.dim)
    assert v.shape == (len(k), cache.kv_heads * cache.v.dim) and len(positions) == len(slots) == len(k)


def append(
    k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cache: LayerCache,
    preparation: Preparation = AS_THEY_ARE, warps: int = 1, q: Tensor | None = None,
    queries: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes keys, normed and rotated, and values of rows to the cache, and prepares their queries if asked.

    k: [T, kv_heads * k_dim]; v: [T, kv_heads * v_dim]; q: [T, heads * k_dim], which go to ``queries`` of the
    same shape, or None; all of any float types, columns of stride 1; positions, slots: [T] i32. No two rows
    may name the same slot and position. warps: of a program, up to 16; what is written depends on it in
    rounding.
    """
    check_new(k, v, positions, slots, cache)
    heads, strides = 0, (0, 0)
    if q is not None and queries is not None:
        heads, strides = q.shape[1] // cache.k.dim, (q.stride(0), queries.stride(0))
    assert (q is None) == (queries is None) and (q is None or q.shape == (len(k), heads * cache.k.dim))
    _append_kernel[(len(k), heads + cache.kv_heads)](
        q, k, v, queries, preparation.q_norm, preparation.k_norm, *preparation.angles, preparation.norm_eps,
        cache.k.data, cache.k.scales, cache.v.data, cache.v.scales, positions, slots,
        strides[0], k.stride(0), v.stride(0), strides[1], cache.ring,
        HEADS=heads, KV_HEADS=cache.kv_heads, COPIES=warps,
        **preparation.constants(cache.k.dim), **cache_constants(cache), num_warps=warps, **options(),
    )  # fmt: skip
