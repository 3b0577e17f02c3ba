"""Expressions and gathered rows in Triton, in Triton's interpreter or on a device, against float64."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")


from triton_device import on_device  # noqa: F401  (the fixture is for all)

from gristmill.kernels.reference.pointwise import STEPS
from gristmill.kernels.triton.gather import gather_rows
from gristmill.kernels.triton.pointwise import FORMULAS, pointwise
from gristmill.runtime.program import POINTWISE_BINARY, POINTWISE_UNARY


def values(inputs, steps):
    registers = [x.double() for x in inputs]
    for name, *operands in steps:
        given = [
            torch.tensor(o["const"], dtype=torch.float64) if isinstance(o, dict) else registers[o]
            for o in operands if o is not None
        ]  # fmt: skip
        registers.append(STEPS[name](*given))
    return registers[-1]


def test_every_function_has_a_formula():
    assert set(FORMULAS) == set(POINTWISE_UNARY + POINTWISE_BINARY)


@pytest.mark.parametrize("name", FORMULAS)
def test_functions_are_their_formulas(name):
    x = torch.cat([torch.linspace(-6, 6, 400), torch.logspace(-6, 1.9, 200), -torch.logspace(-6, 1.9, 200)])
    x = x.abs() + 1e-3 if name in ("sqrt", "rsqrt") else x
    y = torch.linspace(3, -5, len(x)) + 0.1
    inputs = [x.view(2, -1), y.view(2, -1)]
    steps = [[name, 0, 1] if name in POINTWISE_BINARY else [name, 0]]
    out = torch.empty(2, 400)
    pointwise(inputs, steps, out)
    torch.testing.assert_close(out.double(), values(inputs, steps), rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_no_number_stays_none(name):
    x = torch.full((1, 3), torch.nan)
    out = torch.zeros(1, 3)
    pointwise([x], [[name, 0, {"const": 1.5}] if name in POINTWISE_BINARY else [name, 0]], out)
    assert out.isnan().all()


def test_expressions_of_several_steps_with_constants_and_one_column():
    torch.manual_seed(0)
    whole, column = torch.randn(3, 700), torch.randn(3, 1)
    inputs = [whole[:, 5:605], column, torch.randn(3, 600).bfloat16()]
    steps = [
        ["mul", 0, {"const": -0.3}],
        ["sub", {"const": 2}, 3],
        ["gelu", 4],
        ["add", 5, 1],
        ["maximum", 6, 2],
        ["square", 7, None],
    ]
    out = torch.full((3, 610), 7.0)
    pointwise(inputs, steps, out[:, 4:604])
    torch.testing.assert_close(out[:, 4:604].double(), values(inputs, steps), rtol=1e-5, atol=1e-6)
    assert (out[:, :4] == 7).all() and (out[:, 604:] == 7).all()
    pointwise([out, out], [["add", 0, 1]], out)
    assert (out[:, :4] == 14).all()


def test_rows_are_gathered():
    x, out = torch.randn(6, 1500), torch.zeros(4, 1503)
    rows = torch.tensor([5, 0, 0, 3], dtype=torch.int32)
    gather_rows(x[:, 100:1400], rows, out[:, 3:1303])
    assert torch.equal(out[:, 3:1303], x[rows.long(), 100:1400])
    assert not out[:, :3].any() and not out[:, 1303:].any()
