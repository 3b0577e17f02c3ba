"""Small elementwise expressions: each compiles to a kernel of its own, in one pass over its inputs.

Registers start as the inputs, a step appends one, the last is the value (kernels/reference/pointwise.py). The
kernel is written as text, one line a step, and kept in `linecache`, where Triton, which reads a kernel's
source, finds it. Numbers are f32 in between, whatever the types of inputs and output.
"""

from __future__ import annotations

import functools
import linecache
import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # columns of a program
LOG2E = tl.constexpr(math.log2(math.e))
ROOT_HALF = tl.constexpr(math.sqrt(0.5))
ROOT_2_PI = tl.constexpr(math.sqrt(2 / math.pi))


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _tanh(x):
    """Near 0 by its series, for 1 - e^(-2 |x|) has few digits there."""
    size = tl.abs(x)
    e = _exp(-2.0 * size)
    square = x * x
    near = size * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    value = tl.where(size < 0.15, near, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -value, value)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + _exp(-x))


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * ROOT_HALF))


@triton.jit
def _gelu_tanh(x):
    return 0.5 * x * (1.0 + _tanh(ROOT_2_PI * (x + 0.044715 * x * x * x)))


@triton.jit
def _larger(x, y):
    """Not a number where either is none, as in torch."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def _smaller(x, y):
    return tl.where((x < y) | (x != x), x, y)


FORMULAS = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "tl.div_rn({}, {})",
    "maximum": "_larger({}, {})", "minimum": "_smaller({}, {})", "neg": "-{}", "exp": "tl.exp({})",
    "tanh": "_tanh({})", "sigmoid": "_sigmoid({})", "silu": "{0} * _sigmoid({0})", "gelu": "_gelu({})",
    "gelu_tanh": "_gelu_tanh({})", "relu": "_larger({0}, 0.0 * {0})", "sqrt": "tl.sqrt_rn({})",
    "rsqrt": "tl.div_rn(one, tl.sqrt_rn({}))", "square": "{0} * {0}", "abs": "tl.abs({})",
    "reciprocal": "tl.div_rn(one, {})",
}  # fmt: skip
Step = tuple[str, "int | float", "int | float | None"]  # name, operands: an int is a register


def _source(steps: tuple[Step, ...], narrow: tuple[bool, ...]) -> str:
    """The kernel's text; narrow: which inputs have one column that counts for all."""
    inputs = range(len(narrow))
    names = ", ".join(f"x{i}, stride{i}" for i in inputs)
    lines = [
        "@triton.jit",
        f"def pointwise_kernel({names}, out, out_stride, width, BLOCK: tl.constexpr):",
        "    row = tl.program_id(0).to(tl.int64)",
        "    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)",
        "    one = tl.full((BLOCK,), 1.0, tl.float32)",
    ]
    for i in inputs:
        column = "0 * at" if narrow[i] else "at"
        lines.append(f"    r{i} = tl.load(x{i} + row * stride{i} + {column}, at < width, 0.0).to(tl.float32)")
    for n, (name, *operands) in enumerate(steps, len(narrow)):
        given = [f"r{o}" if isinstance(o, int) else f"({o!r} * one)" for o in operands if o is not None]
        lines.append(f"    r{n} = {FORMULAS[name].format(*given)}")
    last = len(narrow) + len(steps) - 1
    lines.append(f"    tl.store(out + row * out_stride + at, r{last}.to(out.dtype.element_ty), at < width)")
    return "\n".join(lines) + "\n"


@functools.cache
def _kernel(steps: tuple[Step, ...], narrow: tuple[bool, ...]) -> Any:
    source = _source(steps, narrow)
    name = f"<pointwise {source!r}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    made: dict[str, Any] = dict(globals())
    exec(compile(source, name, "exec"), made)
    return made["pointwise_kernel"]


def _operand(operand: Any) -> int | float | None:
    return float(operand["const"]) if isinstance(operand, dict) else operand


def pointwise(inputs: Sequence[Tensor], steps: Sequence[Sequence[Any]], out: Tensor) -> None:
    """The last register of ``steps``: [name, a, b?] with register numbers or {"const": finite number}.

    inputs: [T, W], or [T, 1] for all columns; out: [T, W]; any float types, rows any stride apart. ``out``
    may be one of the inputs.
    """
    rows, width = out.shape
    assert steps and all(x.shape in ((rows, width), (rows, 1)) for x in inputs), "inputs of other shapes"
    plain = tuple((name, *map(_operand, [*operands, None][:2])) for name, *operands in steps)
    kernel = _kernel(plain, tuple(x.shape[1] == 1 and width != 1 for x in inputs))
    given = [argument for x in inputs for argument in (x, x.stride(0))]
    kernel[(rows, triton.cdiv(width, BLOCK))](*given, out, out.stride(0), width, BLOCK=BLOCK, num_warps=4)
