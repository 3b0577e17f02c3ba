"""Rotary embeddings in any spelling: what lies between the heads and attention is asked what it does.

The part of the graph that makes q of the heads a linear gave is run on unit vectors at a few positions. Where
its answers are the rotations of some frequencies, it becomes the op, however it was written: halves or pairs,
complex numbers, tables or formulas, either direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .columns import trace_heads
from .graph import EXAMPLE_ROWS, Lazy, Traced, ancestors, aten, call, evaluate, is_op, ours, shape
from .rule import Report

TOLERANCE = 1e-4  # of the scale: what angles in float32 lose by position 1728
NOTHING = 1e-6  # a column that moves less at every probe does not rotate


@dataclass
class Rotation:
    inv_freq: Tensor
    style: str
    scale: float


def run(traced: Traced, report: Report) -> None:
    """q and k of every attention whose heads are behind something else than reshapes and ropes."""
    for node in list(traced.graph.find_nodes(op="call_function", target=ours.attention_heads.default)):
        for index in (0, 1):
            given: Any = node.args[index]
            if is_op(given, ours.rope.default) or trace_heads(given) is not None:
                continue
            new = _as_rope(traced, given)
            if isinstance(new, str):
                report.miss(given, new)
                continue
            node.update_arg(index, new)
            report.hits += 1
    traced.clean()


def _as_rope(traced: Traced, node: fx.Node) -> fx.Node | str:
    """A rope that computes ``node``, or why there is none."""
    if is_op(node, ours.rms_norm.default) and node.args[1:3] == (None, None):
        return _before_norm(traced, node)
    source = _heads_before(traced, node)
    if source is None:
        return "q or k is not computed from the heads of a linear alone"
    positions = _probes(traced)
    matrices = _matrices(traced, node, source, positions)
    if isinstance(matrices, str):
        return matrices
    found = _rotation(matrices, positions)
    if isinstance(found, str):
        return found
    heads = source
    if shape(source) != shape(node):
        heads = call(traced, node, aten.transpose.int, (source, 1, 2))
        heads.meta["val"] = node.meta["val"]
    name = weight_name(traced, found.inv_freq)
    weight = traced.add_weight(
        name, Lazy(tuple(found.inv_freq.shape), (name,), lambda: found.inv_freq, "constant")
    )
    return call(
        traced, node, ours.rope.default,
        (heads, traced.input("positions"), weight, found.style, found.scale),
    )  # fmt: skip


def _before_norm(traced: Traced, norm: fx.Node) -> fx.Node | str:
    """A norm without a weight, after the rotation, may as well come before it: lengths do not change."""
    inner: Any = norm.args[0]
    turned = inner if is_op(inner, ours.rope.default) else _as_rope(traced, inner)
    if isinstance(turned, str):
        return turned
    x, *rest = turned.args
    if rest[-1] != 1:
        return "q or k is normed after a rotation that scales it"
    normed = call(traced, norm, norm.target, (x, *norm.args[1:]))
    return call(traced, norm, ours.rope.default, (normed, *rest))


def weight_name(traced: Traced, inv_freq: Tensor) -> str:
    """One name for one set of frequencies."""
    index = 0
    while (other := traced.weights.get(f"rope_{index}")) is not None:
        if torch.equal(other.load(), inv_freq):
            break
        index += 1
    return f"rope_{index}"


def _heads_before(traced: Traced, node: fx.Node) -> fx.Node | None:
    """The last tensor of heads, [1, H, T, D] or [1, T, H, D], that all of ``node`` is computed from."""
    order = {n: i for i, n in enumerate(traced.graph.nodes)}
    of_tokens = _depends_on_tokens(traced)
    frontier = {node}
    while frontier:
        latest = max(frontier, key=order.__getitem__)
        frontier.remove(latest)
        frontier |= {n for n in latest.all_input_nodes if n in of_tokens}
        if len(frontier) == 1:
            (only,) = frontier
            if only.op == "placeholder":
                return None
            if isinstance(only.meta["val"], Tensor) and _are_heads(traced, only, node):
                return only
    return None


def _depends_on_tokens(traced: Traced) -> set[fx.Node]:
    found = {traced.input("tokens")}
    for node in traced.graph.nodes:
        if not is_op(node, aten.sym_size.int) and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _are_heads(traced: Traced, source: fx.Node, node: fx.Node) -> bool:
    wanted = shape(node)
    if shape(source) == wanted:
        return trace_heads(source) is not None
    if shape(source) != (wanted[0], wanted[2], wanted[1], wanted[3]):
        return False
    turned = call(traced, source.next, aten.transpose.int, (source, 1, 2))
    turned.meta["val"] = node.meta["val"]
    known = trace_heads(turned) is not None
    traced.graph.erase_node(turned)
    return known


def _probes(traced: Traced) -> Tensor:
    """EXAMPLE_ROWS positions: 0, 1, then further and further apart, as far as the model's tables reach."""
    limit = traced.max_position or 2048
    cubes = [n**3 for n in range(EXAMPLE_ROWS)]
    inside = [p for p in cubes if p < limit] or [0]
    if limit - 1 > inside[-1] and len(inside) < EXAMPLE_ROWS:
        inside.append(limit - 1)
    return torch.tensor((inside + inside[-1:] * EXAMPLE_ROWS)[:EXAMPLE_ROWS])


