"""Small elementwise expressions: registers start as the inputs, a step appends one, the last is the value."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

STEPS: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum, "neg": torch.neg, "exp": torch.exp, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "silu": functional.silu, "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"), "relu": torch.relu, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "square": torch.square, "abs": torch.abs, "reciprocal": torch.reciprocal,
}  # fmt: skip


def pointwise(inputs: Sequence[Tensor], steps: str) -> Tensor:
    """``steps`` is JSON: [[name, a, b?], ...] with register numbers or {"const": x}.

    inputs [..., W] or [..., 1].
    """
    registers = list(inputs)
    for name, *operands in json.loads(steps):
        registers.append(STEPS[name](*(_operand(registers, o) for o in operands)))
    return registers[-1]


def _operand(registers: list[Tensor], operand: Any) -> Tensor:
    if isinstance(operand, dict):
        return torch.tensor(operand["const"], dtype=torch.float32)
    return registers[operand]
