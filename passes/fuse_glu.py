"""Gated feed-forwards: gate and up become one linear with the activation and the product as its epilogue."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from .graph import Traced, arguments, aten, call, is_op, only_user, ours, plain_linear, width
from .merge_linears import merge_key
from .rule import Report

ACTIVATIONS: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.gelu.default: "gelu",
}


def activation_name(node: fx.Node) -> str | None:
    """The epilogue that computes this node, or None."""
    name = ACTIVATIONS.get(node.target)
    if name == "gelu" and arguments(node)["approximate"] == "tanh":
        return "gelu_tanh"
    return name


def run(traced: Traced, report: Report) -> None:
    """mul(act(gate), up) in either order: gate and up are linears of one input or halves of one linear."""
    for node in list(traced.graph.nodes):
        if not is_op(node, aten.mul.Tensor) or not all(isinstance(a, fx.Node) for a in node.args):
            continue
        first, second = node.args
        if activation_name(first) is None:
            first, second = second, first
        name = activation_name(first)
        if name is not None:
            _fuse(traced, node, name, first, second, report)
    traced.clean()


def _fuse(traced: Traced, node: fx.Node, name: str, activated: Any, up: Any, report: Report) -> None:
    gate = activated.args[0]
    if not only_user(activated):
        report.miss(node, "the activation is used elsewhere")
        return
    parts = _two_linears(traced, gate, up) or _two_halves(gate, up)
    if parts is None:
        report.miss(node, "gate and up are not linears of one input, gate first")
        return
    x, weights, biases = parts
    new = call(traced, node, ours.linear.default, (x, weights, biases, None, name, True))
    node.replace_all_uses_with(new)
    report.hits += 1


def _two_linears(traced: Traced, gate: fx.Node, up: fx.Node) -> tuple[Any, list[Any], list[Any]] | None:
    if not (plain_linear(gate) and plain_linear(up)):
        return None
    a, b = arguments(gate), arguments(up)
    if a["x"] is not b["x"] or not (only_user(gate) and only_user(up)) or width(gate) != width(up):
        return None
    if merge_key(traced, gate) != merge_key(traced, up):
        return None
    return a["x"], [*a["weights"], *b["weights"]], [*a["biases"], *b["biases"]]


def _two_halves(gate: fx.Node, up: fx.Node) -> tuple[Any, list[Any], list[Any]] | None:
    """One linear split in two: the first half is the gate."""
    halves = [_half(n) for n in (gate, up)]
    if halves[0] is None or halves[1] is None or (halves[0][1], halves[1][1]) != (0, 1):
        return None
    linear = halves[0][0]
    if linear is not halves[1][0] or not plain_linear(linear):
        return None
    a = arguments(linear)
    return a["x"], list(a["weights"]), list(a["biases"])


def _half(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(linear, 0 or 1) of a node that is the first or second half of a linear's columns."""
    if is_op(node, operator.getitem):
        split, index = node.args  # type: Any, Any
        if is_op(split, aten.split.Tensor, aten.chunk.default) and width(node) * 2 == width(split.args[0]):
            return split.args[0], index
    elif is_op(node, aten.slice.Tensor):
        a = arguments(node)
        middle = width(node)
        if width(a["self"]) == 2 * middle and a["step"] == 1 and a["start"] in (None, 0, middle):
            return a["self"], int(a["start"] == middle)
    return None