def _matrices(traced: Traced, node: fx.Node, source: fx.Node, positions: Tensor) -> Tensor | str:
    """What becomes of every unit vector at each position: [positions, D, D], a row for each vector."""
    _, heads, rows, width = shape(node)
    turned = shape(source) != shape(node)
    nodes = ancestors(node, source)
    answers = torch.zeros(rows, width, width)
    for first in range(0, width, heads):
        units = torch.zeros(1, heads, rows, width)
        inside = range(first, min(first + heads, width))
        for head, column in enumerate(inside):
            units[0, head, :, column] = 1
        given = units.transpose(1, 2).contiguous() if turned else units
        out = _run(traced, nodes, source, given, positions)[node]
        if out.shape != units.shape or not torch.isfinite(out).all():
            return "q or k is not a rotation of heads"
        for head, column in enumerate(inside):
            answers[:, column] = out[0, head]
    probe = torch.randn(1, heads, rows, width, generator=torch.Generator().manual_seed(0))
    given = probe.transpose(1, 2).contiguous() if turned else probe
    out = _run(traced, nodes, source, given, positions)[node]
    linear = torch.einsum("bhtd,tde->bhte", probe, answers)
    if float((out - linear).abs().max()) > 1e-4 * float(out.abs().max()):
        return "q or k is not linear in its heads"
    return answers


def _run(
    traced: Traced, nodes: list[fx.Node], source: fx.Node, value: Tensor, positions: Tensor
) -> dict[fx.Node, Any]:
    env: dict[fx.Node, Any] = {source: value}
    for node in nodes:
        if node is source:
            continue
        if node.op == "placeholder":
            lazy = traced.weights.get(node.name)
            given = positions[None] if node.name == "positions" else torch.zeros_like(positions)[None]
            env[node] = given if lazy is None else lazy.load()
        else:
            env[node] = evaluate(node.target, node.args, node.kwargs, env.__getitem__)
    return env


def _rotation(matrices: Tensor, positions: Tensor) -> Rotation | str:
    """The frequencies by which ``matrices`` rotate; the first position is 0, the second 1."""
    if len(positions) < 2 or int(positions[1]) != 1:
        return "tables of a single position"
    scale = float(matrices[0, 0, 0])
    why = "q or k is not rotated by its position"
    for style, pairs in _layouts(matrices, scale):
        for inv_freq in _frequencies(matrices, positions, pairs, scale):
            if _distance(matrices, positions, Rotation(inv_freq, style, scale)) < TOLERANCE * max(scale, 1):
                return Rotation(inv_freq, style, scale)
    return why


def _layouts(matrices: Tensor, scale: float) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Styles that the first column's partner allows, with the pairs of columns that rotate together."""
    width = matrices.shape[1]
    moved = (matrices - torch.eye(width)).abs().amax(0)  # [D, D]: by any position
    others = moved[0].clone()
    others[0] = 0
    partner = int(others.argmax())
    if partner == 0 or scale == 0:
        return
    rotating = (moved.amax(1) > NOTHING).nonzero()[:, 0]
    last = int(rotating[-1]) + 1
    if partner == 1:
        yield "interleaved", [(d, d + 1) for d in range(0, last + last % 2, 2)]
    if 2 * partner <= width:
        yield "half", [(d, d + partner) for d in range(partner)]


def _frequencies(
    matrices: Tensor, positions: Tensor, pairs: list[tuple[int, int]], scale: float
) -> Iterator[Tensor]:
    """By the angle at position 1, and by those further on, which know it more exactly."""
    first = torch.tensor([a for a, _ in pairs])
    second = torch.tensor([b for _, b in pairs])
    angles = torch.atan2(matrices[:, first, second].double(), matrices[:, first, first].double())
    refined = angles[1].clone()
    candidates = [angles[1].clone()]
    for number in range(2, len(positions)):
        position = int(positions[number])
        turns = torch.round((position * refined - angles[number]) / (2 * math.pi))
        refined = (angles[number] + 2 * math.pi * turns) / position
        candidates.append(refined.clone())
    for candidate in reversed(candidates):
        yield candidate.float()


def _distance(matrices: Tensor, positions: Tensor, rotation: Rotation) -> float:
    """How far the rotation's own answers are from the graph's."""
    width = matrices.shape[1]
    units = torch.eye(width)[None, :, None, :].expand(1, width, len(positions), width)
    rope = ours.rope.default
    expected = rope(units, positions[None], rotation.inv_freq, rotation.style, rotation.scale)
    return float((expected[0].transpose(0, 1) - matrices).abs().max())
