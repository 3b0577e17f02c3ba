"""Linears of one input become one with many segments: the input is read and quantized once.

Weights that the checkpoint holds quantized stay apart where they differ in their column order, or are
integers beside floats.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import fx

from .graph import Traced, arguments, aten, call, ours, plain_linear, shape
from .rule import Report


def run(traced: Traced, report: Report) -> None:
    groups: dict[tuple[fx.Node, Hashable], list[fx.Node]] = {}
    for node in traced.graph.find_nodes(op="call_function", target=ours.linear.default):
        if plain_linear(node) and len(shape(node)) == 3:
            groups.setdefault((node.args[0], merge_key(traced, node)), []).append(node)
    for group in groups.values():
        if len(group) > 1:
            _merge(traced, group)
            report.hits += 1
    traced.clean()


def merge_key(traced: Traced, linear: fx.Node) -> Hashable:
    """Equal for linears whose weights may share an instruction."""
    lazies = [traced.weight(w) for w in arguments(linear)["weights"]]
    return tuple(dict.fromkeys(z.quantized.merge_key if z and z.quantized else None for z in lazies))


def _merge(traced: Traced, group: list[fx.Node]) -> None:
    order = {n: i for i, n in enumerate(traced.graph.nodes)}
    first = min(group, key=lambda n: order[n])
    weights = [w for n in group for w in arguments(n)["weights"]]
    biases = [b for n in group for b in arguments(n)["biases"]]
    merged = call(traced, first, ours.linear.default, (first.args[0], weights, biases))
    total = sum(shape(n)[-1] for n in group)
    merged.meta["val"] = first.meta["val"].new_empty(*first.meta["val"].shape[:2], total)
    start = 0
    for node in group:
        stop = start + shape(node)[-1]
        part = call(traced, node, aten.slice.Tensor, (merged, 2, start, stop))
        node.replace_all_uses_with(part)
        start = stop
