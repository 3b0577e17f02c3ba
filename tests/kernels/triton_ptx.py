"""A few instructions of PTX on tensors, for inline assembly that Triton's interpreter does not run.

A register is bytes [n, 2] or [n, 4], the least significant one first.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor


def evaluate(assembly: str, outputs: int, inputs: list[Tensor]) -> list[Tensor]:
    """The results of a block of assembly, each as f16 [n, 2]; inputs: words as bytes [n, 4] u8."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    count = len(inputs[0])
    for line in assembly.strip(" {}\n").split(";"):
        if not (words := line.split(None, 1)) or words[0] == ".reg":
            continue
        names = re.findall(r"\{[^}]*\}|[^,\s]+", words[1])
        given = [_value(name, registers, count) for name in names[1:]]
        result = OPERATIONS[words[0]](*given)
        if names[0].startswith("{"):
            low, high = names[0].strip("{} ").split(", ")
            registers[low], registers[high] = result[:, :2], result[:, 2:]
        else:
            registers[names[0]] = result
    return [registers[f"${i}"].contiguous().view(torch.float16) for i in range(outputs)]


def _value(name: str, registers: dict[str, Tensor], count: int) -> Tensor:
    if not name.startswith("0x"):
        return registers[name]
    number = int(name, 16)
    return torch.tensor([number >> 8 * i & 255 for i in range(4)], dtype=torch.uint8).expand(count, 4)


def _permute(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    low, high = int(selector[0, 0]), int(selector[0, 1])
    both = torch.cat([a, b], 1)
    return torch.stack([both[:, nibble] for nibble in (low & 15, low >> 4, high & 15, high >> 4)], 1)


def _subtract(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x.contiguous().view(torch.float16) for x in (a, b))
    return (a - b).view(torch.uint8)


def _from_e4m3(a: Tensor) -> Tensor:
    return a.contiguous().view(torch.float8_e4m3fn).half().view(torch.uint8)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a, "xor.b32": lambda a, b: a ^ b, "prmt.b32": _permute, "sub.f16x2": _subtract,
    "cvt.rn.f16x2.e4m3x2": _from_e4m3,
}  # fmt: skip
