"""Norms in Triton against their formulas in float64."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")


from triton_device import DEVICE, on_device  # noqa: F401  (the fixture is for all)
from triton_matrices import int8_room

from gristmill.kernels.triton.norms import layer_norm, rms_norm
from gristmill.kernels.triton.quantize import quantize

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-5},
}
EPS = 1e-5


def normed(x, weight, bias, residual, centred):
    x = x.double()
    x = x - x.mean(1, keepdim=True) if centred else x
    out = x / (x.square().mean(1, keepdim=True) + EPS).sqrt()
    out = out if weight is None else out * weight.double()
    out = out if bias is None else out + bias.double()
    return out if residual is None else out + residual.double()


def columns(rows, width, dtype):
    """A view of `width` columns in the middle of wider rows."""
    return torch.randn(rows, width + 7).to(dtype)[:, 3 : 3 + width]


@pytest.mark.parametrize("width", [1, 15, 64, 100, 2048])
@pytest.mark.parametrize("options", range(8))
def test_norms_are_their_formulas(width, options):
    torch.manual_seed(0)
    x = columns(3, width, torch.float32) + 0.5
    weight = torch.randn(width) if options & 1 else None
    bias = torch.randn(width) if options & 2 else None
    residual = columns(3, width, torch.float32) if options & 4 else None
    out = columns(3, width, torch.float32)
    layer_norm(x, weight, bias, residual, EPS, out)
    wanted = normed(x, weight, bias, residual, centred=True)
    torch.testing.assert_close(out.double(), wanted, **TOLERANCE[torch.float32])
    rms_norm(x, weight, residual, EPS, out)
    wanted = normed(x, weight, None, residual, centred=False)
    torch.testing.assert_close(out.double(), wanted, **TOLERANCE[torch.float32])


@pytest.mark.parametrize(("width", "group"), [(20, 64), (100, 32), (136, 128), (256, 64)])
def test_a_norm_writes_int8_as_it_would_be_quantized_later(width: int, group: int) -> None:
    torch.manual_seed(2)
    x, weight, out = columns(3, width, torch.float32), torch.randn(width), torch.empty(3, width)
    at_once, later = int8_room(3, width, group), int8_room(3, width, group)
    rms_norm(x, weight, x, EPS, out, at_once)
    quantize(out, later)
    assert torch.equal(at_once.q, later.q) and torch.equal(at_once.scale, later.scale)
    assert at_once.q[:, width:].eq(0).all() and at_once.q[:, :width].abs().amax() == 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_may_differ(dtype):
    torch.manual_seed(1)
    x, residual = columns(2, 96, torch.bfloat16), columns(2, 96, torch.float32)
    weight, out = torch.randn(96).half(), columns(2, 96, dtype)
    rms_norm(x, weight, residual, EPS, out)
    wanted = normed(x, weight, None, residual, centred=False)
    torch.testing.assert_close(out.double(), wanted, **TOLERANCE[dtype])


def test_out_may_be_the_residual_and_neighbours_stay():
    torch.manual_seed(2)
    x, whole = torch.randn(4, 40), torch.randn(4, 50)
    before, out = whole.clone(), whole[:, 5:45]
    rms_norm(x, None, out, EPS, out)
    wanted = normed(x, None, None, before[:, 5:45], centred=False)
    torch.testing.assert_close(out.double(), wanted, **TOLERANCE[torch.float32])
    assert torch.equal(whole[:, :5], before[:, :5]) and torch.equal(whole[:, 45:], before[:, 45:])


def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(3)
    x, out, alone = torch.randn(4, 72), torch.empty(4, 72), torch.empty(1, 72)
    rms_norm(x, None, None, EPS, out)
    rms_norm(x[2:3], None, None, EPS, alone)
    assert torch.equal(out[2:3], alone)
