"""GPTQ equals its definition whatever the blocks, beats rounding, and takes what calibration sets bring."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quant_cases import gptq_by_the_book, hessian, inputs, weights

from gristmill.quant.gptq import DAMPING, Plan, asymmetric_shift, gptq
from gristmill.quant.grid import rounding_grid
from gristmill.quant.hessian import Moments, damp, inverse_factor, row_errors
from gristmill.quant.scheme import Scheme, parse

SCHEMES = ["int8", "int4-g32", "int4-g64-asym", "int3-g32", "int2-g32-asym", "int4-row"]


def errors(w: torch.Tensor, q: torch.Tensor, grid: object, h: torch.Tensor) -> torch.Tensor:
    return row_errors(w - grid.values(q), h.float())  # type: ignore[attr-defined]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("text", SCHEMES)
def test_equals_the_definition(text: str, act_order: bool) -> None:
    w, h = weights(5, 72), hessian(inputs(400, 72))
    grid, plan = rounding_grid(w, parse(text), np.float16), Plan.of(h, act_order, DAMPING)
    expected = gptq_by_the_book(w, h, grid, DAMPING, plan.order)
    got = gptq(w, plan, grid).double()
    # f32 against f64: a value may fall on the other side of the middle between two levels, and moves others
    assert (got != expected).double().mean() < 0.02
    exact, near = (float(errors(w, q.float(), grid, h).sum()) for q in (expected, got))
    assert near == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("block", [1, 7, 32, 128, 1000])
def test_blocks_change_nothing(group: int, block: int) -> None:
    w, h = weights(6, 200, 3), hessian(inputs(600, 200))
    grid, plan = rounding_grid(w, Scheme("int4", group), np.float16), Plan.of(h, damping=DAMPING)
    one, other = gptq(w, plan, grid, block_columns=1), gptq(w, plan, grid, block_columns=block)
    assert (one != other).float().mean() < 0.01
    one_error, other_error = (float(errors(w, q, grid, h).sum()) for q in (one, other))
    assert other_error == pytest.approx(one_error, rel=0.01)


@pytest.mark.parametrize("text", SCHEMES)
def test_beats_rounding(text: str) -> None:
    w, h = weights(16, 128), hessian(inputs(1000, 128, outliers=4))
    grid = rounding_grid(w, parse(text), np.float16)
    rounded, chosen = grid.nearest(w), gptq(w, Plan.of(h, damping=DAMPING), grid)
    assert errors(w, chosen, grid, h).sum() < 0.8 * errors(w, rounded, grid, h).sum()


def test_rows_do_not_see_each_other() -> None:
    w, h = weights(9, 64), hessian(inputs(300, 64))
    plan = Plan.of(h, damping=DAMPING)
    whole = gptq(w, plan, rounding_grid(w, parse("int4-g32"), np.float16))
    part = gptq(w[4:6], plan, rounding_grid(w[4:6], parse("int4-g32"), np.float16))
    assert torch.equal(whole[4:6], part)


def test_dead_inputs_round_to_nearest() -> None:
    x = inputs(300, 64)
    x[:, [3, 40]] = 0
    w, h = weights(8, 64), hessian(x)
    grid = rounding_grid(w, parse("int4-g32"), np.float16)
    q = gptq(w, Plan.of(h, damping=DAMPING), grid)
    assert torch.equal(q[:, [3, 40]], grid.nearest(w)[:, [3, 40]])


def test_a_set_of_too_low_rank_gets_more_damping() -> None:
    h = hessian(inputs(3, 64))
    assert inverse_factor(h, torch.arange(64), DAMPING).damping >= DAMPING
    tiny = inverse_factor(h, torch.arange(64), 1e-18)
    assert tiny.damping > 1e-18 and torch.isfinite(tiny.upper).all()
    grid = rounding_grid(weights(4, 64), parse("int4-g32"), np.float16)
    assert torch.isfinite(gptq(weights(4, 64), Plan.of(h, damping=DAMPING), grid)).all()


def test_nothing_but_zeros_rounds_to_nearest() -> None:
    w, h = weights(4, 32), torch.zeros(32, 32, dtype=torch.float64)
    grid = rounding_grid(w, parse("int4-g32"), np.float16)
    assert torch.equal(gptq(w, Plan.of(h, damping=DAMPING), grid), grid.nearest(w))


def test_groups_of_zeros() -> None:
    w, h = weights(4, 96), hessian(inputs(300, 96))
    w[1] = 0
    w[2, 32:64] = 0
    grid = rounding_grid(w, parse("int4-g32"), np.float16)
    values = grid.values(gptq(w, Plan.of(h, damping=DAMPING), grid))
    assert torch.isfinite(values).all() and (values[1] == 0).all()


def test_the_asymmetric_error_brings_the_output_nearer() -> None:
    x_float = inputs(2000, 64)
    noise = 0.2 * inputs(2000, 64, seed=5)
    x, w = x_float + noise, weights(16, 64)
    residual = 0.3 * noise[:, :16] + 0.01 * inputs(2000, 16, seed=7)
    moments = Moments(64, cross=True, residual=16)
    moments.add(x, x_float, residual)
    h = moments.hessian()
    assert moments.cross is not None and moments.residual is not None
    plan = Plan.of(h, damping=DAMPING)
    damp(h, 1e-6)
    target = w + w @ asymmetric_shift(h, moments.cross) + asymmetric_shift(h, moments.residual)
    wanted = x_float @ w.T + residual
    expected = torch.linalg.lstsq(x.double(), wanted.double()).solution.T.float()
    torch.testing.assert_close(target, expected, atol=2e-4, rtol=0)
    missed = []
    for aim in (w, target):
        grid = rounding_grid(aim, parse("int8-g32"), np.float16)
        missed.append(float((x @ grid.values(gptq(aim, plan, grid)).T - wanted).square().sum()))
    least = float((x @ expected.T - wanted).square().sum())  # of all weights, quantized or not
    assert missed[1] - least < 0.1 * (missed[0] - least)
