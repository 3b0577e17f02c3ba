"""Positions that a module counts itself become an input: its rows may then belong to different sequences.

A module that sees one whole sequence writes ``torch.arange(T)`` or ``table[:T]``; in a program over rows the
place of a row is an input. Both spellings become lookups by that input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .graph import Traced, arguments, aten, call, is_op, ours, shape, swap
from .rule import Report

ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
LOOKUPS = (aten.index_select.default, aten.index.Tensor, aten.embedding.default, ours.embedding.default)
SAME_IDS = (
    aten.select.int, aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten._to_copy.default,
    aten.expand.default, aten.squeeze.dim, aten.to.dtype,
)  # fmt: skip


def run(traced: Traced, report: Report) -> None:
    """The pass; afterwards `traced.max_position` is at most the rows of the tables that positions index."""
    for node in list(traced.graph.nodes):
        new = _counted(traced, node) or _sliced(traced, node)
        if new is not None:
            swap(node, new)
            report.hits += 1
    for node in list(traced.graph.nodes):
        new = _whole(traced, node) or _lookup(traced, node)
        if new is not None:
            swap(node, new)
            report.hits += 1
    traced.clean()
    limits = [limit for n in traced.graph.nodes if (limit := _rows_of_table(traced, n)) is not None]
    if traced.max_position is not None:
        limits.append(traced.max_position)
    traced.max_position = min(limits, default=None)


def made(traced: Traced, before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A call placed before ``before`` whose meta says what it gives."""
    node = call(traced, before, target, args)
    values = fx.map_arg(args, lambda n: n.meta["val"])
    held: Any = next(n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor))
    with held.fake_mode:
        node.meta["val"] = target(*values)
    return node


def is_rows(extent: Any, traced: Traced) -> bool:
    """Whether an extent (a number, a symbol or a node of one) is T, the number of rows."""
    value = extent.meta.get("val") if isinstance(extent, fx.Node) else extent
    return isinstance(value, torch.SymInt) and value.node.expr == rows_symbol(traced)


def rows_symbol(traced: Traced) -> Any:
    """The expression that the exporter has for T."""
    tokens = traced.input("tokens")
    return tokens.meta["val"].shape[1].node.expr


def _positions(traced: Traced, before: fx.Node) -> fx.Node:
    """Positions [T], int64."""
    positions = traced.input("positions")
    if "val" not in positions.meta:
        positions.meta["val"] = traced.input("tokens").meta["val"]
    return made(traced, before, aten.select.int, positions, 0, 0)


def _counted(traced: Traced, node: fx.Node) -> fx.Node | None:
    """torch.arange(T)."""
    if not is_op(node, *ARANGES):
        return None
    a = arguments(node)
    if a.get("start", 0) != 0 or a.get("step", 1) != 1 or not is_rows(a["end"], traced):
        return None
    positions = _positions(traced, node)
    dtype = node.meta["val"].dtype
    if dtype == torch.int64:
        return positions
    new = call(traced, node, aten._to_copy.default, (positions,), {"dtype": dtype})
    new.meta["val"] = node.meta["val"]
    return new


def _sliced(traced: Traced, node: fx.Node) -> fx.Node | None:
    """table[:T] along any dimension, of a constant table."""
    if not is_op(node, aten.slice.Tensor):
        return None
    a = arguments(node)
    table, start = a["self"], a["start"] or 0
    if not isinstance(start, int) or start < 0 or a["step"] != 1 or not _is_constant(traced, table):
        return None
    dim = a["dim"] % len(shape(table))
    if not is_rows(node.meta["val"].shape[dim], traced):
        return None
    positions = _positions(traced, node)
    if start:
        positions = made(traced, node, aten.add.Tensor, positions, start)
    new = call(traced, node, aten.index_select.default, (table, dim, positions))
    new.meta["val"] = node.meta["val"]
    return new


