"""Attention over the quantized KV cache: one kernel for decode, verification and prefill, one that combines.

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

With one split a program writes its rows' output; with more (flash-decoding) it writes m, l and acc, which
`combine` adds up in the order of the context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_warps import attend_by_warps, by_warps
from .cache import LayerCache, data_columns, scale_planes
from .overlap import let_next_begin, options, wait_for_inputs
from .quantize import Quantized, store_quantized

LOG2E = tl.constexpr(math.log2(math.e))
REGISTERS = 65536  # of a processor of an sm_90
# columns, warps, resident programs and tiles ahead where warps go by themselves, by whether all is bytes
WARP_SHAPES = {
    True: ((128, 8, 2, 0), (128, 8, 2, 1), (64, 4, 4, 0), (64, 4, 3, 0), (128, 4, 2, 0)),
    False: ((64, 4, 3, 0), (64, 4, 3, 1), (128, 8, 1, 0), (128, 4, 2, 0)),
}
SPLIT = tl.constexpr(256)  # positions of the shortest split


@triton.jit
def _split_length(position, WINDOW: tl.constexpr, SPLITS: tl.constexpr):
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
def _oldest(position, WINDOW: tl.constexpr):
    """The first position that a row at ``position`` sees."""
    return tl.maximum(position - WINDOW + 1, 0) if WINDOW else position * 0


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
            query, position, begin, most, k, k_scales, v, v_scales, row, ring, scale, softcap,
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
def _attend_kernel(
    q, k, k_scales, v, v_scales, sinks, out, m_out, l_out, acc_out, blocks, positions, slots,
    q_stride, out_stride, ring, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SPLITS: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr, ALWAYS_MASKED: tl.constexpr,
    K_DIM: tl.constexpr, K_BLOCK: tl.constexpr, K_TYPE: tl.constexpr, K_BYTES: tl.constexpr,
    K_PLANES: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, V_TYPE: tl.constexpr, V_BYTES: tl.constexpr,
    V_PLANES: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block, kv head and split. Query m of the tile is head m % GROUP of the block's row m // GROUP."""
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
    if rows == 0:
        return
    last = first + rows - 1
    oldest = _oldest(first, WINDOW)
    begin, most, split = oldest, last + 1, 0
    if SPLITS > 1:
        length = _split_length(first, WINDOW, SPLITS)
        split = oldest // length + tl.program_id(2)
        begin = tl.maximum(oldest, split * length)
        most = tl.minimum(most, (split + 1) * length)
    if begin >= most:
        return
    query_at = tl.arange(0, M)
    of_row = query_at // GROUP
    query_head = head * GROUP + query_at % GROUP
    there = of_row < rows
    position = first + tl.minimum(of_row, rows - 1)
    column = tl.arange(0, K_BLOCK)
    pointers = q + (first_row + of_row).to(tl.int64)[:, None] * q_stride
    pointers += query_head[:, None] * K_DIM + column[None, :]
    query = tl.load(pointers, there[:, None] & (column < K_DIM)[None, :], 0.0)
    if K_TYPE != "f32":
        query = query.to(tl.float16)
    query_sum = tl.sum(query.to(tl.float32), 1)
    m = tl.full((M,), float("-inf"), tl.float32)
    l = tl.zeros((M,), tl.float32)
    shift = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, V_BLOCK), tl.float32)
    row = slot.to(tl.int64) * KV_HEADS + head
    begin = begin // N * N
    # tiles before `open` and from `closed` on have positions that some row does not see
    open, closed = begin, most
    if not ALWAYS_MASKED:
        if WINDOW:
            open = tl.maximum(begin, tl.minimum(tl.cdiv(_oldest(last, WINDOW), N) * N, most))
            m, l, shift, acc = _tiles(
                m, l, shift, acc, query, query_sum, position, begin, open, most,
                k, k_scales, v, v_scales, row, ring, scale, softcap, N, WINDOW, True,
                K_DIM, K_BLOCK, K_TYPE, K_BYTES, K_PLANES, V_DIM, V_BLOCK, V_TYPE, V_BYTES, V_PLANES, CAPPED,
                PARTS, AHEAD,
            )  # fmt: skip
        closed = tl.maximum(open, tl.minimum(first + 1, most) // N * N)
        m, l, shift, acc = _tiles(
            m, l, shift, acc, query, query_sum, position, open, closed, most,
            k, k_scales, v, v_scales, row, ring, scale, softcap, N, WINDOW, False,
            K_DIM, K_BLOCK, K_TYPE, K_BYTES, K_PLANES, V_DIM, V_BLOCK, V_TYPE, V_BYTES, V_PLANES, CAPPED,
            PARTS, AHEAD,
        )  # fmt: skip
        open = closed
    m, l, shift, acc = _tiles(
        m, l, shift, acc, query, query_sum, position, open, most, most,
        k, k_scales, v, v_scales, row, ring, scale, softcap, N, WINDOW, True,
        K_DIM, K_BLOCK, K_TYPE, K_BYTES, K_PLANES, V_DIM, V_BLOCK, V_TYPE, V_BYTES, V_PLANES, CAPPED,
        PARTS, AHEAD,
    )  # fmt: skip
    acc += shift[:, None]
    v_column = tl.arange(0, V_BLOCK)
    inside = there[:, None] & (v_column < V_DIM)[None, :]
    if SPLITS > 1:
        to = ((first_row + of_row) * (KV_HEADS * GROUP) + query_head).to(tl.int64) * SPLITS + split % SPLITS
        tl.store(m_out + to, m, there)
        tl.store(l_out + to, l, there)
        tl.store(acc_out + to[:, None] * V_DIM + v_column[None, :], acc, inside)
    else:
        total, weight = l, m * 0.0 + 1.0
        if sinks is not None:
            sink = tl.load(sinks + query_head, there, 0.0).to(tl.float32) * LOG2E
            largest = tl.maximum(m, sink)
            weight = tl.exp2(m - largest)
            total = l * weight + tl.exp2(sink - largest)
        acc = acc * (weight / total)[:, None]
        to = (first_row + of_row).to(tl.int64)[:, None] * out_stride
        to += query_head[:, None] * V_DIM + v_column[None, :]
        tl.store(out + to, acc.to(out.dtype.element_ty), inside)


@triton.jit
def _combine_kernel(
    m_in, l_in, acc_in, sinks, out, q, scale, positions, out_stride,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    V_DIM: tl.constexpr, V_BLOCK: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + t)
    length = _split_length(position, WINDOW, SPLITS)
    first = _oldest(position, WINDOW) // length
    count = position // length - first + 1
    at = (t * HEADS + head) * SPLITS
    each = tl.arange(0, SPLITS)
    m = tl.load(m_in + at + (first + each) % SPLITS, each < count, float("-inf"))
    l = tl.load(l_in + at + (first + each) % SPLITS, each < count, 0.0)
    largest = tl.max(m, 0)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        largest = tl.maximum(largest, sink)
    total = tl.sum(tl.where(each < count, tl.exp2(m - largest) * l, 0.0), 0)
    if sinks is not None:
        total += tl.exp2(sink - largest)
    column = tl.arange(0, V_BLOCK)
    acc = tl.zeros((V_BLOCK,), tl.float32)
    for start in range(0, count, STEP):
        some = start + tl.arange(0, STEP)
        where = at + (first + some) % SPLITS
        weight = tl.exp2(tl.load(m_in + where, some < count, float("-inf")) - largest)
        parts = tl.load(
            acc_in + where[:, None] * V_DIM + column[None, :],
            (some < count)[:, None] & (column < V_DIM)[None, :], 0.0,
        )  # fmt: skip
        acc += tl.sum(tl.where((some < count)[:, None], parts * weight[:, None], 0.0), 0)
    to = out + t * out_stride + head * V_DIM + column
    acc /= total
    tl.store(to, acc.to(out.dtype.element_ty), column < V_DIM)
    if GROUP:
        store_quantized(acc, head * V_DIM + column, q, scale, t, HEADS * V_DIM, GROUP)


@dataclass(frozen=True)
class Tiling:
    """How an attention is cut up; what it computes depends on it in rounding alone.

    rows: most query rows of a block, a power of two; columns: positions of a tile, a power of two up to 256;
    splits: most splits of the context, 1 or a power of two (at least 4 with a window); warps: of a program;
    stages: tiles that are under way; parts: 0, or as many as there are warps where these go through the tiles
    by themselves (attention_warps.py); resident: programs of up to 8 queries that a processor then holds;
    ahead: tiles that are then asked for in the L2 cache before they are loaded.
    """

    rows: int
    columns: int
    splits: int
    warps: int
    stages: int
    parts: int = 0
    resident: int = 0
    ahead: int = 0

    def registers(self) -> int | None:
        """Of a thread, so that a processor holds as many programs as it should."""
        if not self.resident:
            return None
        return min(255, REGISTERS // (32 * self.warps * self.resident) // 8 * 8)


@dataclass(frozen=True)
class Partials:
    """What splits leave to be combined, f32: m and l [T, heads, splits], acc [T, heads, splits, v_dim]."""

    m: Tensor
    l: Tensor
    acc: Tensor


def partials_size(rows: int, heads: int, splits: int, v_dim: int) -> int:
    """Floats that splits leave to be combined; none where there is one."""
    return rows * heads * splits * (2 + v_dim) if splits > 1 else 0


def cut_partials(space: Tensor, rows: int, heads: int, splits: int, v_dim: int) -> Partials:
    """Room for the partials of a batch of ``rows`` rows, out of ``space`` [partials_size() or more] f32."""
    count = rows * heads * splits
    m, l, acc = space[: count * (2 + v_dim)].split([count, count, count * v_dim])
    shape = (rows, heads, splits)
    return Partials(m.view(shape), l.view(shape), acc.view(*shape, v_dim))


def allocate_partials(
    rows: int, heads: int, splits: int, v_dim: int, device: torch.device | str = "cuda"
) -> Partials:
    """The same in memory of its own."""
    space = torch.empty(rows * heads * splits * (2 + v_dim), device=device)
    return cut_partials(space, rows, heads, splits, v_dim)


def tiling(cache: LayerCache, heads: int, rows: int, blocks: int, processors: int = 132) -> Tiling:
    """The first of `tilings`."""
    return tilings(cache, heads, rows, blocks, processors)[0]


def tilings(
    cache: LayerCache, heads: int, rows: int, blocks: int, processors: int = 132
) -> list[Tiling]:
    """Those that are worth a measurement, the one first that should be fastest.

    They are for launches of up to ``blocks`` blocks that should hold up to ``rows`` rows each. A block gets
    as many rows as fit into a tile of 16 queries, which tensor cores take at least, or where more rows are
    asked for, of 128.
    """
    group = heads // cache.kv_heads
    wide = max(cache.k.dim, cache.v.dim) > 128
    floats = "f32" in (cache.k.dtype, cache.v.dtype)  # multiplied without tensor cores
    most = 16 if rows * group <= 16 or floats else 64 if wide else 128
    block_rows = 1
    while 2 * block_rows * group <= most and block_rows < rows:
        block_rows *= 2
    queries = max(16, triton.next_power_of_2(block_rows * group))
    shared = _shared_tiling(cache, block_rows, queries, blocks * cache.kv_heads, wide, floats, processors)
    if queries > 16 or not all(by_warps(part.dtype, part.dim) for part in (cache.k, cache.v)):
        return [shared]
    return [*_tilings_by_warps(cache, block_rows, blocks, processors), shared]


def _shared_tiling(
    cache: LayerCache, block_rows: int, queries: int, programs: int, wide: bool, floats: bool,
    processors: int,
) -> Tiling:  # fmt: skip
    """For warps that share tiles. Splits give each processor four programs if there are not enough blocks."""
    splits = 1
    while splits < _most_splits(cache) and programs * splits < 4 * processors:
        splits *= 2
    splits = _with_ends(cache, splits)
    # smaller tiles where a thread's registers would not hold the scores and what scales them
    columns = 16 if floats else 32 if wide or (queries > 64 and cache.k.scales is not None) else 64
    if queries == 16 and not wide and not floats:
        return Tiling(block_rows, columns, splits, 8, 3)
    warps = 8 if queries > 64 or (wide and queries > 16) or floats else 4
    return Tiling(block_rows, columns, splits, warps, 2)


def _tilings_by_warps(
    cache: LayerCache, block_rows: int, blocks: int, processors: int
) -> list[Tiling]:  # fmt: skip
    """For warps that go through tiles by themselves: WARP_SHAPES with splits that fill the device.

    That is as blocks of one row each, and as few blocks of many rows, which take up a processor each.
    """
    bytes_only = "f16" not in (cache.k.dtype, cache.v.dtype)
    most, few = blocks * cache.kv_heads, -(-blocks // block_rows) * cache.kv_heads
    found = []
    for columns, warps, resident, ahead in WARP_SHAPES[bytes_only]:
        loads = (most / (resident * processors), few / processors)
        splits = _with_ends(cache, _balanced(loads, _most_splits(cache)))
        found.append(Tiling(block_rows, columns, splits, warps, 1, warps, resident, ahead))
    return found


def _most_splits(cache: LayerCache) -> int:
    """Of a ring of which the shortest splits hold SPLIT positions."""
    return min(64, triton.next_power_of_2(-(-cache.ring // SPLIT.value)))


def _with_ends(cache: LayerCache, splits: int) -> int:
    return 4 if cache.window and splits == 2 else splits


def _balanced(loads: tuple[float, ...], most: int) -> int:
    """The fewest splits, up to ``most``, with which about as much of the device is busy as with any.

    loads: rounds of programs that the device would do, for one split.
    """

    def busy(splits: int) -> float:
        return min(load * splits / math.ceil(load * splits) for load in loads)

    choices = [1 << i for i in range(most.bit_length())]
    enough = 0.95 * max(map(busy, choices))
    return next(splits for splits in choices if busy(splits) >= enough)


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
    softcap: float = 0.0, sinks: Tensor | None = None, blocks: Tensor | None = None,
    partials: Partials | None = None, quantized: Quantized | None = None,
) -> None:  # fmt: skip
    """softmax(scale q K^T) V of each row over what its position may see in its slot, itself included.

    q: [T, heads * k_dim], prepared by `append`, f16 to lose nothing, or any float type; positions, slots:
    [T] i32; out: [T, heads * v_dim] of any float type; sinks: [heads], logits that count in the softmax's
    sum; blocks: [B, 4] i32 as `blocks_of` makes them for ``tiles.rows``, unused ones with 0 rows; None: each
    row is a block of its own. partials: of T rows or more and ``tiles.splits`` splits, where these are not 1;
    quantized: what else gets the result, as int8, where `can_quantize`.
    """
    heads, split = q.shape[1] // cache.k.dim, tiles.splits > 1
    group = heads // cache.kv_heads
    assert out.shape == (len(q), heads * cache.v.dim) and len(positions) == len(slots) == len(q)
    assert not split or (partials is not None and partials.acc.shape[2:] == (tiles.splits, cache.v.dim))
    assert not (split and cache.window) or tiles.splits >= 4, "a window needs splits for its ends"
    programs = len(q) if blocks is None else len(blocks)
    queries = triton.next_power_of_2((1 if blocks is None else tiles.rows) * group)
    queries = max(8 if tiles.parts else 16, queries)
    registers = tiles.registers() if queries == 8 else None  # more queries take what they need
    left = (partials.m, partials.l, partials.acc) if split and partials else (None, None, None)
    _attend_kernel[(programs, cache.kv_heads, tiles.splits)](
        q, cache.k.data, cache.k.scales, cache.v.data, cache.v.scales, sinks, out, *left,
        blocks, positions, slots, q.stride(0), out.stride(0), cache.ring, scale, softcap,
        KV_HEADS=cache.kv_heads, GROUP=group, M=queries, N=tiles.columns, SPLITS=tiles.splits,
        WINDOW=cache.window, CAPPED=softcap > 0, ALWAYS_MASKED=queries <= 16, PARTS=tiles.parts,
        AHEAD=tiles.ahead, **_shape(cache),
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=registers, **options(),
    )  # fmt: skip
    if split:
        to = (None, None) if quantized is None else (quantized.q, quantized.scale)
        _combine_kernel[(len(q), heads)](
            *left, sinks, out, *to, positions, out.stride(0), GROUP=quantized.group if quantized else 0,
            HEADS=heads, SPLITS=tiles.splits, WINDOW=cache.window, V_DIM=cache.v.dim,
            V_BLOCK=triton.next_power_of_2(cache.v.dim), STEP=min(16, tiles.splits), num_warps=4,
            **options(),
        )  # fmt: skip


def can_quantize(cache: LayerCache, heads: int, tiles: Tiling, group: int) -> bool:
    """Whether `attend` can write its result as int8 too: every head is combined, of whole groups."""
    dim = cache.v.dim
    whole = dim & (dim - 1) == 0 and dim % group == 0 and heads * dim % 64 == 0
    return tiles.splits > 1 and whole


def _shape(cache: LayerCache) -> dict[str, int | str]:
    found: dict[str, int | str] = {}
    for name, rows in (("K", cache.k), ("V", cache.v)):
        found[f"{name}_DIM"] = rows.dim
        found[f"{name}_BLOCK"] = max(64 if rows.dtype == "int4" else 16, triton.next_power_of_2(rows.dim))
        found[f"{name}_TYPE"] = rows.dtype
        found[f"{name}_BYTES"] = data_columns(rows.dtype, rows.dim)
        found[f"{name}_PLANES"] = scale_planes(rows.dtype, rows.dim)
    return found
