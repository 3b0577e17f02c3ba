"""What elementwise work is left becomes one instruction per connected expression."""

from __future__ import annotations

import json
from typing import Any

from torch import fx

from .fuse_glu import activation_name
from .graph import Traced, aten, call, only_user, ours
from .rule import Report

NAMES: dict[Any, str] = {
    aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.mul.Tensor: "mul", aten.div.Tensor: "div",
    aten.neg.default: "neg", aten.exp.default: "exp", aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid", aten.sqrt.default: "sqrt", aten.rsqrt.default: "rsqrt",
    aten.abs.default: "abs", aten.reciprocal.default: "reciprocal", aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
}  # fmt: skip


def run(traced: Traced, report: Report) -> None:
    """From the last node upwards, so that an expression is collected whole before its parts are looked at."""
    for node in reversed(list(traced.graph.nodes)):
        if node.users and _name(node) is not None:
            inputs: list[fx.Node] = []
            steps: list[list[Any]] = []
            _collect(node, inputs, steps)
            _number(steps, len(inputs))
            new = call(traced, node, ours.pointwise.default, (inputs, json.dumps(steps)))
            node.replace_all_uses_with(new)
            traced.graph.eliminate_dead_code()
            report.hits += 1
    traced.clean()


def _name(node: Any) -> str | None:
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.kwargs.get("alpha", 1) != 1:
        return None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return "square"
    return NAMES.get(node.target) or activation_name(node)


def _collect(node: fx.Node, inputs: list[fx.Node], steps: list[list[Any]]) -> int:
    """Append the steps that compute ``node``; returns its step number.

    Inputs are marked by negative numbers until all are known.
    """
    operands: list[Any] = []
    args = node.args[:1] if node.target is aten.pow.Tensor_Scalar else node.args
    for arg in args:
        if not isinstance(arg, fx.Node):
            operands.append({"const": float(arg)})  # type: ignore[arg-type]
        elif _name(arg) is not None and only_user(arg):
            operands.append(_collect(arg, inputs, steps))
        else:
            if arg not in inputs:
                inputs.append(arg)
            operands.append(-1 - inputs.index(arg))
    steps.append([_name(node), *operands])
    return len(steps) - 1


def _number(steps: list[list[Any]], inputs: int) -> None:
    for step in steps:
        step[1:] = [o if isinstance(o, dict) else (-1 - o if o < 0 else o + inputs) for o in step[1:]]