def _is_constant(traced: Traced, node: Any) -> bool:
    """Whether nothing but weights and literals went into a node."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder" and traced.weight(current) is None:
            return False
        stack += current.all_input_nodes
    return True


def _whole(traced: Traced, node: fx.Node) -> fx.Node | None:
    """unsqueeze(positions[0], 0) is positions."""
    if not is_op(node, aten.unsqueeze.default, aten.view.default, aten.reshape.default):
        return None
    source: Any = node.args[0]
    if is_op(source, aten.select.int) and source.args == (traced.input("positions"), 0, 0):
        return traced.input("positions") if shape(node) == shape(traced.input("positions")) else None
    return None


def _ids(traced: Traced, node: Any, before: fx.Node) -> fx.Node | None:
    """The ids [1, T] of which ``node`` [T] is the only row: the positions, perhaps a number on."""
    if is_op(node, aten.select.int) and node.args == (traced.input("positions"), 0, 0):
        return traced.input("positions")
    if is_op(node, aten.add.Tensor) and isinstance(node.args[1], int) and not node.kwargs:
        inner = _ids(traced, node.args[0], before)
        return None if inner is None else made(traced, before, aten.add.Tensor, inner, node.args[1])
    return None


def _lookup(traced: Traced, node: fx.Node) -> fx.Node | None:
    """A learned table [P, W] at positions [T] gives rows [1, T, W] as embeddings do, then reshaped."""
    found = _table_and_ids(traced, node)
    if found is None:
        return None
    table, ids = found
    rows = _ids(traced, ids, node)
    if rows is None:
        return None
    new = made(traced, node, aten.embedding.default, table, rows)
    wanted = node.meta["val"]
    if wanted.dim() == 3:
        return new
    for user in list(node.users):  # rows that are added to rows need no reshaping
        if user.op == "call_function" and user.meta.get("val") is not None and _is_rows_value(user, new):
            user.replace_input_with(node, new)
    return made(traced, node, aten.select.int, new, 0, 0)


def _is_rows_value(user: fx.Node, new: fx.Node) -> bool:
    elementwise = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor)
    return is_op(user, *elementwise) and shape(user) == shape(new)


def _table_and_ids(traced: Traced, node: fx.Node) -> tuple[fx.Node, Any] | None:
    """(table [P, W], ids [T]) of a lookup of whole rows in a weight."""
    if is_op(node, aten.embedding.default, ours.embedding.default):
        a = arguments(node)
        rows: Any = a.get("indices", a.get("ids"))
        plain = a.get("residual") is None and a.get("scale", 1.0) == 1.0 and not a.get("offset")
        return (a["weight"], rows) if len(shape(rows)) == 1 and plain else None
    args: Any = node.args
    if is_op(node, aten.index_select.default):
        table, dim, ids = args[:3]
    elif is_op(node, aten.index.Tensor) and len(args[1]) == 1:
        (table, (ids,)), dim = args[:2], 0
    else:
        return None
    extents = shape(table)
    if dim != len(extents) - 2 or any(n != 1 for n in extents[:-2]) or not _is_parameter(traced, table):
        return None
    if len(extents) > 2:
        table = made(traced, node, aten.view.default, table, list(extents[-2:]))
    return table, ids


def _is_parameter(traced: Traced, table: fx.Node) -> bool:
    """A tensor of the state dict: what is looked up in it are rows of the model, not a rotary table."""
    lazy = traced.weight(table)
    return lazy is not None and lazy.origin == "checkpoint"


def _rows_of_table(traced: Traced, node: fx.Node) -> int | None:
    """How many positions a lookup by positions knows."""
    if not is_op(node, *LOOKUPS):
        return None
    a = arguments(node)
    dim, offset = a.get("dim", 0), a.get("offset") or 0
    table: Any = a.get("weight", a.get("self"))
    ids: Any = next((x for n in ("index", "indices", "ids") if (x := a.get(n)) is not None), None)
    if isinstance(ids, (list, tuple)):
        dim = next(i for i, x in enumerate(ids) if x is not None)
        ids = ids[dim]
    while is_op(ids, *SAME_IDS) or (is_op(ids, aten.add.Tensor) and isinstance(ids.args[1], int)):
        offset += ids.args[1] if is_op(ids, aten.add.Tensor) else 0
        ids = ids.args[0]
    return shape(table)[dim] - offset if ids is traced.input("positions") else None
