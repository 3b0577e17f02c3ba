"""Searched scales and refinement: never more error than before, for every row, scheme and shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quant_cases import hessian, inputs, weights

from gristmill.quant import refine as refining
from gristmill.quant.awq import channel_scales
from gristmill.quant.gptq import Plan, gptq
from gristmill.quant.grid import rounding_grid, scale_type
from gristmill.quant.hessian import Moments, damp, row_errors
from gristmill.quant.methods import METHODS, Input, quantize_calibrated
from gristmill.quant.refine import State, refine, refit, sweep
from gristmill.quant.rtn import dequantize
from gristmill.quant.scheme import parse
from gristmill.quant.search import search_grid

SCHEMES = ["int8", "int8-g64-asym", "int4-g32", "int4-g64-asym", "int3-g128", "int2-g32", "int2-row-asym"]
SLACK = 1 + 1e-4  # f32 sums of errors in another order


def case(n: int = 12, k: int = 200, outliers: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return weights(n, k), damp(hessian(inputs(800, k, outliers=outliers)), 0.01).float()


def rounding_errors(w: torch.Tensor, h: torch.Tensor, text: str) -> torch.Tensor:
    grid = rounding_grid(w, parse(text), np.float16)
    return row_errors(w - grid.values(grid.nearest(w)), h)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("k", [31, 64, 200])
def test_search_is_never_worse_than_none(text: str, k: int) -> None:
    w, h = case(k=k)
    found = search_grid(w, h, parse(text), np.float16)
    errors = row_errors(w - found.grid.values(found.grid.nearest(w)), h)
    plain = rounding_errors(w, h, text)
    assert (errors <= plain * SLACK).all()
    torch.testing.assert_close(found.plain_errors, plain)
    torch.testing.assert_close(found.errors, errors, rtol=1e-3, atol=0)
    if "int8" not in text:
        assert errors.sum() < 0.9 * plain.sum()


def test_scales_are_as_stored() -> None:
    w, h = case()
    scale = search_grid(w, h, parse("int4-g32"), np.float16).grid.scale
    assert torch.equal(scale, scale.half().float()) and (scale != 0).all()


def test_search_does_not_depend_on_the_other_rows() -> None:
    w, h = case(40)
    whole = search_grid(w, h, parse("int4-g32-asym"), np.float16).grid
    part = search_grid(w[30:33], h, parse("int4-g32-asym"), np.float16).grid
    assert torch.equal(whole.scale[30:33], part.scale) and torch.equal(whole.zero[30:33], part.zero)


@pytest.mark.parametrize("text", SCHEMES)
def test_sweep_and_refit_lower_every_rows_error(text: str) -> None:
    w, h = case()
    grid = rounding_grid(w, parse(text), np.float16)
    state = State.of(w.T.contiguous(), h, grid, grid.nearest(w).T.contiguous())
    before = state.errors()
    sweep(state, h)
    swept = state.errors()
    assert (swept <= before * SLACK).all() and swept.sum() < before.sum()
    state = refit(state, w.T.contiguous(), h, h @ w.T)
    assert (state.errors() <= swept * SLACK).all()
    true = row_errors(w - state.grid.values(state.q.T), h)
    torch.testing.assert_close(state.errors(), true, rtol=1e-3, atol=1e-6)
    numbers = parse(text).numbers
    assert state.q.min() >= numbers.low and state.q.max() <= numbers.high


@pytest.mark.parametrize("block", [1, 13, 64, 500])
def test_a_sweep_by_blocks_is_a_sweep(block: int) -> None:
    w, h = case()
    grid = rounding_grid(w, parse("int3-g32"), np.float16)
    states = []
    for width in (1, block):
        state = State.of(w.T.contiguous(), h, grid, grid.nearest(w).T.contiguous())
        sweep(state, h, width)
        states.append(state)
    assert (states[0].q != states[1].q).float().mean() < 0.01
    torch.testing.assert_close(states[0].errors().sum(), states[1].errors().sum(), rtol=0.01, atol=0)


def test_refit_finds_the_least_squares_scales() -> None:
    w, h = case(3, 96, 0)
    grid = rounding_grid(w, parse("int2-g32"), np.float32)
    q = grid.nearest(w)
    fitted = refit(State.of(w.T.contiguous(), h, grid, q.T.contiguous()), w.T.contiguous(), h, h @ w.T).grid
    root = torch.linalg.cholesky(h.double(), upper=True)
    z = (q - grid.columns(96)[1]).double()
    for row in range(3):
        columns = torch.block_diag(*z[row].view(3, 1, 32)).T  # [96, 3]
        solution = torch.linalg.lstsq(root @ columns, (root @ w[row].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted.scale[row].double(), solution, rtol=1e-3, atol=1e-5)


def test_refit_keeps_groups_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refining, "SYSTEM_NUMBERS", 64)  # rows in several systems
    w, h = case(9, 96)
    w[2, :32] = 0
    w[4] = 0
    grid = rounding_grid(w, parse("int4-g32"), np.float16)
    tuned, q, errors = refine(w, h, grid, gptq(w, Plan.of(h.double(), damping=0.01), grid))
    values = tuned.values(q)
    assert torch.isfinite(values).all() and (values[4] == 0).all() and (tuned.scale != 0).all()
    assert torch.isfinite(errors).all()


@pytest.mark.parametrize("name", ["rtn+search", "gptq"])
@pytest.mark.parametrize("text", SCHEMES)
def test_methods_report_the_error_of_what_they_return(text: str, name: str) -> None:
    w, scheme = weights(12, 200), parse(text)
    moments = Moments(200)
    moments.add(inputs(800, 200, outliers=3))
    shared = Input.of(moments, METHODS[name])
    result = quantize_calibrated(w, shared, scheme, scale_type(w, scheme), METHODS[name])
    stored = torch.from_numpy(dequantize(result.quantized, scheme.normalize(200)))
    torch.testing.assert_close(result.error.float(), row_errors(w - stored, shared.h), rtol=1e-2, atol=1e-7)
    assert (result.error <= result.rtn * SLACK).all()
    assert result.quantized.q.dtype == scheme.numbers.dtype


def test_awq_protects_channels_that_carry_the_output() -> None:
    w, x = weights(24, 128), inputs(500, 128, outliers=4)
    scheme = parse("int3-g64")
    s = channel_scales([w], [scheme], x, x.abs().mean(0).double())
    assert s[:4].min() > 1.5 * s[4:].max()
    grid = rounding_grid(w * s, scheme, np.float16)
    scaled = grid.values(grid.nearest(w * s)) / s
    plain = rounding_grid(w, scheme, np.float16)
    missed = [float(((q - w) @ x.T).square().sum()) for q in (scaled, plain.values(plain.nearest(w)))]
    assert missed[0] < 0.5 * missed[1]


def test_awq_gives_tied_channels_one_scale_and_leaves_well_alone() -> None:
    w, x = weights(8, 64), inputs(300, 64, outliers=2)
    tied = torch.arange(64) % 16
    s = channel_scales([w], [parse("int3-g32")], x, x.abs().mean(0).double(), tied)
    assert all(len(s[tied == i].unique()) == 1 for i in range(16))
    exact = channel_scales([torch.zeros(8, 64)], [parse("int4-g32")], x, x.abs().mean(0).double())
    assert (exact == 1).all()
