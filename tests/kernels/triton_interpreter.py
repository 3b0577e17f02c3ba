"""Triton's interpreter, put right where it is not what a device is; importing this does it.

The interpreter of Triton 3.6 multiplies the bits of bf16 matrices as if they were integers, does not round to
nearest where it narrows, makes no index of its scalars beside numpy 2.4 and on, looks through the whole
language for what to replace each time that a kernel calls a function, and computes every sum of integers
twice, to see whether it overflows, which a device does not: the last two took three quarters of its time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32"}
_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot
_patch = interpreter._patch_lang_tensor
_right: set[int] = set()  # globals of functions that need nothing more


def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
    """The bits of an array of floats in another type, rounded to nearest even."""
    if source not in TYPES or target not in TYPES:
        return _convert(data, source, target, mode)
    before, after = TYPES[source], TYPES[target]
    signed = data.view(UNSIGNED[before.itemsize]).view(str(BITS[before.itemsize]).split(".")[1])
    bits = torch.from_numpy(signed.copy()).view(before).to(after).view(BITS[after.itemsize])
    return bits.numpy().view(UNSIGNED[after.itemsize])


def widened(operand: Any) -> Any:
    if operand.dtype not in (tl.bfloat16, tl.float8e4nv):
        return operand
    bits = convert(operand.data, operand.dtype, tl.float32, None)
    return interpreter.TensorHandle(bits.view("float32"), tl.float32)


def patch_tensor(tensor: Any, scope: Any) -> None:
    """Gives scalars the index that loops over a range of them need."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def call(self: Any, *arguments: Any, **named: Any) -> Any:
    """A kernel calls a function. The launch has put `tl` right for it; what functions of the language itself
    see is put right at the first of them, and stays so."""
    sees = self.fn.__globals__.values()
    if not any(value is tl for value in sees) and id(self.fn.__globals__) not in _right:
        interpreter._patch_lang(self.fn)
        _right.add(id(self.fn.__globals__))
    try:
        return self.rewrite()(*arguments, **named)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    return _dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)


interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
interpreter._convert_float = convert
interpreter.InterpreterBuilder.create_dot = dot
interpreter._patch_lang_tensor = patch_tensor
interpreter.InterpretedFunction.__call__ = call
