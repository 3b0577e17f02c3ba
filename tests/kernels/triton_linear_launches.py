"""The launches of linears that are compiled for sm_90, on matrices of the shapes of Llama 3.1 8B."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from compile_sm90 import Launch

from gristmill.kernels.triton.embedding import embedding
from gristmill.kernels.triton.handover import Handover
from gristmill.kernels.triton.linear import (
    counters,
    group_of,
    linear,
    plan,
    prepared_bytes,
    prepared_input,
    workspace_bytes,
)
from gristmill.kernels.triton.linear_configs import BUCKETS, FAMILIES, TABLE, bucket, choose
from gristmill.kernels.triton.matrix import Matrix, meta_matrix

# format -> group, symmetric
CASES = {
    "int4": (128, True),
    "int8": (0, True),
    "fp8": (0, True),
    "int3": (128, False),
    "int2": (32, True),
    "bf16": (0, True),
    "f32": (0, True),
}


INTEGERS = {"int4": 128, "int8": 64, "int3": 128, "int2": 32}  # format -> activation group


def call(
    m: Matrix, tokens: int, glu: bool = False, splits: int = 1, act_group: int = 0, **more: bool
) -> None:
    """What a decoder asks of a linear, with activations in f32 as the executor has them."""
    dense = more.get("dense", False)
    chosen = choose(m, tokens, act_group)
    config = replace(TABLE[FAMILIES.get(m.format, m.format)][bucket(tokens)], dense=dense)
    configs = [replace(chosen if act_group else config, splits=splits)]
    p = plan([m], tokens, glu, configs, native_fp8=more.get("native_fp8", False), act_group=act_group)
    n = m.n // 2 if glu else m.n
    x, out = (torch.empty(tokens, w, device="meta") for w in (m.k, n))
    ordered = more.get("order", False)
    order = torch.empty(m.k, dtype=torch.int32, device="meta") if ordered else None
    size = workspace_bytes([m], p, ordered, x.dtype)
    workspace = torch.empty(size, dtype=torch.uint8, device="meta")
    residual = None if glu else out
    given = then = None
    if more.get("handover", False):  # a square product is its own next one
        space = torch.empty(prepared_bytes([m], p, True), dtype=torch.uint8, device="meta")
        given = prepared_input([m], p, space, True, 1e-5)
        weight = torch.empty(n, dtype=torch.bfloat16, device="meta")
        counted = torch.empty(counters(p, n, group_of(p)), dtype=torch.int32, device="meta")
        then = Handover(given, group_of(p), weight, counted)
    linear(
        x, [m], out, p=p, workspace=workspace, residual=residual, order=order,
        activation="silu" if glu else "none", glu=glu, given=given, then=then,
    )  # fmt: skip


def launches() -> Iterator[Launch]:
    for fmt, (group, symmetric) in CASES.items():
        for tokens in BUCKETS:
            m = meta_matrix(fmt, 4096, 14336, group, symmetric)
            name = f"{fmt} {tokens} rows" if tokens > 1 else f"{fmt} one row"
            yield name, partial(call, m, tokens)
        for tokens in ((1, 4, 16) if fmt in ("int4", "int8") else (1, 16)) if fmt in INTEGERS else ():
            m = meta_matrix(fmt, 4096, 14336, group, symmetric)
            yield f"{fmt} by int8, {tokens} rows", partial(call, m, tokens, act_group=INTEGERS[fmt])
    wide = meta_matrix("int4", 28672, 4096, 128)
    yield "gate and up by int8, one row", lambda: call(wide, 1, glu=True, act_group=128)
    yield "gate and up, one row", lambda: call(wide, 1, glu=True)
    yield "gate and up, 16 rows", lambda: call(wide, 16, glu=True)
    yield "splits of ordered columns", lambda: call(wide, 1, glu=True, splits=2, order=True)
    for fmt, group, act_group in (("int4", 128, 128), ("int8", 0, 64), ("bf16", 0, 0), ("fp8", 0, 0)):
        square = meta_matrix(fmt, 4096, 4096, group)
        for tokens in (1, 4, 16) if act_group else (1, 4):
            name = f"{fmt} handed over, {tokens} rows" if tokens > 1 else f"{fmt} handed over, one row"
            yield name, partial(call, square, tokens, act_group=act_group, handover=True)
    gated = meta_matrix("int4", 8192, 4096, 128)
    yield "gate and up handed over, one row", partial(call, gated, 1, True, act_group=128, handover=True)
    fp8 = meta_matrix("fp8", 4096, 4096)
    yield "fp8 by fp8", lambda: call(fp8, 64, native_fp8=True)
    yield "dense", lambda: call(wide, 512, dense=True)
    ids = torch.empty(16, dtype=torch.int32, device="meta")
    out = torch.empty(16, 4096, dtype=torch.bfloat16, device="meta")
    yield "embedding", lambda: embedding(ids, [meta_matrix("int8", 128256, 4096)], out)
