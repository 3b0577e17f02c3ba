"""Rotary embeddings become one op per tensor; their cos and sin tables become frequencies.

Models compute cos and sin from positions once and share them. A rewrite takes them as they are and asks the
graph itself what they hold: the angle at position 1 is the frequency, the cosine at position 0 is the scale,
and other positions must agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from . import probe_rope
from .graph import EXAMPLE_ROWS, Lazy, Traced, ancestors, aten, call, evaluate, is_op, ours, width
from .rule import Report, Rule

END = 9223372036854775807
PROBES = torch.arange(EXAMPLE_ROWS) ** 3  # 0, 1, 8 ... 1728


def _half(x: Any, cos: Any, sin: Any, half: Any) -> Any:
    rotated = aten.cat.default(
        [aten.neg.default(aten.slice.Tensor(x, 3, half, END)), aten.slice.Tensor(x, 3, 0, half)], -1
    )
    return aten.add.Tensor(aten.mul.Tensor(x, cos), aten.mul.Tensor(rotated, sin))


def _partial(x: Any, cos: Any, sin: Any, half: Any, dims: Any) -> Any:
    first = aten.slice.Tensor(x, 3, 0, dims)
    return aten.cat.default([_half(first, cos, sin, half), aten.slice.Tensor(x, 3, dims, END)], -1)


def _interleaved(x: Any, cos: Any, sin: Any, size: Any) -> Any:
    even, odd = aten.slice.Tensor(x, 3, 0, END, 2), aten.slice.Tensor(x, 3, 1, END, 2)
    pairs = aten.stack.default([aten.neg.default(odd), even], -1)
    return aten.add.Tensor(aten.mul.Tensor(x, cos), aten.mul.Tensor(aten.view.default(pairs, size), sin))


def _interleaved_partial(x: Any, cos: Any, sin: Any, size: Any, dims: Any) -> Any:
    first = aten.slice.Tensor(x, 3, 0, dims)
    return aten.cat.default([_interleaved(first, cos, sin, size), aten.slice.Tensor(x, 3, dims, END)], -1)


def _tables(traced: Traced, found: dict[str, Any], style: str) -> tuple[Tensor, float] | str:
    """(inv_freq, scale) that cos and sin stand for, or why not."""
    values = []
    for name, op in (("cos", aten.cos.default), ("sin", aten.sin.default)):
        node = found[name]
        before = ancestors(node)
        angles = [n for n in before if is_op(n, op)]
        if len(angles) != 1:
            return f"{name} is not computed from one angle"
        inputs = [n for n in before if n.op == "placeholder" and n.name not in traced.weights]
        if [n.name for n in inputs] != ["positions"]:
            return f"{name} depends on more than the positions"
        values.append(_evaluate(traced, before, node, angles[0].args[0]))
    (cos, angle), (sin, _) = values
    scale, wrong = float(cos[0, 0]), float("inf")
    for inv_freq in _frequencies(angle[1], cos.shape[1]):
        expected = _spread(PROBES[:, None].float() * inv_freq, style)
        wrong = max(_distance(cos, expected.cos() * scale), _distance(sin, expected.sin() * scale))
        if wrong < 1e-4 * max(scale, 1.0):
            return inv_freq, scale
    return f"cos and sin are not rotations by position (off by {wrong:.1e})"


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")


def _frequencies(angle: Tensor, dims: int) -> list[Tensor]:
    """What the frequencies may be, given the angle at position 1: as they are, or each of them twice."""
    if angle.shape[0] * 2 == dims:
        return [angle.clone()]
    return [angle[: dims // 2].clone(), angle[::2].clone()]


def _spread(freqs: Tensor, style: str) -> Tensor:
    return torch.cat([freqs, freqs], -1) if style == "half" else freqs.repeat_interleave(2, -1)


def _evaluate(traced: Traced, nodes: list[fx.Node], *wanted: Any) -> list[Tensor]:
    """Run part of the graph at the probe positions; each result as [T, W]."""
    env: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            env[node] = traced.weights[node.name].load() if node.name in traced.weights else PROBES[None]
        else:
            env[node] = evaluate(node.target, node.args, node.kwargs, env.__getitem__)
    return [env[n].reshape(EXAMPLE_ROWS, -1) for n in wanted]


class _Fusion:
    """The rule for one style; tables are evaluated once per (cos, sin) pair and named by their content."""

    def __init__(self, style: str) -> None:
        self.style = style
        self.known: dict[tuple[fx.Node, fx.Node], tuple[Tensor, float] | str] = {}

    def tables(self, traced: Traced, found: dict[str, Any]) -> tuple[Tensor, float] | str:
        key = (found["cos"], found["sin"])
        if key not in self.known:
            self.known[key] = _tables(traced, found, self.style)
        return self.known[key]

    def check(self, traced: Traced, found: dict[str, Any]) -> str | None:
        tables = self.tables(traced, found)
        if isinstance(tables, str):
            return tables
        dims = found.get("dims", width(found["x"]))
        if 2 * tables[0].shape[0] != dims or found.get("half", dims // 2) * 2 != dims:
            return f"{2 * tables[0].shape[0]} rotary columns for a head of {dims}"
        return None

    def replace(self, traced: Traced, out: fx.Node, found: dict[str, Any]) -> fx.Node:
        tables = self.tables(traced, found)
        assert not isinstance(tables, str)
        inv_freq, scale = tables
        name = probe_rope.weight_name(traced, inv_freq)
        weight = traced.add_weight(name, Lazy(tuple(inv_freq.shape), (name,), lambda: inv_freq, "constant"))
        args = (found["x"], traced.input("positions"), weight, self.style, scale)
        return call(traced, out, ours.rope.default, args)


def run(traced: Traced, report: Report) -> None:
    half, interleaved = _Fusion("half"), _Fusion("interleaved")
    Rule(patterns=(_partial, _half), check=half.check, replace=half.replace).apply(traced, report)
    Rule(
        patterns=(_interleaved_partial, _interleaved), check=interleaved.check, replace=interleaved.replace
    ).apply(traced, report)
    probe_rope.run(traced, report)  # what no pattern knows
