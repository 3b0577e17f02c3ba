"""Launches at the shapes of Llama-3.1-8B with 32k of context, to be compiled for sm_90."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from compile_sm90 import Launch

from gristmill.kernels.triton.append import Rotary, append, rope_tables
from gristmill.kernels.triton.attention import allocate_partials, attend, tiling, tilings
from gristmill.kernels.triton.cache import allocate
from gristmill.kernels.triton.gather import gather_rows
from gristmill.kernels.triton.history import mark_seen, record
from gristmill.kernels.triton.norms import layer_norm, rms_norm
from gristmill.kernels.triton.pointwise import pointwise
from gristmill.kernels.triton.sampling import Options, allocate_workspace, sample
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


def append_launches() -> Iterator[Launch]:
    rows = 4
    cos = empty(rows, DIM // 2, dtype=torch.float32)
    inv_freq = empty(DIM // 2, dtype=torch.float32)
    yield "rope tables", partial(rope_tables, indices(rows), inv_freq, 1.0, cos, cos)
    rope = Rotary(cos, cos)
    qkv, queries = empty(rows, (HEADS + 2 * KV_HEADS) * DIM), empty(rows, HEADS * DIM, dtype=torch.float16)
    q, k, v = qkv.split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], 1)
    for dtype in TYPES:
        cache = allocate(dtype, dtype, DIM, DIM, KV_HEADS, 2, CONTEXT, device="meta")
        norm = empty(DIM) if dtype == "int4" else None
        hadamard = DIM if dtype == "int4" else 0
        yield f"append {dtype}", partial(
            append, q, k, v, indices(rows), indices(rows), cache, queries, norm, norm, 1e-6, rope, hadamard
        )
    plain = allocate("f16", "int8", DIM, DIM, KV_HEADS, 2, CONTEXT, device="meta")
    yield "append without queries", partial(append, None, k, v, indices(rows), indices(rows), plain)


def attention_launches() -> Iterator[Launch]:
    for rows, blocks in ((1, 1), (4, 4), (256, 256), (2048, 65)):
        q, out = empty(rows, HEADS * DIM, dtype=torch.float16), empty(rows, HEADS * DIM)
        for dtype in TYPES:
            cache = allocate(dtype, dtype, DIM, DIM, KV_HEADS, 2, CONTEXT, device="meta")
            tiles = tiling(cache, HEADS, min(rows, 4) if rows == blocks else rows, blocks)
            partials = allocate_partials(rows, HEADS, tiles.splits, DIM, "meta")
            table = indices(blocks, 4) if rows in (4, 2048) else None
            where = (indices(rows), indices(rows))
            yield f"attention {dtype} {rows}", partial(
                attend, q, cache, *where, 0.1, tiles, out, blocks=table, partials=partials
            )
    yield from warp_attention_launches()
    yield from odd_attention_launches()


def warp_attention_launches() -> Iterator[Launch]:
    """What else a measurement may choose for one row, and windows, softcap and narrow heads."""
    q, out = empty(1, HEADS * DIM, dtype=torch.float16), empty(1, HEADS * DIM)
    where = indices(1), indices(1)
    for dtype in ("f16", "int8", "fp8"):
        cache = allocate(dtype, dtype, DIM, DIM, KV_HEADS, 2, CONTEXT, device="meta")
        for tiles in tilings(cache, HEADS, 4, 1)[1:-1]:
            partials = allocate_partials(1, HEADS, tiles.splits, DIM, "meta")
            yield f"attention {dtype} {tiles}", partial(
                attend, q, cache, *where, 0.1, tiles, out, partials=partials
            )
    for k_dtype, v_dtype, dim, softcap in (("int8", "fp8", 128, 50.0), ("f16", "int8", 64, 0.0)):
        cache = allocate(k_dtype, v_dtype, dim, dim, KV_HEADS, 2, 8192, 4096, device="meta")
        tiles, width = tiling(cache, HEADS, 4, 1), HEADS * dim
        partials = allocate_partials(1, HEADS, tiles.splits, dim, "meta")
        yield f"attention of {dim} in a window", partial(
            attend, q[:, :width], cache, *where, 0.1, tiles, out[:, :width], softcap, empty(32),
            partials=partials,
        )  # fmt: skip


def odd_attention_launches() -> Iterator[Launch]:
    """Wide heads, windows, softcap and sinks."""
    for k_dim, v_dim, kv_heads, window, softcap in (
        (192, 128, 16, 0, 0.0), (256, 256, 8, 4096, 50.0), (80, 80, 32, 0, 0.0), (96, 96, 8, 2048, 0.0)
    ):  # fmt: skip
        for rows in (1, 512):
            q, out = empty(rows, 32 * k_dim, dtype=torch.float16), empty(rows, 32 * v_dim)
            cache = allocate("int8", "int4", k_dim, v_dim, kv_heads, 2, 8192, window, device="meta")
            tiles = tiling(cache, 32, rows, 1 if rows == 1 else rows // 16)
            partials = allocate_partials(rows, 32, tiles.splits, v_dim, "meta")
            table = indices(rows // 16, 4) if rows > 1 else None
            where = (indices(rows), indices(rows))
            yield f"attention of {k_dim} and {v_dim}, {rows} rows", partial(
                attend, q, cache, *where, 0.1, tiles, out, softcap, empty(32), table, partials
            )


def launches() -> Iterator[Launch]:
    yield from attention_launches()
    yield from norm_launches()
    yield from append_launches()
    yield from other_launches()


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
