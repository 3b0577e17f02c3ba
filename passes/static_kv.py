"""Attention gets its cache: q, k, v as columns of rows, ropes and head norms inside, at (slot, position)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from .columns import Heads, trace_heads
from .graph import VIEWS, Lazy, Traced, arguments, aten, call, is_op, ours, shape, swap
from .rule import Report


def run(traced: Traced, report: Report) -> None:
    for node in traced.graph.find_nodes(op="call_function", target=ours.attention_heads.default):
        reason = _lower(traced, node)
        if reason is None:
            report.hits += 1
        else:
            report.miss(node, reason)
    traced.clean()


def _lower(traced: Traced, node: fx.Node) -> str | None:
    a = arguments(node)
    ropes = [_rope(a[name]) for name in ("q", "k")]
    inputs = [ropes[0][0], ropes[1][0], a["v"]]
    heads = [trace_heads(n) for n in inputs]
    if any(h is None for h in heads):
        return "q, k or v is not cut from rows by reshaping alone"
    if ropes[0][1:] != ropes[1][1:]:
        return "q and k rotate differently"
    q, k, v = heads
    assert q is not None and k is not None and v is not None
    norms = [_norm(traced, h) for h in (q, k)]
    if v.norm is not None or norms[0][1] != norms[1][1]:
        return "q and k are normed differently"
    rows = _rows(traced, node, (q, k, v))
    if isinstance(rows, str):
        return rows
    _, inv_freq, style, scale = ropes[0]
    args = (
        *rows, traced.input("positions"), traced.input("slots"), inv_freq,
        norms[0][0], norms[1][0], a["sinks"], q.columns.shape[0], k.columns.shape[0], a["scale"], a["window"],
        a["softcap"], style, scale, norms[0][1] or 0.0,
    )  # fmt: skip
    new = call(traced, node, ours.attention.default, args)
    return _replace_flat(traced, node, new)


def _rope(node: fx.Node) -> tuple[Any, Any, str, float]:
    if not is_op(node, ours.rope.default):
        return node, None, "half", 1.0
    a = arguments(node)
    return a["x"], a["inv_freq"], a["style"], a["scale"]


def _norm(traced: Traced, heads: Heads) -> tuple[fx.Node | None, float | None]:
    """(weight, eps) of the norm over a head, (None, None) without one; no weight means ones."""
    if heads.norm is None:
        return None, None
    a, width = arguments(heads.norm), heads.columns.shape[1]
    ones = Lazy((width,), (f"ones_{width}",), lambda: torch.ones(width), "constant")
    return a["weight"] or traced.add_weight(ones.names[0], ones), float(a["eps"])


def _replace_flat(traced: Traced, node: fx.Node, new: fx.Node) -> str | None:
    """The traced op gives [1, T, H, V]; its users flatten that to rows, which the new op gives itself."""
    users = list(node.users)
    for user in users:
        flat = shape(node)[:2] + (shape(node)[2] * shape(node)[3],)
        if not is_op(user, *VIEWS) or shape(user) != flat:
            traced.graph.erase_node(new)
            return f"the result goes to {user.target}, expected heads flattened to rows"
    new.meta["val"] = users[0].meta["val"]
    for user in users:
        swap(user, new)
    return None


def _rows(traced: Traced, node: fx.Node, heads: Iterable[Heads]) -> list[fx.Node] | str:
    """q, k, v as [1, T, H * D] nodes: columns of their bases; weight rows move where these are scattered."""
    heads = tuple(heads)
    out = []
    for base in dict.fromkeys(h.base for h in heads):
        mine = [h for h in heads if h.base is base]
        wanted = torch.cat([h.columns.flatten() for h in mine])
        if not torch.equal(wanted, wanted.sort().values) and _contiguous(mine) is None:
            if not is_op(base, ours.linear.default) or wanted.sort().values.tolist() != list(
                range(shape(base)[-1])
            ):
                return "the heads' columns are scattered over something else than a linear"
            base = _reorder(traced, base, wanted)
            start = 0
            for h in mine:
                h.columns = torch.arange(start, start + h.columns.numel()).view_as(h.columns)
                h.base = base
                start += h.columns.numel()
    for h in heads:
        flat = h.columns.flatten()
        first = int(flat[0])
        if not torch.equal(flat, torch.arange(first, first + flat.numel())):
            return "the heads' columns are scattered over something else than a linear"
        out.append(_slice(traced, node, h.base, first, flat.numel()))
    return out


def _contiguous(heads: list[Heads]) -> list[int] | None:
    """First columns, when every tensor's columns are consecutive."""
    flats = [h.columns.flatten() for h in heads]
    if all(torch.equal(f, torch.arange(int(f[0]), int(f[0]) + f.numel())) for f in flats):
        return [int(f[0]) for f in flats]
    return None


def _slice(traced: Traced, node: fx.Node, base: fx.Node, first: int, count: int) -> fx.Node:
    if count == shape(base)[-1]:
        return base
    new = call(traced, node, aten.slice.Tensor, (base, 2, first, first + count))
    new.meta["val"] = base.meta["val"][:, :, first : first + count]
    return new


def _reorder(traced: Traced, linear: fx.Node, order: Tensor) -> fx.Node:
    """The same linear with its output columns in another order: rows of its weight and entries of its bias
    move.
    """
    a = arguments(linear)
    (weight,), (bias,) = a["weights"], a["biases"]
    args = (a["x"], [_moved(traced, weight, order)], [None if bias is None else _moved(traced, bias, order)])
    return call(traced, linear, ours.linear.default, args)


def _moved(traced: Traced, node: fx.Node, order: Tensor) -> fx.Node:
    return traced.add_weight(f"{node.name}_reordered", traced.weights[node.name].moved(order))
