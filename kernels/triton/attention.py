"""Attention over the quantized KV cache: one kernel for decode, verification and prefill.

A program takes a block of query rows, consecutive positions of one slot, with all query heads that share one
kv head, and goes through one split of the context in tiles. Tiles and splits lie at absolute positions and
a split's length depends on the row's own position alone, so that a row's result has the same bits whoever
shares its block or its batch: tiles that a row does not see leave its sums exactly as they were.

    scores  s = scale (q . k), and for stored integers n: scale (k_scale (q . n) + k_offset sum(q))
    softmax m, l as in flash attention (arXiv 2205.14135), in base 2
    values  acc = sum p v, for stored integers sum (p v_scale) n + (sum p v_offset)

so integers enter the tensor cores as they are, exact in f16, and what scales them is applied to scores and
probabilities. int4 has several scales in a row and is scaled before. A cache of f32 is multiplied in f32.

Up to 16 queries over f16, int8 and fp8 go another way: warps by themselves (attention_warps.py).

Where every row is its slot's only one, which is decoding, that kernel is all there is: the program whose
split holds the row's own position appends its key and value before it goes through its tiles, and with
several splits (flash-decoding) the last one to leave its m, l and acc combines them. Rows that see each other
are appended by `append` before, and `combine` adds up their splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .append import (
    AS_THEY_ARE,
    Preparation,
    check_new,
    load_heads,
    load_new,
    prepared,
    rounded_product,
    store_new,
    sum_of_pairs,
)
from .attention_tilings import Tiling
from .attention_warps import attend_by_warps
from .cache import LayerCache, cache_constants
from .overlap import let_next_begin, options, wait_for_inputs
from .quantize import Quantized
from .splits import (
    LOG2E,
    Partials,
    combine,
    combine_heads,
    combine_step,
    deliver_heads,
    largest_with_sink,
    oldest_seen,
    splits_of,
)
from .target import INTERPRETED, fetch_lines


@triton.jit
def _load_tile(
    data, scales, row, ring_at, inside, ring, DIM: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
    STRIDE: tl.constexpr, PLANES: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Rows ``ring_at`` [N] of (slot, head) ``row``: values [N, BLOCK] to multiply, scale [N] and offset [N].

    Zeros where not ``inside`` [N], which counts as true with ALL, and beyond DIM.
    """
    data += row * ring * STRIDE
    if PLANES:
        scales += row * ring * PLANES + ring_at
    scale = ring_at * 0.0
    offset = ring_at * 0.0
    if TYPE == "int4":
        pair = tl.arange(0, BLOCK // 64)[None, :, None]
        byte = tl.arange(0, 32)[None, None, :]
        there = inside[:, None, None] & (pair * 32 < STRIDE)
        packed = tl.load(data + ring_at[:, None, None] * STRIDE + pair * 32 + byte, there, 0)
        nibbles = tl.permute(tl.join(packed & 15, packed >> 4), (0, 1, 3, 2))  # [N, BLOCK / 64, 2, 32]
        q = tl.reshape(nibbles, (ring_at.shape[0], BLOCK // 32, 32))
        group = tl.arange(0, BLOCK // 32)[None, :]
        there2 = inside[:, None] & (group < PLANES // 2)
        step = tl.load(scales[:, None] + 2 * group * ring, there2, 0.0)
        base = tl.load(scales[:, None] + (2 * group + 1) * ring, there2, 0.0)
        values = q.to(tl.float32) * step.to(tl.float32)[:, :, None] + base.to(tl.float32)[:, :, None]
        values = tl.reshape(values.to(tl.float16), (ring_at.shape[0], BLOCK))
    else:
        at = tl.arange(0, BLOCK)[None, :]
        pointers = data + ring_at[:, None] * STRIDE + at
        if ALL and DIM == BLOCK:
            values = tl.load(pointers)
        elif ALL:
            values = tl.load(pointers, (at < DIM) & (ring_at[:, None] >= 0), 0)
        elif DIM == BLOCK:
            values = tl.load(pointers, inside[:, None] & (at >= 0), 0)
        else:
            values = tl.load(pointers, inside[:, None] & (at < DIM), 0)
        if TYPE == "fp8":
            values = values.to(tl.float8e4nv, bitcast=True)
        if TYPE == "fp8" or TYPE == "int8":
            values = values.to(tl.float16)
            scale = tl.load(scales, inside, 0.0)
        if TYPE == "int8":
            offset = tl.load(scales + ring, inside, 0.0)
    return values, scale, offset


@triton.jit
def _product(a, b, acc, TYPE: tl.constexpr):
    if TYPE == "f32":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a.to(tl.float16), b.to(tl.float16), acc)


@triton.jit
def _tiles(
    m, l, shift, acc, query, query_sum, position, begin, end, most,
    k, k_scales, v, v_scales, row, ring, scale, softcap,
    N: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    K_DIM: tl.constexpr, K_BLOCK: tl.constexpr, K_TYPE: tl.constexpr, K_BYTES: tl.constexpr,
    K_PLANES: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, V_TYPE: tl.constexpr, V_BYTES: tl.constexpr,
    V_PLANES: tl.constexpr,
    CAPPED: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The online softmax over the tiles [begin, end), of which positions from ``most`` on are not read.

    With PARTS these are all of a program's tiles, and the sums that are passed are empty.
    """
    if PARTS:
        return attend_by_warps(
            query, query_sum, position, begin, most, k, k_scales, v, v_scales, row, ring, scale, softcap,
            N, PARTS, WINDOW, K_DIM, K_TYPE, K_BYTES, K_PLANES, V_DIM, V_TYPE, V_BYTES, V_PLANES, CAPPED,
            AHEAD,
        )  # fmt: skip
    for start in range(begin, end, N):
        at = start + tl.arange(0, N)
        inside = at < most
        ring_at = at % ring if WINDOW else at
        keys, k_scale, k_offset = _load_tile(
            k, k_scales, row, ring_at, inside, ring, K_DIM, K_BLOCK, K_TYPE, K_BYTES, K_PLANES, not MASKED
        )
        s = _product(query, tl.trans(keys), tl.zeros((query.shape[0], N), tl.float32), K_TYPE)
        unit = scale if CAPPED else scale * LOG2E
        if K_TYPE == "int8":
            s = s * (k_scale * unit)[None, :] + query_sum[:, None] * (k_offset * unit)[None, :]
        elif K_TYPE == "fp8":
            s = s * (k_scale * unit)[None, :]
        else:
            s = s * unit
        if CAPPED:  # softcap tanh(s / softcap) = softcap - 2 softcap / (e^(2 s / softcap) + 1)
            s = (softcap - 2 * softcap / (tl.exp2(s * (2 * LOG2E / softcap)) + 1)) * LOG2E
        if MASKED:
            seen = at[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (at[None, :] > position[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
        most_s = tl.maximum(m, tl.max(s, 1))
        reference = tl.where(most_s == float("-inf"), 0.0, most_s)  # a row that has seen nothing yet
        p = tl.exp2(s - reference[:, None])
        correction = tl.exp2(m - reference)
        m = most_s
        l = l * correction + tl.sum(p, 1)
        values, v_scale, v_offset = _load_tile(
            v, v_scales, row, ring_at, inside, ring, V_DIM, V_BLOCK, V_TYPE, V_BYTES, V_PLANES, not MASKED
        )
        if V_PLANES and V_TYPE != "int4":
            # relative to the largest scale that a row sees, so that small scales do not vanish in f16
            scales = (v_scale + 0.0)[None, :]
            if MASKED:  # what is no number stays with those who see it
                scales = tl.where(seen, scales, 0.0)
            largest = tl.max(tl.where(scales == scales, scales, 0.0), 1)
            largest = tl.where(largest > 0, tl.maximum(largest, 1e-20), 1.0)
            acc = acc * (correction / largest)[:, None]
            acc = _product(p * scales * (1.0 / largest)[:, None], values, acc, V_TYPE) * largest[:, None]
            if V_TYPE == "int8":
                shifted = p * v_offset[None, :]
                if MASKED:
                    shifted = tl.where(seen, shifted, 0.0)
                shift = shift * correction + tl.sum(shifted, 1)
        else:
            acc = _product(p, values, acc * correction[:, None], V_TYPE)
    return m, l, shift, acc


@triton.jit
def _anew(x):
    """x, but not known to the compiler as x: what follows from it is computed again and not kept."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


@triton.jit
def _fetch_rows(
    data, scales, row, first, count, ring, STRIDE: tl.constexpr, PLANES: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Has L2 fetch ``count`` stored rows from ``first`` on, as far as a line of 128 bytes a thread goes,
    and what scales them; rows and planes beyond their ends count as the last ones."""
    thread = tl.arange(0, THREADS)
    line: tl.constexpr = 1024 // data.dtype.element_ty.primitive_bitwidth
    end = tl.minimum(first + count, ring) * STRIDE - 1
    line_at = data + row * ring * STRIDE + tl.minimum(first * STRIDE + thread * line, end)
    fetch_lines(line_at.to(tl.int64))
    if PLANES:
        piece: tl.constexpr = 1024 // scales.dtype.element_ty.primitive_bitwidth
        plane = tl.minimum(thread // 8, PLANES - 1)
        at = tl.minimum(first + thread % 8 * piece, tl.minimum(first + count, ring) - 1)
        fetch_lines((scales + (row * PLANES + plane) * ring + at).to(tl.int64))


@triton.jit
def _queries(first_row, rows, head, GROUP: tl.constexpr, M: tl.constexpr):
    """Of the queries of a tile [M]: row of the batch, head, and whether there is such a row in the block."""
    at = tl.arange(0, M)
    return first_row + at // GROUP, head * GROUP + at % GROUP, at // GROUP < rows


@triton.jit
def _context(
    query, query_sum, position, first, last, begin, most,
    k_data, k_scales, v_data, v_scales, row, ring, scale, softcap,
    N: tl.constexpr, WINDOW: tl.constexpr, ALWAYS_MASKED: tl.constexpr,
    K_DIM: tl.constexpr, K_BLOCK: tl.constexpr, K_TYPE: tl.constexpr, K_BYTES: tl.constexpr,
    K_PLANES: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, V_TYPE: tl.constexpr, V_BYTES: tl.constexpr,
    V_PLANES: tl.constexpr,
    CAPPED: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """m, l [M] and acc [M, V_BLOCK] of rows at ``first`` to ``last`` over the positions [begin, most)."""
    m = tl.full((query.shape[0],), float("-inf"), tl.float32)
    l = tl.zeros((query.shape[0],), tl.float32)
    shift = tl.zeros((query.shape[0],), tl.float32)
    acc = tl.zeros((query.shape[0], V_BLOCK), tl.float32)
    begin = begin // N * N
    # tiles before `open` and from `closed` on have positions that some row does not see
    open, closed = begin, most
    if not ALWAYS_MASKED:
        if WINDOW:
            open = tl.maximum(begin, tl.minimum(tl.cdiv(oldest_seen(last, WINDOW), N) * N, most))
            m, l, shift, acc = _tiles(
                m, l, shift, acc, query, query_sum, position, begin, open, most,
                k_data, k_scales, v_data, v_scales, row, ring, scale, softcap, N, WINDOW, True,
                K_DIM, K_BLOCK, K_TYPE, K_BYTES, K_PLANES, V_DIM, V_BLOCK, V_TYPE, V_BYTES, V_PLANES, CAPPED,
                PARTS, AHEAD,
            )  # fmt: skip
        closed = tl.maximum(open, tl.minimum(first + 1, most) // N * N)
        m, l, shift, acc = _tiles(
            m, l, shift, acc, query, query_sum, position, open, closed, most,
            k_data, k_scales, v_data, v_scales, row, ring, scale, softcap, N, WINDOW, False,
            K_DIM, K_BLOCK, K_TYPE, K_BYTES, K_PLANES, V_DIM, V_BLOCK, V_TYPE, V_BYTES, V_PLANES, CAPPED,
            PARTS, AHEAD,
        )  # fmt: skip
        open = closed
    m, l, shift, acc = _tiles(
        m, l, shift, acc, query, query_sum, position, open, most, most,
        k_data, k_scales, v_data, v_scales, row, ring, scale, softcap, N, WINDOW, True,
        K_DIM, K_BLOCK, K_TYPE, K_BYTES, K_PLANES, V_DIM, V_BLOCK, V_TYPE, V_BYTES, V_PLANES, CAPPED,
        PARTS, AHEAD,
    )  # fmt: skip
    return m, l, acc + shift[:, None]


@triton.jit
def _attend_kernel(
    q, k, v, q_norm, k_norm, cos, sin, eps, k_data, k_scales, v_data, v_scales, sinks, out, out_q, out_scale,
    m_parts, l_parts, acc_parts, arrived, blocks, positions, slots,
    q_stride, k_stride, v_stride, out_stride, ring, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
    SPLITS: tl.constexpr, STEP: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    ALWAYS_MASKED: tl.constexpr, OUT_GROUP: tl.constexpr,
    DIMS: tl.constexpr, INTERLEAVED: tl.constexpr, PASSES: tl.constexpr, FACTOR: tl.constexpr,
    COPIES: tl.constexpr,
    K_DIM: tl.constexpr, K_BLOCK: tl.constexpr, K_TYPE: tl.constexpr, K_BYTES: tl.constexpr,
    K_PLANES: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, V_TYPE: tl.constexpr, V_BYTES: tl.constexpr,
    V_PLANES: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block, kv head and split. Query m of the tile is head m % GROUP of the block's row m // GROUP.

    With ``blocks`` None a block is one row, the only one of its slot, which is appended here.
    """
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    head = tl.program_id(1)
    if blocks is not None:
        first_row = tl.load(blocks + tl.program_id(0) * 4)
        rows = tl.load(blocks + tl.program_id(0) * 4 + 1)
        slot = tl.load(blocks + tl.program_id(0) * 4 + 2)
        first = tl.load(blocks + tl.program_id(0) * 4 + 3)
    else:
        first_row, rows = tl.program_id(0), 1
        slot = tl.load(slots + first_row)
        first = tl.load(positions + first_row)
    query_row, query_head, there = _queries(first_row, rows, head, GROUP, M)
    # asked for before it is known whether there is work: positions are under way meanwhile
    raw, other, weight, other_weight, c, s = load_heads(
        q + query_row.to(tl.int64) * q_stride + query_head * K_DIM, there, q_norm, cos, sin, query_row,
        K_DIM, DIMS, INTERLEAVED, K_BLOCK,
    )  # fmt: skip
    if blocks is None:
        new_key, new_other, new_weight, new_other_weight, new_c, new_s, new_value = load_new(
            k, v, first_row.to(tl.int64), head, k_stride, v_stride, k_norm, cos, sin, DIMS, INTERLEAVED,
            COPIES, K_DIM, K_BLOCK, V_DIM, V_BLOCK,
        )  # fmt: skip
    if rows == 0:
        return
    last = first + rows - 1
    oldest = oldest_seen(first, WINDOW)
    begin, most = oldest, last + 1
    if SPLITS > 1:
        length, first_split, count = splits_of(first, WINDOW, SPLITS)
        split = first_split + tl.program_id(2)
        begin = tl.maximum(oldest, split * length)
        most = tl.minimum(most, (split + 1) * length)
    if begin >= most:
        return
    row = slot.to(tl.int64) * KV_HEADS + head
    if M <= 16:  # the first two tiles are on their way while queries and a new row are prepared
        tile = begin // N * N
        tile_at = tile % ring if WINDOW else tile
        ahead = tl.minimum(most - tile, 2 * N)
        _fetch_rows(k_data, k_scales, row, tile_at, ahead, ring, K_BYTES, K_PLANES, 32 * COPIES)
        _fetch_rows(v_data, v_scales, row, tile_at, ahead, ring, V_BYTES, V_PLANES, 32 * COPIES)
    query = prepared(
        raw, other, weight, other_weight, c, s, eps, q_norm is not None, K_DIM, DIMS, INTERLEAVED, PASSES,
        FACTOR,
    )  # fmt: skip
    if K_TYPE != "f32":
        query = query.to(tl.float16)
    if blocks is None:  # noqa: SIM102  (a constant: keys in blocks are appended already)
        if most > first:
            store_new(
                new_key, new_other, new_weight, new_other_weight, new_c, new_s, new_value, eps,
                k_data, k_scales, v_data, v_scales, row, first % ring, ring, k_norm is not None, DIMS,
                INTERLEAVED, PASSES, FACTOR,
                K_DIM, K_TYPE, K_BYTES, K_PLANES, V_DIM, V_TYPE, V_BYTES, V_PLANES,
            )  # fmt: skip
            tl.debug_barrier()  # what this program wrote it reads as all others do
    query_sum = sum_of_pairs(query.to(tl.float32))
    position = first + tl.minimum(query_row - first_row, rows - 1)
    m, l, acc = _context(
        query, query_sum, position, first, last, begin, most,
        k_data, k_scales, v_data, v_scales, row, ring, scale, softcap, N, WINDOW, ALWAYS_MASKED,
        K_DIM, K_BLOCK, K_TYPE, K_BYTES, K_PLANES, V_DIM, V_BLOCK, V_TYPE, V_BYTES, V_PLANES, CAPPED,
        PARTS, AHEAD,
    )  # fmt: skip
    # once more: no registers hold these meanwhile
    working = 1
    if SPLITS > 1:
        length, first_split, working = splits_of(first, WINDOW, SPLITS)
    if blocks is not None:
        first_row = tl.load(blocks + tl.program_id(0) * 4)
        rows = tl.load(blocks + tl.program_id(0) * 4 + 1)
    query_row, query_head, there = _queries(first_row, rows, _anew(head), GROUP, M)
    if SPLITS == 1 or (blocks is None and working == 1):
        _deliver(
            m, l, acc, sinks, query_row, query_head, there, out, out_stride, out_q, out_scale,
            KV_HEADS * GROUP, V_DIM, OUT_GROUP,
        )  # fmt: skip
    else:
        column = tl.arange(0, V_BLOCK)[None, :]
        to = query_row.to(tl.int64) * SPLITS + (first_split + tl.program_id(2)) % SPLITS
        to = to * (KV_HEADS * GROUP) + query_head
        tl.store(m_parts + to, m, there)
        tl.store(l_parts + to, l, there)
        tl.store(acc_parts + to[:, None] * V_DIM + column, acc, there[:, None] & (column < V_DIM))
        if blocks is None:
            tl.debug_barrier()  # all of it is written before it counts
            counter = arrived + first_row * KV_HEADS + head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == working - 1:
                of_group = tl.arange(0, H)
                combine_heads(
                    m_parts, l_parts, acc_parts, sinks, first, first_row, head * GROUP + of_group,
                    of_group < GROUP, out, out_stride, out_q, out_scale, KV_HEADS * GROUP, SPLITS, STEP,
                    WINDOW, V_DIM, V_BLOCK, OUT_GROUP,
                )  # fmt: skip
                tl.store(counter, 0)


@triton.jit
def _deliver(
    m, l, acc, sinks, token, head, there, out, out_stride, q, q_scale,
    HEADS: tl.constexpr, V_DIM: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes the result of rows of which one split has seen all, as if it were combined with no others."""
    largest = largest_with_sink(m, sinks, head, there)
    weight = tl.exp2(m - largest)
    deliver_heads(
        rounded_product(weight, l), rounded_product(acc, weight[:, None]), largest, sinks, token, head,
        there, out, out_stride, q, q_scale, HEADS, V_DIM, GROUP,
    )  # fmt: skip


def blocks_of(positions: Tensor, slots: Tensor, rows: int) -> Tensor:
    """Blocks of a batch: [B, 4] i32 of first row, rows, slot and first position.

    positions, slots: [T] i32 on the CPU. A block holds consecutive rows of one slot with positions ascending
    by one, which agree in position // ``rows``.
    """
    t = torch.arange(len(positions), dtype=torch.int32)
    goes_on = (slots[1:] == slots[:-1]) & (positions[1:] == positions[:-1] + 1) & (positions[1:] % rows != 0)
    first = torch.cat([torch.zeros(1, dtype=torch.int32), t[1:][~goes_on]])
    ends = torch.cat([first[1:], torch.tensor([len(positions)], dtype=torch.int32)])
    at = first.long()
    return torch.stack([first, ends - first, slots[at], positions[at]], 1).to(torch.int32)


def attend(
    q: Tensor, cache: LayerCache, positions: Tensor, slots: Tensor, scale: float, tiles: Tiling, out: Tensor,
    preparation: Preparation = AS_THEY_ARE, softcap: float = 0.0, sinks: Tensor | None = None,
    new: tuple[Tensor, Tensor] | None = None, blocks: Tensor | None = None,
    partials: Partials | None = None, quantized: Quantized | None = None,
) -> None:  # fmt: skip
    """softmax(scale q K^T) V of each row over what its position may see in its slot, itself included.

    q: [T, heads * k_dim] of any float type; positions, slots: [T] i32; out: [T, heads * v_dim] of any float
    type; sinks: [heads], logits that count in the softmax's sum. new: keys [T, kv_heads * k_dim] and values
    [T, kv_heads * v_dim] of the rows, each its slot's only one, which are appended as `append` does; else
    blocks: [B, 4] i32 as `blocks_of` makes them for ``tiles.rows``, unused ones with 0 rows, of rows that are
    appended already. partials: of T rows or more and ``tiles.splits`` splits, where these are not 1;
    quantized: what else gets the result, as int8, where `can_quantize`.
    """
    heads, split = q.shape[1] // cache.k.dim, tiles.splits > 1
    group = heads // cache.kv_heads
    assert out.shape == (len(q), heads * cache.v.dim) and len(positions) == len(slots) == len(q)
    assert (new is None) != (blocks is None), "rows are appended here or come in blocks"
    room = (tiles.splits, heads, cache.v.dim)
    assert not split or (partials is not None and partials.acc.shape[1:] == room)
    assert not (split and cache.window) or tiles.splits >= 4, "a window needs splits for its ends"
    k, v = (None, None) if new is None else new
    if k is not None and v is not None:
        check_new(k, v, positions, slots, cache)
    programs = len(q) if blocks is None else len(blocks)
    queries = triton.next_power_of_2((1 if blocks is None else tiles.rows) * group)
    queries = max(8 if tiles.parts else 16, queries)
    left = (partials.m, partials.l, partials.acc, partials.arrived) if partials else (None,) * 4
    to = (quantized.q, quantized.scale) if quantized and not (split and new is None) else (None, None)
    constants = cache_constants(cache)
    v_block = int(constants["V_BLOCK"])
    _attend_kernel[(programs, cache.kv_heads, tiles.splits)](
        q, k, v, preparation.q_norm, preparation.k_norm, *preparation.angles, preparation.norm_eps,
        cache.k.data, cache.k.scales, cache.v.data, cache.v.scales, sinks, out, *to, *left,
        blocks, positions, slots, q.stride(0), 0 if k is None else k.stride(0),
        0 if v is None else v.stride(0), out.stride(0), cache.ring, scale, softcap,
        KV_HEADS=cache.kv_heads, GROUP=group, M=queries, N=tiles.columns, H=triton.next_power_of_2(group),
        SPLITS=tiles.splits, STEP=combine_step(group, tiles.splits, v_block, tiles.warps),
        WINDOW=cache.window, CAPPED=softcap > 0, ALWAYS_MASKED=queries <= 16 or new is not None,
        OUT_GROUP=quantized.group if quantized else 0, COPIES=tiles.warps, PARTS=tiles.parts,
        AHEAD=tiles.ahead, **preparation.constants(cache.k.dim), **constants,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers(queries), **options(),
    )  # fmt: skip
    if blocks is not None and split and partials is not None:
        combine(partials, positions, out, cache.window, v_block, tiles.warps, sinks, quantized)


def can_quantize(cache: LayerCache, heads: int, group: int) -> bool:
    """Whether `attend` can write its result as int8 too: heads are of whole groups, a row of whole blocks."""
    return cache.v.dim % group == 0 and heads * cache.v.dim % 64 == 0
