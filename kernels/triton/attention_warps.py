"""The tiles of few queries (`attention._tiles`) for caches of f16, int8 and fp8: every warp for itself.

A tile's positions go to PARTS parts, one for each warp of the program, which keeps sums of the online softmax
of its own until the tiles are through: nothing is exchanged, and no warp waits for another. Keys and values
come from memory straight into the registers that the tensor cores read, as words of four bytes; a tile is
asked for once the one before has been multiplied. What makes that possible is that neither the order of a
head's columns nor that of a tile's positions matters to a product as long as both of its sides agree
(`_keys`, `_queries`; `_values`, `_chances`, `_columns`). A thread of a warp loads 16 bytes at a time:

    keys    thread t: chunk t % 4 of 4 of the columns of position t // 4
    values  thread t: chunk t // 4 of 8 of the columns of positions 2 (t % 4) and 2 (t % 4) + 1

An operand of a batch of products, one for each warp, is laid out in the same way (mma.m16n8k16 with four
neighbours of k in a thread, which is what Triton chooses behind a join), so that only bytes within a thread
have to move. Both products have the queries as their columns, of which 8 will do.

Bytes become f16 by bits, exactly, which takes fewer and faster instructions than conversions do: 0x64 above
the byte n + 128 is the f16 number 1024 + 128 + n. e4m3 has an instruction for two numbers.

A value's scale v is applied to its probability. So that small ones do not vanish in f16, the reference of the
softmax is not the largest score s but the largest s + log2 v: no product exceeds 1, and the largest one is 1.

Counted in what ptxas makes of the loop for sm_90, Llama-3.1-8B's heads, one row: instructions of warps for 16
positions of a kv head, and what they take at 32,768 positions at 1.75 GHz (528 schedulers, one each a cycle;
conversions of integers at 16 lanes a cycle and processor), beside the bytes at 4.45 TB/s:

                                   f16           int8          fp8           int4
    shared tiles: instructions     440           1404          1032          1156
      of these conversions         0             128           64            128
      barriers of a tile           9             14            11            16
      issue, conversions           7.8 us        25, 18 us     18, 9 us      20, 18 us
      measured on an H200          51.9 us       62.1 us       47.8 us       66.8 us
    by warps: instructions         233           389           258
      of these conversions         36            180           84
      barriers of a tile           0             0             0
      issue                        4.1 us        6.9 us        4.6 us
    bytes                          30.2 us       16.0 us       15.6 us       9.4 us

With 128 registers for int8 and fp8, 168 for f16, 16 and 12 warps of a processor have 4 and 8 KiB each under
way: some 30 KiB have to be for 4.45 TB/s at 0.9 us.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .splits import LOG2E
from .target import INTERPRETED, fetch_lines

SMALLEST = tl.constexpr(1e-20)  # of the scales that the reference follows
# inline assembly by which bytes become f16: of a word's four, and of the bytes of two words pair by pair
INT8_NUMBERS = tl.constexpr(
    """{ .reg .b32 t, p, q, c; xor.b32 t, $2, 0x80808080; mov.b32 c, 0x64806480;
    prmt.b32 p, t, 0x64646464, 0x4140; prmt.b32 q, t, 0x64646464, 0x4342;
    sub.f16x2 $0, p, c; sub.f16x2 $1, q, c; }"""
)
FP8_NUMBERS = tl.constexpr(
    """{ .reg .b16 p, q; mov.b32 {p, q}, $2;
    cvt.rn.f16x2.e4m3x2 $0, p; cvt.rn.f16x2.e4m3x2 $1, q; }"""
)
INT8_PAIRS = tl.constexpr(
    """{ .reg .b32 t, u, x, y, p, q, r, s, c; mov.b32 c, 0x64806480;
    xor.b32 x, $4, 0x80808080; xor.b32 y, $5, 0x80808080;
    prmt.b32 t, x, y, 0x5140; prmt.b32 u, x, y, 0x7362;
    prmt.b32 p, t, 0x64646464, 0x4140; prmt.b32 q, t, 0x64646464, 0x4342;
    prmt.b32 r, u, 0x64646464, 0x4140; prmt.b32 s, u, 0x64646464, 0x4342;
    sub.f16x2 $0, p, c; sub.f16x2 $1, q, c; sub.f16x2 $2, r, c; sub.f16x2 $3, s, c; }"""
)
FP8_PAIRS = tl.constexpr(
    """{ .reg .b32 t, u; .reg .b16 p, q, r, s;
    prmt.b32 t, $4, $5, 0x5140; prmt.b32 u, $4, $5, 0x7362; mov.b32 {p, q}, t; mov.b32 {r, s}, u;
    cvt.rn.f16x2.e4m3x2 $0, p; cvt.rn.f16x2.e4m3x2 $1, q;
    cvt.rn.f16x2.e4m3x2 $2, r; cvt.rn.f16x2.e4m3x2 $3, s; }"""
)


def by_warps(dtype: str, dim: int) -> bool:
    """Whether keys or values of this type and width can be loaded so."""
    return dtype in ("f16", "int8", "fp8") and dim in (64, 128)


@triton.jit
def _log2(x):
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _byte(words, index: tl.constexpr, TYPE: tl.constexpr):
    """One byte of each word, as f16; as the interpreter does it."""
    number = (words << (24 - 8 * index)) >> 24
    if TYPE == "fp8":
        return number.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return number.to(tl.float16)


@triton.jit
def _halves(words):
    """The two f16 numbers of each word, beside each other in a new last dimension."""
    low = words.to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, (words >> 16).to(tl.int16).to(tl.float16, bitcast=True))


@triton.jit
def _numbers(words, TYPE: tl.constexpr):
    """The four numbers of each word of bytes, f16 [..., 2, 2]: number a + 2 b at (a, b)."""
    if INTERPRETED:
        first = tl.join(_byte(words, 0, TYPE), _byte(words, 1, TYPE))
        return tl.join(first, tl.join(_byte(words, 2, TYPE), _byte(words, 3, TYPE)))
    else:
        ASSEMBLY: tl.constexpr = INT8_NUMBERS if TYPE == "int8" else FP8_NUMBERS
        first, second = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
        return tl.join(_halves(first), _halves(second))


@triton.jit
def _pairs(x, y, TYPE: tl.constexpr):
    """The four numbers of each word of two positions, f16 [..., 2, 2, 2]: number a + 2 b of position e at
    (e, a, b)."""
    if INTERPRETED:
        a, b = tl.join(_byte(x, 0, TYPE), _byte(y, 0, TYPE)), tl.join(_byte(x, 1, TYPE), _byte(y, 1, TYPE))
        c, d = tl.join(_byte(x, 2, TYPE), _byte(y, 2, TYPE)), tl.join(_byte(x, 3, TYPE), _byte(y, 3, TYPE))
        return tl.join(tl.join(a, b), tl.join(c, d))
    else:
        ASSEMBLY: tl.constexpr = INT8_PAIRS if TYPE == "int8" else FP8_PAIRS
        a, b, c, d = tl.inline_asm_elementwise(
            ASSEMBLY, "=r,=r,=r,=r,r,r", [x, y], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        return tl.join(tl.join(_halves(a), _halves(b)), tl.join(_halves(c), _halves(d)))


@triton.jit
def _keys(words, PARTS: tl.constexpr, DIM: tl.constexpr, TYPE: tl.constexpr):
    """Keys to multiply [PARTS, N / PARTS, DIM] of words [N, chunks, 16]."""
    COUNT: tl.constexpr = words.shape[0] // PARTS
    if TYPE == "f16":
        numbers = tl.reshape(_halves(words), (COUNT // 8, PARTS, 8, DIM // 32, 4, 2, 2, 2))
        keys = tl.permute(numbers, (1, 0, 2, 3, 5, 4, 6, 7))
    else:
        numbers = tl.reshape(_numbers(words, TYPE), (COUNT // 8, PARTS, 8, DIM // 64, 4, 4, 2, 2))
        keys = tl.permute(numbers, (1, 0, 2, 3, 5, 4, 7, 6))
    return tl.reshape(keys, (PARTS, COUNT, DIM))


@triton.jit
def _queries(query, PARTS: tl.constexpr, DIM: tl.constexpr, TYPE: tl.constexpr):
    """Queries [M, DIM] for every part [PARTS, DIM, M], with their columns in the order of `_keys`."""
    M: tl.constexpr = query.shape[0]
    FOURS: tl.constexpr = 2 if TYPE == "f16" else 4  # groups of four columns in 16 bytes
    query = tl.permute(tl.reshape(query, (M, DIM // (16 * FOURS), 4, FOURS, 4)), (0, 1, 3, 2, 4))
    return tl.broadcast_to(tl.reshape(tl.trans(tl.reshape(query, (M, DIM))), (1, DIM, M)), (PARTS, DIM, M))


@triton.jit
def _values(words, PARTS: tl.constexpr, DIM: tl.constexpr, TYPE: tl.constexpr):
    """Values to multiply [PARTS, DIM, N / PARTS] of words [4, 8, N / 8, 2, .., ..]; see also `_columns`."""
    EIGHTS: tl.constexpr = words.shape[2] // PARTS
    EACH: tl.constexpr = words.shape[4] * words.shape[5]
    x, y = tl.split(tl.permute(words, (0, 1, 2, 4, 5, 3)))
    if TYPE == "f16":
        numbers = tl.join(_halves(x), _halves(y))
        numbers = tl.reshape(numbers, (4, 8, EIGHTS // 2, 2, PARTS, EACH, 2, 2))
        values = tl.permute(numbers, (4, 5, 6, 1, 2, 0, 3, 7))
    else:
        numbers = tl.reshape(_pairs(x, y, TYPE), (4, 8, EIGHTS // 2, 2, PARTS, EACH, 2, 2, 2))
        values = tl.permute(numbers, (4, 5, 8, 7, 1, 2, 0, 3, 6))
    return tl.reshape(values, (PARTS, DIM, 8 * EIGHTS))


@triton.jit
def _chances(p):
    """Probabilities [PARTS, COUNT, M] as the other side of `_values`, f16."""
    PARTS: tl.constexpr = p.shape[0]
    COUNT: tl.constexpr = p.shape[1]
    M: tl.constexpr = p.shape[2]
    p = tl.permute(tl.reshape(p.to(tl.float16), (PARTS, COUNT // 16, 2, 4, 2, M)), (0, 1, 3, 2, 4, 5))
    return tl.reshape(p, (PARTS, COUNT, M))


@triton.jit
def _columns(acc, ROW: tl.constexpr):
    """[DIM, M] in the order of `_values` as [M, DIM] in that of the cache, whose rows have ROW words."""
    DIM: tl.constexpr = acc.shape[0]
    M: tl.constexpr = acc.shape[1]
    WORDS: tl.constexpr = min(4, ROW // 8)
    acc = tl.reshape(acc, (ROW // 8 // WORDS, WORDS, DIM // ROW, 8, M))
    return tl.reshape(tl.permute(acc, (4, 0, 3, 1, 2)), (M, DIM))


@triton.jit
def _load(
    base, stride: tl.constexpr, start, offset, inner, end, ring, WINDOW: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """What lies at ``inner`` of the rows of positions start + offset.

    Zeros for positions from ``end`` on with MASKED; without, nothing of a tile that begins there.
    """
    place = offset * stride
    if WINDOW:
        pointers = base + (start + offset) % ring * stride + inner
    else:
        pointers = base + start * stride + place + inner
    if MASKED:
        return tl.load(pointers, place + inner * 0 < (end - start) * stride, 0)
    return tl.load(pointers, (start + (place + inner) * 0) < end)


@triton.jit
def _offsets(N: tl.constexpr, PARTS: tl.constexpr):
    """Positions of scores [PARTS, N / PARTS] within their tile: eight after eight go to the parts in turn."""
    column = tl.arange(0, N // PARTS)[None, :]
    return column // 8 * (8 * PARTS) + tl.arange(0, PARTS)[:, None] * 8 + column % 8


@triton.jit
def _load_scales(
    scales, start, end, ring, N: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Scale and offset [PARTS, N / PARTS] of a tile's positions, as far as the type has them."""
    offset = _offsets(N, PARTS)
    scale, base = offset * 0.0, offset * 0.0
    if TYPE != "f16":
        scale = _load(scales, 1, start, offset, 0, end, ring, WINDOW, MASKED)
    if TYPE == "int8":
        base = _load(scales + ring, 1, start, offset, 0, end, ring, WINDOW, MASKED)
    return scale, base


