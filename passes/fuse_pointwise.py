"""What elementwise work is left becomes one instruction per connected expression."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import fx

from .fuse_glu import activation_name
from .graph import Traced, aten, call, only_user, ours, width
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
        if not node.users or _name(node) is None:
            continue
        inputs: list[fx.Node] = []
        steps: list[list[Any]] = []
        _collect(node, inputs, steps, {})
        reason = _why_not(traced, node, inputs)
        if reason is not None:
            report.miss(node, reason)
            continue
        _number(steps, len(inputs))
        new = call(traced, node, ours.pointwise.default, (inputs, json.dumps(steps)))
        node.replace_all_uses_with(new)
        traced.graph.eliminate_dead_code()
        report.hits += 1
    traced.clean()


def _why_not(traced: Traced, node: fx.Node, inputs: list[fx.Node]) -> str | None:
    """Only columns of float rows can be computed: every input has the result's width, or one column."""
    if any(traced.weight(i) is not None for i in inputs):
        return "an operand is a constant vector"
    rows = [n.meta["val"] for n in (node, *inputs) if "val" in n.meta]
    if len(rows) <= len(inputs) or not all(v.dim() == 3 and v.dtype == torch.float32 for v in rows):
        return "an operand is not a row of float32 columns"
    if any(width(i) not in (1, width(node)) for i in inputs):
        return "operands have other widths"
    return None


def _name(node: Any) -> str | None:
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.kwargs.get("alpha", 1) != 1:
        return None
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return "square"
    return NAMES.get(node.target) or activation_name(node)


def _collect(node: fx.Node, inputs: list[fx.Node], steps: list[list[Any]], known: dict[fx.Node, int]) -> int:
    """Append the steps that compute ``node``; returns its step number.

    Inputs are marked by negative numbers until all are known; ``known``: steps of nodes met before.
    """
    if node in known:
        return known[node]
    operands: list[Any] = []
    args = node.args[:1] if node.target is aten.pow.Tensor_Scalar else node.args
    for arg in args:
        if not isinstance(arg, fx.Node):
            operands.append({"const": float(arg)})  # type: ignore[arg-type]
        elif _name(arg) is not None and only_user(arg):
            operands.append(_collect(arg, inputs, steps, known))
        else:
            if arg not in inputs:
                inputs.append(arg)
            operands.append(-1 - inputs.index(arg))
    steps.append([_name(node), *operands])
    known[node] = len(steps) - 1
    return known[node]


def _number(steps: list[list[Any]], inputs: int) -> None:
    for step in steps:
        step[1:] = [o if isinstance(o, dict) else (-1 - o if o < 0 else o + inputs) for o in step[1:]]
