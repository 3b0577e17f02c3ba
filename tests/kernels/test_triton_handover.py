"""What a product prepares for the next one, against the kernels that would otherwise run between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from test_triton_linear import FLOAT32, move, strided
from triton_device import DEVICE
from triton_matrices import random_matrix

from gristmill.kernels.triton.handover import Handover, Prepared
from gristmill.kernels.triton.linear import (
    Plan,
    can_hand_over,
    counters,
    group_of,
    linear,
    plan,
    prepared_bytes,
    prepared_input,
    takes_prepared,
    workspace_bytes,
)
from gristmill.kernels.triton.linear_configs import Config
from gristmill.kernels.triton.matrix import Matrix
from gristmill.kernels.triton.norms import rms_norm
from gristmill.kernels.triton.quantize import Quantized, quantize, room

EPS = 1e-5
INTEGER = Config(8, 8, 1, integer=True)
# format, config, tokens, gated: a pair's programs have half as many columns
AHEAD = {
    "dp4a": ("int4", INTEGER, 1, False),
    "dp4a gated": ("int8", Config(16, 8, 2, integer=True), 3, True),
    "dp4a in splits": ("int4", Config(8, 2, 4, 2, integer=True), 4, False),
    "tiles": ("int8", Config(16, 0, 16, integer=True), 17, False),
    "gated tiles in splits": ("int4", Config(32, 0, 16, 2, integer=True), 7, True),
    "floats": ("bf16", Config(8, 8), 2, False),
    "floats in splits": ("fp8", Config(16, 4, splits=2), 4, True),
}


def run(x: Tensor, m: Matrix, p: Plan, width: int, **rest: Any) -> Tensor:
    workspace = torch.full((workspace_bytes([m], p, False, x.dtype),), 255, dtype=torch.uint8, device=DEVICE)
    out = torch.full((len(x), width), torch.nan, device=DEVICE)
    linear(x, [m], out, p=p, workspace=workspace, **rest)
    return out


def planned(m: Matrix, config: Config, tokens: int, glu: bool, act_group: int) -> Plan:
    return plan([m], tokens, glu, [config], act_group=act_group if config.integer else 0)


def room_for(m: Matrix, p: Plan, normed: bool) -> Prepared:
    space = torch.full((prepared_bytes([m], p, normed),), 255, dtype=torch.uint8, device=DEVICE)
    return prepared_input([m], p, space, normed, EPS)


# floats of few rows are handed over with a norm alone
KINDS = [(name, True, normed) for name in AHEAD for normed in (True, False)]
KINDS += [(name, False, True) for name, (*_, tokens, _) in AHEAD.items() if tokens <= 4]


@pytest.mark.parametrize("name,integers,normed", KINDS)
def test_the_next_product_gets_what_kernels_between_give(name: str, integers: bool, normed: bool) -> None:
    fmt, config, tokens, glu = AHEAD[name]
    k, width = 64, 72  # of which a last group of 64 is cut, and what is stored of it not
    first = move(random_matrix(fmt, 2 * width if glu else width, k)[0])
    second = move(random_matrix("int4" if integers else "bf16", 12, width, 64 if integers else 0, seed=5)[0])
    p = planned(first, config, tokens, glu, 64)
    following = INTEGER if integers else Config(8, 8)
    next_p = planned(second, following, tokens, False, 64)
    group = group_of(next_p)
    assert takes_prepared(next_p) and can_hand_over(p, width, glu, group)
    to = room_for(second, next_p, normed)
    weight = 1 + 0.1 * torch.randn(width, generator=torch.Generator().manual_seed(3))
    weight = weight.bfloat16().to(DEVICE)
    counted = torch.zeros(counters(p, width, group), dtype=torch.int32, device=DEVICE)
    then = Handover(to, group, weight if normed else None, counted)
    x, residual = strided(tokens, k, torch.float32, 1), strided(tokens, width, torch.float32, 2)
    end: dict[str, Any] = {"glu": glu, "activation": "silu" if glu else "none", "residual": residual}
    wanted = run(x, first, p, width, **end)
    for _ in range(2):
        out = run(x, first, p, width, then=then, **end)
        assert torch.equal(out, wanted), "handing over changed the result"
        assert counted.eq(0).all(), "counters are not as the next kernel expects them"
    between = out
    if normed:
        between = torch.empty_like(out)
        rms_norm(out, weight, None, EPS, between)
    if integers:
        check_int8(to, between, out, normed)
    got = run(torch.full_like(out, torch.nan), second, next_p, 12, given=to)
    expected = run(between, second, next_p, 12)
    tolerance = FLOAT32 if not (integers and normed) else {"rtol": 1e-2, "atol": 2e-2}  # a step of some x
    torch.testing.assert_close(got, expected, **tolerance)


def check_int8(to: Prepared, between: Tensor, out: Tensor, normed: bool) -> None:
    """The same bytes as quantizing later, but for those that lie between two steps within rounding."""
    assert to.quantized is not None
    group = to.quantized.group
    q, scale = (torch.empty(s, dtype=d, device=DEVICE) for s, d in room(len(out), out.shape[1], group))
    later = Quantized(q, scale, group)
    quantize(between, later)
    if not normed:
        assert torch.equal(to.quantized.q, later.q) and torch.equal(to.quantized.scale, later.scale)
        return
    assert to.squares is not None
    rms = torch.sqrt(to.squares.sum(1) + EPS)
    torch.testing.assert_close(rms, torch.sqrt((out * out).mean(1) + EPS), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(to.quantized.scale / rms[:, None], later.scale, rtol=1e-6, atol=0.0)
    differing = (to.quantized.q.int() - later.q.int()).abs()
    assert differing.max() <= 1 and differing.float().mean() < 0.01


def test_a_row_does_not_depend_on_others() -> None:
    first = move(random_matrix("int4", 128, 64, 64)[0])
    second = move(random_matrix("int4", 12, 128, 64, seed=5)[0])
    p, next_p = (planned(m, Config(4, 4, 2, integer=True), 3, False, 64) for m in (first, second))
    x = strided(3, 64, torch.float32, 1)
    other = torch.full_like(x, 1e3)
    other[1] = x[1]
    found = []
    for rows in (x, other):
        to = room_for(second, next_p, True)
        counted = torch.zeros(counters(p, 128, 64), dtype=torch.int32, device=DEVICE)
        run(rows, first, p, 128, then=Handover(to, 64, None, counted))
        found.append(run(torch.empty(3, 128, device=DEVICE), second, next_p, 12, given=to)[1])
    assert torch.equal(*found)


def test_what_is_no_number_stays_so() -> None:
    """In its own row alone."""
    first = move(random_matrix("int8", 128, 64, 0)[0])
    second = move(random_matrix("int4", 12, 128, 64, seed=5)[0])
    p, next_p = (planned(m, Config(4, 4, 2, integer=True), 2, False, 64) for m in (first, second))
    x = strided(2, 64, torch.float32, 1).clone()
    x[0, 3] = torch.nan
    to = room_for(second, next_p, True)
    counted = torch.zeros(counters(p, 128, 64), dtype=torch.int32, device=DEVICE)
    run(x, first, p, 128, then=Handover(to, 64, None, counted))
    got = run(torch.empty(2, 128, device=DEVICE), second, next_p, 12, given=to)
    assert got[0].isnan().all() and got[1].isfinite().all()


@pytest.mark.parametrize(
    "config,glu,group,n,able",
    [
        (Config(8, 4, 1, integer=True), False, 64, 256, True),
        (Config(8, 4, 1, integer=True), False, 32, 80, False),  # 128 are stored, groups end at 96
        (Config(64, 0, 16, integer=True), False, 32, 256, False),  # a program has two groups
        (Config(64, 0, 16, integer=True), True, 32, 256, True),
        (Config(64, 8, 64), False, 64, 256, False),
        (Config(0, 0, 64, dense=True), False, 64, 256, False),
    ],
)
def test_who_can_hand_over(config: Config, glu: bool, group: int, n: int, able: bool) -> None:
    assert can_hand_over(Plan(1, (config,), False), n, glu, group) == able