@triton.jit
def _load_keys(
    data, start, end, ring, N: tl.constexpr, ROW: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows of ROW words of a tile's keys [N, ROW / 16, 16]."""
    offset = tl.arange(0, N)[:, None, None]
    word = tl.arange(0, ROW // 16)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    return _load(data, ROW, start, offset, word, end, ring, WINDOW, MASKED)


@triton.jit
def _load_values(
    data, start, end, ring, N: tl.constexpr, ROW: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Rows of ROW words of a tile's values [4, 8, N / 8, 2, ROW / 8 / WORDS, WORDS].

    That is pairs of eight positions, chunks, eights, positions of a pair, further chunks, words.
    """
    WORDS: tl.constexpr = min(4, ROW // 8)
    eight = tl.arange(0, N // 8)[None, None, :, None, None, None]
    pair = tl.arange(0, 4)[:, None, None, None, None, None]
    offset = eight * 8 + 2 * pair + tl.arange(0, 2)[None, None, None, :, None, None]
    chunk = tl.arange(0, 8)[None, :, None, None, None, None]
    chunk = tl.arange(0, ROW // 8 // WORDS)[None, None, None, None, :, None] * 8 + chunk
    word = chunk * WORDS + tl.arange(0, WORDS)[None, None, None, None, None, :]
    return _load(data, ROW, start, offset, word, end, ring, WINDOW, MASKED)


@triton.jit
def _fetch(data, others, start, end, ring, N: tl.constexpr, ROW: tl.constexpr, WINDOW: tl.constexpr):
    """Asks for a tile's rows of ROW words of two tensors in the L2 cache; beyond the last row for its end."""
    LINES: tl.constexpr = N * ROW // 32
    line = tl.arange(0, 2 * LINES)
    place = tl.minimum(start * ROW + 32 * (line % LINES), end * ROW - 1)
    if WINDOW:
        place = place % (ring * ROW)
    fetch_lines(tl.where(line < LINES, (data + place).to(tl.int64), (others + place).to(tl.int64)))


@triton.jit
def _fetch_tile(
    start, end, k, k_scales, v, v_scales, ring, N: tl.constexpr, WINDOW: tl.constexpr,
    K_TYPE: tl.constexpr, K_ROW: tl.constexpr, V_TYPE: tl.constexpr, V_ROW: tl.constexpr,
):  # fmt: skip
    if K_ROW == V_ROW:
        _fetch(k, v, start, end, ring, N, K_ROW, WINDOW)
    else:
        _fetch(k, k, start, end, ring, N, K_ROW, WINDOW)
        _fetch(v, v, start, end, ring, N, V_ROW, WINDOW)
    if K_TYPE != "f16":  # the second plane of int8 or the first one again
        _fetch(k_scales, k_scales + (ring if K_TYPE == "int8" else 0), start, end, ring, N, 1, WINDOW)
    if V_TYPE != "f16":
        _fetch(v_scales, v_scales + (ring if V_TYPE == "int8" else 0), start, end, ring, N, 1, WINDOW)


@triton.jit
def _load_tile(
    start, end, k, k_scales, v, v_scales, ring, N: tl.constexpr, PARTS: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, K_TYPE: tl.constexpr, K_ROW: tl.constexpr, V_TYPE: tl.constexpr,
    V_ROW: tl.constexpr,
):  # fmt: skip
    """Words, scale and offset of keys, and of values."""
    k_words = _load_keys(k, start, end, ring, N, K_ROW, WINDOW, MASKED)
    k_scale, k_base = _load_scales(k_scales, start, end, ring, N, PARTS, K_TYPE, WINDOW, MASKED)
    v_words = _load_values(v, start, end, ring, N, V_ROW, WINDOW, MASKED)
    v_scale, v_base = _load_scales(v_scales, start, end, ring, N, PARTS, V_TYPE, WINDOW, MASKED)
    return k_words, k_scale, k_base, v_words, v_scale, v_base


@triton.jit
def _scores(s, scale, base, query_sum, unit, softcap, TYPE: tl.constexpr, CAPPED: tl.constexpr):
    """Of products with stored keys [PARTS, COUNT, M] two factors whose product is the score in base 2.

    Sums of products are fma here and where scores are used, so that no compiler chooses between one and two
    roundings in the tiles that need a mask otherwise than in those that do not.
    """
    factor = unit
    if TYPE == "int8":
        s = tl.fma(s, (scale * unit)[:, :, None], query_sum[None, None, :] * (base * unit)[:, :, None])
        factor = 1.0
    elif TYPE == "fp8":
        factor = (scale * unit)[:, :, None]
    if CAPPED:  # softcap tanh(s / softcap) = softcap - 2 softcap / (e^(2 s / softcap) + 1)
        s = softcap - 2 * softcap / (tl.exp2(s * factor * (2 * LOG2E / softcap)) + 1)
        factor = LOG2E
    return s, factor


@triton.jit
def _walk(
    m, l, shift, acc, k_words, k_scale, k_base, v_words, v_scale, v_base,
    queries, query_sum, position, begin, end, k, k_scales, v, v_scales, ring, unit, softcap,
    N: tl.constexpr, PARTS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    K_DIM: tl.constexpr, K_TYPE: tl.constexpr, K_ROW: tl.constexpr,
    V_DIM: tl.constexpr, V_TYPE: tl.constexpr, V_ROW: tl.constexpr, CAPPED: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """The tiles [begin, end), the first of which is loaded; a tile is asked for as soon as one is multiplied.

    m [PARTS, M]; l, shift [PARTS, COUNT, M], added up over COUNT at the end; acc [PARTS, V_DIM, M].
    """
    for start in range(begin, end, N):
        after = start + N
        if AHEAD:
            _fetch_tile(
                after + AHEAD * N, end, k, k_scales, v, v_scales, ring, N, WINDOW,
                K_TYPE, K_ROW, V_TYPE, V_ROW,
            )  # fmt: skip
        s = tl.dot(_keys(k_words, PARTS, K_DIM, K_TYPE), queries, out_dtype=tl.float32)
        k_words = _load_keys(k, after, end, ring, N, K_ROW, WINDOW, MASKED)
        s, factor = _scores(s, k_scale, k_base, query_sum, unit, softcap, K_TYPE, CAPPED)
        k_scale, k_base = _load_scales(k_scales, after, end, ring, N, PARTS, K_TYPE, WINDOW, MASKED)
        scaled = s * factor
        if V_TYPE != "f16":
            scaled = tl.fma(s, factor, _log2(tl.maximum(v_scale, SMALLEST))[:, :, None])
        if MASKED:
            at = (start + _offsets(N, PARTS))[:, :, None]
            seen = at <= position[None, None, :]
            if WINDOW:
                seen = seen & (at > position[None, None, :] - WINDOW)
            scaled = tl.where(seen, scaled, float("-inf"))
        most_s = tl.maximum(m, tl.max(scaled, 1))
        reference = most_s
        if MASKED:  # a row that has seen nothing yet
            reference = tl.where(most_s == float("-inf"), 0.0, most_s)
        above = tl.fma(s, factor, -reference[:, None, :])
        if MASKED:
            above = tl.where(seen, above, float("-inf"))
        p = tl.exp2(above)
        correction = tl.exp2(m - reference)[:, None, :]
        m = most_s
        l = tl.fma(l, correction, p)
        if V_TYPE == "int8":
            base = v_base[:, :, None]
            if MASKED:  # what is no number stays with those who see it
                base = tl.where(seen, base, 0.0)
            shift = tl.fma(p, base, shift * correction)
        if V_TYPE != "f16":
            p = p * v_scale[:, :, None]
            if MASKED:
                p = tl.where(seen, p, 0.0)
        v_scale, v_base = _load_scales(v_scales, after, end, ring, N, PARTS, V_TYPE, WINDOW, MASKED)
        acc = tl.dot(_values(v_words, PARTS, V_DIM, V_TYPE), _chances(p), acc * correction)
        v_words = _load_values(v, after, end, ring, N, V_ROW, WINDOW, MASKED)
    return m, l, shift, acc


@triton.jit
def attend_by_warps(
    query, query_sum, position, begin, most, k, k_scales, v, v_scales, row, ring, scale, softcap,
    N: tl.constexpr, PARTS: tl.constexpr, WINDOW: tl.constexpr,
    K_DIM: tl.constexpr, K_TYPE: tl.constexpr, K_BYTES: tl.constexpr, K_PLANES: tl.constexpr,
    V_DIM: tl.constexpr, V_TYPE: tl.constexpr, V_BYTES: tl.constexpr, V_PLANES: tl.constexpr,
    CAPPED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """m, l, shift [M] and acc [M, V_DIM] of the tiles [begin, most); see `attention._tiles`.

    Tiles are asked for before the queries are waited for.
    """
    M: tl.constexpr = query.shape[0]
    K_ROW: tl.constexpr = K_DIM // 2 if K_TYPE == "f16" else K_DIM // 4
    V_ROW: tl.constexpr = V_DIM // 2 if V_TYPE == "f16" else V_DIM // 4
    k = (k + row * ring * K_BYTES).to(tl.pointer_type(tl.int32), bitcast=True)
    v = (v + row * ring * V_BYTES).to(tl.pointer_type(tl.int32), bitcast=True)
    if K_PLANES:
        k_scales += row * ring * K_PLANES
    if V_PLANES:
        v_scales += row * ring * V_PLANES
    # tiles from `closed` on have positions that some row does not see, or there are just two
    closed = begin
    if not WINDOW:
        closed = tl.maximum(begin, tl.minimum(tl.min(position, 0) + 1, most))
        closed = tl.where(most - begin > 2 * N, closed, begin) // N * N
    first = _load_tile(
        begin, tl.where(closed > begin, closed, most), k, k_scales, v, v_scales, ring, N, PARTS, WINDOW, True,
        K_TYPE, K_ROW, V_TYPE, V_ROW,
    )  # fmt: skip
    unit = scale if CAPPED else scale * LOG2E
    queries = _queries(query, PARTS, K_DIM, K_TYPE)
    tl.debug_barrier()  # once, not for every tile
    m = tl.full((PARTS, M), float("-inf"), tl.float32)
    l = tl.zeros((PARTS, N // PARTS, M), tl.float32)
    shift = tl.zeros((PARTS, N // PARTS, M), tl.float32)
    acc = tl.zeros((PARTS, V_DIM, M), tl.float32)
    if not WINDOW:
        m, l, shift, acc = _walk(
            m, l, shift, acc, *first, queries, query_sum, position, begin, closed,
            k, k_scales, v, v_scales, ring, unit, softcap, N, PARTS, WINDOW, False,
            K_DIM, K_TYPE, K_ROW, V_DIM, V_TYPE, V_ROW, CAPPED, AHEAD,
        )  # fmt: skip
        if closed > begin:
            first = _load_tile(
                closed, most, k, k_scales, v, v_scales, ring, N, PARTS, WINDOW, True, K_TYPE, K_ROW, V_TYPE,
                V_ROW,
            )  # fmt: skip
    m, l, shift, acc = _walk(
        m, l, shift, acc, *first, queries, query_sum, position, closed, most,
        k, k_scales, v, v_scales, ring, unit, softcap, N, PARTS, WINDOW, True,
        K_DIM, K_TYPE, K_ROW, V_DIM, V_TYPE, V_ROW, CAPPED, AHEAD,
    )  # fmt: skip
    most_m = tl.max(m, 0)
    reference = tl.where(most_m == float("-inf"), 0.0, most_m)
    weight = tl.exp2(m - reference[None, :])
    acc = _columns(tl.sum(acc * weight[:, None, :], 0), V_ROW)
    return most_m, tl.sum(tl.sum(l, 1) * weight, 0), tl.sum(tl.sum(shift, 1) * weight, 0), acc
