"""Launches at the shapes of Llama-3.1-8B with 32k of context, to be compiled for sm_90."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from compile_sm90 import Launch

from gristmill.kernels.triton.append import AS_THEY_ARE, Preparation, Rotary, append, rope_tables
from gristmill.kernels.triton.attention import attend, can_quantize
from gristmill.kernels.triton.attention_tilings import Tiling, tiling, tilings
from gristmill.kernels.triton.cache import allocate
from gristmill.kernels.triton.gather import gather_rows
from gristmill.kernels.triton.history import mark_seen, record
from gristmill.kernels.triton.norms import layer_norm, rms_norm
from gristmill.kernels.triton.pointwise import pointwise
from gristmill.kernels.triton.quantize import Quantized, room
from gristmill.kernels.triton.sampling import Options, allocate_workspace, sample
from gristmill.kernels.triton.splits import allocate_partials
from gristmill.kernels.triton.stream import read

HEADS, KV_HEADS, DIM, CONTEXT = 32, 8, 128, 32768
TYPES = ("f32", "f16", "int8", "fp8", "int4")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def norm_launches() -> Iterator[Launch]:
    for width in (4096, 16384):
        x, weight = empty(4, width), empty(width)
        yield f"rms_norm {width}", partial(rms_norm, x, weight, x, 1e-5, x)
        yield f"layer_norm {width}", partial(layer_norm, x, weight, weight, x, 1e-5, x)


def append_launches(warps_of: tuple[int, ...]) -> Iterator[Launch]:
    rows = 4
    inv_freq = empty(DIM // 2, dtype=torch.float32)
    preparation = rotated(rows, DIM)
    assert preparation.rope is not None
    cos = preparation.rope.cos
    yield "rope tables", partial(rope_tables, indices(rows), inv_freq, 1.0, cos, cos)
    qkv = empty(rows, (HEADS + 2 * KV_HEADS) * DIM)
    q, k, v = qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 1)
    for warps in warps_of:
        for dtype in TYPES:
            cache = allocate(dtype, dtype, DIM, DIM, KV_HEADS, 2, CONTEXT, device="meta")
            chosen = rotated(rows, DIM, dtype == "int4")
            yield f"append {dtype}, {warps} warps", partial(
                append, k, v, indices(rows), indices(rows), cache, chosen, warps
            )
            if warps == 1:
                queries = empty(rows, HEADS * DIM, dtype=torch.float16)
                yield f"append {dtype} and queries", partial(
                    append, k, v, indices(rows), indices(rows), cache, chosen, 1, q, queries
                )
    plain = allocate("f16", "int8", DIM, DIM, KV_HEADS, 2, CONTEXT, device="meta")
    yield "append as it is", partial(append, k, v, indices(rows), indices(rows), plain)


def rotated(rows: int, dim: int, all_steps: bool = False) -> Preparation:
    """Rope alone, or norms and a Hadamard rotation as well."""
    cos = empty(rows, dim // 2, dtype=torch.float32)
    norm = empty(dim, dtype=torch.float32) if all_steps else None
    return Preparation(norm, norm, 1e-6, Rotary(cos, cos), dim & -dim if all_steps else 0)


def decode_launches() -> Iterator[Launch]:
    """Rows that are their slots' only ones: append, attention and what splits leave, in one kernel."""
    for dtype in TYPES:
        for context in (256, CONTEXT):
            for all_steps in (False, True):
                name = f"decoding at {context}, {dtype}{', all steps' * all_steps}"
                yield name, decoding(1, dtype, context, all_steps=all_steps)
    for dim, kv_heads, window, softcap, dtype in (
        (64, 8, 128, 0.0, "int8"), (256, 8, 4096, 50.0, "int8"), (256, 8, 4096, 50.0, "int4"),
        (80, 32, 0, 0.0, "f16"), (96, 8, 2048, 0.0, "fp8"), (128, 1, 0, 0.0, "int8"), (96, 4, 0, 0.0, "f32"),
    ):  # fmt: skip
        yield f"decoding heads of {dim}, {kv_heads} for kv, {dtype}", decoding(
            2, dtype, 8192, dim, kv_heads, window, softcap, dim == 256, sinks=True
        )
    for dtype in ("f16", "int8", "fp8"):  # what else a measurement may choose
        cache = allocate(dtype, dtype, DIM, DIM, KV_HEADS, 2, CONTEXT, device="meta")
        for tiles in tilings(cache, HEADS, 4, 1)[1:]:
            yield f"decoding at {CONTEXT}, {dtype}, {tiles}", decoding(1, dtype, CONTEXT, tiles=tiles)


def decoding(
    rows: int, dtype: str, context: int, dim: int = DIM, kv_heads: int = KV_HEADS, window: int = 0,
    softcap: float = 0.0, all_steps: bool = False, sinks: bool = False, tiles: Tiling | None = None,
) -> Callable[[], object]:  # fmt: skip
    """The launch of new rows in f32, as the executor's are; int8 beside the result where that is possible."""
    cache = allocate(dtype, dtype, dim, dim, kv_heads, 2, context, window, device="meta")
    tiles = tiles or tiling(cache, HEADS, max(1, 16 // (HEADS // kv_heads)), rows)
    qkv = empty(rows, (HEADS + 2 * kv_heads) * dim, dtype=torch.float32)
    q, k, v = qkv.split([HEADS * dim, kv_heads * dim, kv_heads * dim], 1)
    out = empty(rows, HEADS * dim, dtype=torch.float32)
    quantized = None
    if can_quantize(cache, HEADS, 32):
        (q_shape, q_type), (scale_shape, scale_type) = room(rows, HEADS * dim, 32)
        numbers, scales = empty(*q_shape, dtype=q_type), empty(*scale_shape, dtype=scale_type)
        quantized = Quantized(numbers, scales, 32)
    return partial(
        attend, q, cache, indices(rows), indices(rows), 0.1, tiles, out, rotated(rows, dim, all_steps),
        softcap, empty(HEADS) if sinks else None, (k, v), None,
        allocate_partials(rows, HEADS, kv_heads, tiles.splits, dim, "meta"), quantized,
    )  # fmt: skip


def attention_launches(sizes: tuple[tuple[int, int], ...]) -> Iterator[Launch]:
    """Rows in blocks, so many of each."""
    for rows, blocks in sizes:
        few = rows == blocks
        q = empty(rows, HEADS * DIM, dtype=torch.float32 if few else torch.float16)
        out = empty(rows, HEADS * DIM, dtype=torch.float32)
        for dtype in TYPES:
            cache = allocate(dtype, dtype, DIM, DIM, KV_HEADS, 2, CONTEXT, device="meta")
            tiles = tiling(cache, HEADS, min(rows, 4) if few else rows, blocks)
            partials = allocate_partials(rows, HEADS, KV_HEADS, tiles.splits, DIM, "meta")
            where = (indices(rows), indices(rows))
            yield f"{rows} rows, {dtype}", partial(
                attend, q, cache, *where, 0.1, tiles, out,
                rotated(rows, DIM, dtype == "int4") if few else AS_THEY_ARE, blocks=indices(blocks, 4),
                partials=partials,
            )  # fmt: skip


def odd_attention_launches() -> Iterator[Launch]:
    """Wide heads, windows, softcap and sinks."""
    for k_dim, v_dim, kv_heads, window, softcap in (
        (192, 128, 16, 0, 0.0), (256, 256, 8, 4096, 50.0), (80, 80, 32, 0, 0.0), (96, 96, 8, 2048, 0.0)
    ):  # fmt: skip
        rows = 512
        q, out = empty(rows, 32 * k_dim, dtype=torch.float16), empty(rows, 32 * v_dim)
        cache = allocate("int8", "int4", k_dim, v_dim, kv_heads, 2, 8192, window, device="meta")
        tiles = tiling(cache, 32, rows, rows // 16)
        partials = allocate_partials(rows, 32, kv_heads, tiles.splits, v_dim, "meta")
        where = (indices(rows), indices(rows))
        yield f"attention of {k_dim} and {v_dim}, {rows} rows", partial(
            attend, q, cache, *where, 0.1, tiles, out, AS_THEY_ARE, softcap, empty(32), None,
            indices(rows // 16, 4), partials,
        )  # fmt: skip


def launches() -> Iterator[Launch]:
    """What takes a minute and a half; the rest is in triton_more_attention_launches.py."""
    for dtype in TYPES:
        yield f"decoding at {CONTEXT}, {dtype}", decoding(1, dtype, CONTEXT)
    yield "decoding at 256, int8", decoding(1, "int8", 256)
    yield "decoding with all steps", decoding(1, "int4", CONTEXT, all_steps=True)
    yield from attention_launches(((4, 4), (2048, 65)))
    yield from norm_launches()
    yield from append_launches((1,))
    yield from other_launches()


def more_launches() -> Iterator[Launch]:
    yield from decode_launches()
    yield from attention_launches(((256, 256),))
    yield from odd_attention_launches()
    yield from append_launches((4, 8))


def other_launches() -> Iterator[Launch]:
    x, logits = empty(4, 14336), empty(4, 128256, dtype=torch.float32)
    yield "gather", lambda: gather_rows(x, indices(4), x)
    steps = [["gelu_tanh", 0], ["mul", 2, 1], ["div", 3, {"const": 3.0}], ["rsqrt", 4], ["maximum", 5, 0]]
    yield "pointwise", lambda: pointwise([x, x], steps, x)
    floats = empty(4, dtype=torch.float32)
    wide = empty(4, dtype=torch.int64)
    options = Options(floats, indices(4), floats, wide, wide, indices(4), floats)
    seen = empty(4, 128256, dtype=torch.int8)
    workspace = allocate_workspace(4, 128256, "meta")
    yield "sampling", lambda: sample(logits, options, workspace, indices(4), seen)
    yield "greedy", lambda: sample(logits, options, workspace, indices(4), greedy=True)
    history = indices(9, CONTEXT)
    yield "history", lambda: record(indices(4), indices(4), indices(4), history)
    where = (indices(4), indices(64), indices(64))
    yield "seen", lambda: mark_seen(history, *where, floats, seen)
    yield "stream", lambda: read(indices(1 << 27), indices(8 * 132))
