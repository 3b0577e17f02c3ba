"""One spelling for everything: no asserts and no-ops, linears and embeddings as our ops, constants folded."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from .graph import (
    EXAMPLE_ROWS,
    VIEWS,
    Lazy,
    Traced,
    arguments,
    aten,
    call,
    evaluate,
    exchanged,
    is_op,
    ours,
    shape,
    swap,
)
from .rule import Report, Rule

ASSERTS = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "_guards_fn")
NO_OPS = (
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.dropout.default,
)
CASTS = (aten._to_copy.default, aten.type_as.default, aten.to.dtype)
ROW_WISE = (
    ours.linear.default, ours.layer_norm.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor,
    aten.div.Tensor, aten.relu.default, aten.silu.default, aten.gelu.default, aten.tanh.default,
    aten.sigmoid.default,
)  # fmt: skip
SHAPE_ONLY = (*VIEWS, aten.expand.default)


def run(traced: Traced, report: Report) -> None:
    """Rewrites until nothing changes any more."""
    while any([_sweep(traced, report), _fold_constants(traced, report), _unflatten(traced, report)]):
        traced.graph.eliminate_dead_code()
    GELU_TANH.apply(traced, report)
    _drop_asserts(traced)
    traced.clean()


def _drop_asserts(traced: Traced) -> None:
    for node in reversed(list(traced.graph.nodes)):
        name = str(node.target)
        if not node.users and node.op in ("call_function", "call_module") and any(a in name for a in ASSERTS):
            traced.graph.erase_node(node)


def _sweep(traced: Traced, report: Report) -> bool:
    _drop_asserts(traced)
    before = report.hits
    for node in list(traced.graph.nodes):
        if node.op != "call_function":
            continue
        same = _same_value(node)
        if same is not None:
            node.replace_all_uses_with(same)
            traced.graph.erase_node(node)
            report.hits += 1
            continue
        rewrite = REWRITES.get(node.target)
        new = rewrite(traced, node) if rewrite else None
        if new is not None:
            swap(node, new)
            report.hits += 1
    return report.hits > before


def _same_value(node: fx.Node) -> fx.Node | None:
    """The input that this node only renames, or None."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return _cat_of_one(node)
    first = node.args[0]
    if node.target in NO_OPS:
        return first
    if node.target in CASTS and _dtype(node) == _dtype(first):
        return first
    if node.target in SHAPE_ONLY and shape(node) == shape(first):
        return first
    if is_op(node, aten.mul.Tensor, aten.div.Tensor) and node.args[1] == 1 and _dtype(node) == _dtype(first):
        return first
    if is_op(node, aten.slice.Tensor) and shape(node) == shape(first):
        return first
    transposed = is_op(node, aten.transpose.int) and is_op(first, aten.transpose.int)
    if transposed and exchanged(node) == exchanged(first):
        return first.args[0]  # type: ignore[return-value]
    return None


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def _cat_of_one(node: fx.Node) -> fx.Node | None:
    """torch.cat whose other parts are empty."""
    if not is_op(node, aten.cat.default):
        return None
    parts: list[Any] = [p for p in arguments(node)["tensors"] if 0 not in shape(p)]
    return parts[0] if len(parts) == 1 else None


def _linear(traced: Traced, node: fx.Node) -> fx.Node:
    x, weight = node.args[0], node.args[1]
    bias = node.args[2] if len(node.args) > 2 else None
    return call(traced, node, ours.linear.default, (x, [weight], [bias]))


def _addmm(traced: Traced, node: fx.Node) -> fx.Node | None:
    """addmm(bias, view(x), W), then view: GPT-2's Conv1D. The weight is turned once, lazily."""
    bias, rows, weight = node.args[:3]  # type: Any, Any, Any
    source = traced.weight(weight)
    if source is None or node.kwargs or not is_op(rows, aten.view.default) or len(shape(rows.args[0])) != 3:
        return None
    views = list(node.users)
    if not all(
        is_op(v, aten.view.default) and shape(v)[:2] == (1, EXAMPLE_ROWS) and len(shape(v)) == 3
        for v in views
    ):
        return None
    turned_weight = traced.add_weight(f"{weight.name}_transposed", source.turned())
    new = call(traced, node, ours.linear.default, (rows.args[0], [turned_weight], [bias]))
    new.meta["val"] = views[0].meta["val"]
    return new


def _embedding(traced: Traced, node: fx.Node) -> fx.Node:
    ids: Any = node.args[1]
    weight, offset = node.args[0], 0
    if is_op(ids, aten.add.Tensor) and isinstance(ids.args[1], int) and not ids.kwargs:
        ids, offset = ids.args
    return call(traced, node, ours.embedding.default, (ids, weight, None, 1.0, offset))


def _layer_norm(traced: Traced, node: fx.Node) -> fx.Node | None:
    a = arguments(node)
    if len(a["normalized_shape"]) != 1:
        return None
    return call(traced, node, ours.layer_norm.default, (a["input"], a["weight"], a["bias"], None, a["eps"]))


def _rms_norm(traced: Traced, node: fx.Node) -> fx.Node | None:
    a = arguments(node)
    if len(a["normalized_shape"]) != 1:
        return None
    eps = torch.finfo(_dtype(node)).eps if a["eps"] is None else a["eps"]
    return call(traced, node, ours.rms_norm.default, (a["input"], a["weight"], None, float(eps)))


def _matmul(traced: Traced, node: fx.Node) -> fx.Node | None:
    """rows @ W, and rows @ W.T of a weight as it is stored."""
    x, weight = node.args  # type: Any, Any
    if len(shape(weight)) != 2 or traced.weight(x) is not None:
        return None
    if is_op(weight, aten.t.default, aten.transpose.int, aten.permute.default):
        stored = traced.weight(weight.args[0])
        return call(traced, node, ours.linear.default, (x, [weight.args[0]], [None])) if stored else None
    source = traced.weight(weight)
    if source is None:
        return None
    turned = traced.add_weight(f"{weight.name}_transposed", source.turned())
    return call(traced, node, ours.linear.default, (x, [turned], [None]))


def _scalar_operand(traced: Traced, node: fx.Node) -> fx.Node | None:
    """A constant tensor with one element, as a second operand, becomes a literal."""
    x, lazy = node.args[0], traced.weight(node.args[1])
    if lazy is None or math.prod(lazy.shape) != 1 or not isinstance(x, fx.Node) or shape(x) != shape(node):
        return None
    return call(traced, node, node.target, (x, lazy.load().item()), dict(node.kwargs))


REWRITES: dict[Any, Any] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.embedding.default: _embedding,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.matmul.default: _matmul,
    aten.mul.Tensor: _scalar_operand,
    aten.div.Tensor: _scalar_operand,
    aten.add.Tensor: _scalar_operand,
}


def _fold_constants(traced: Traced, report: Report) -> bool:
    """A call over weights and literals alone becomes a weight itself, computed when it is read."""
    changed = False
    for node in list(traced.graph.nodes):
        sources = [traced.weight(a) for a in node.all_input_nodes]
        if node.op != "call_function" or node.target is operator.getitem or not sources or None in sources:
            continue
        if not isinstance(node.meta.get("val"), Tensor) or not isinstance(node.target, torch._ops.OpOverload):
            continue
        swap(node, traced.add_weight(f"{node.name}_folded", _folded(traced, node)))
        report.hits += 1
        changed = True
    return changed


def _unflatten(traced: Traced, report: Report) -> bool:
    """[T, W] rows, which some models flatten [1, T, W] to for a while, get their leading 1 back."""
    flat: set[fx.Node] = set()
    roots, ends = [], []
    for node in traced.graph.nodes:
        first: Any = node.args[0] if node.args else None
        if is_op(node, *VIEWS) and first in flat and shape(node) == (1, *shape(first)):
            ends.append(node)
        elif is_op(node, *VIEWS) and len(shape(node)) == 2 and shape(first) == (1, *shape(node)):
            roots.append(node)
            flat.add(node)
        elif any(source in flat for source in node.all_input_nodes):
            rows = [s for s in node.all_input_nodes if traced.weight(s) is None]
            if not is_op(node, *ROW_WISE) or any(r not in flat for r in rows):
                return False
            flat.add(node)
    for node in flat:
        node.meta["val"] = node.meta["val"][None]
    for node in roots + ends:
        swap(node, node.args[0])
    report.hits += len(roots)
    return bool(roots)


def _folded(traced: Traced, node: fx.Node) -> Lazy:
    lazies = {n: traced.weights[n.name] for n in node.all_input_nodes}

    target, args, kwargs = node.target, node.args, node.kwargs  # the node itself is erased

    def load() -> Tensor:
        return evaluate(target, args, kwargs, lambda n: lazies[n].load())

    names = tuple(dict.fromkeys(n for lazy in lazies.values() for n in lazy.names))
    constant = all(lazy.origin == "constant" for lazy in lazies.values())
    return Lazy(shape(node), names, load, "constant" if constant else "computed")


def _gelu_new(x: Any) -> Any:
    inner = aten.add.Tensor(x, aten.mul.Tensor(aten.pow.Tensor_Scalar(x, 3.0), 0.044715))
    tanh = aten.tanh.default(aten.mul.Tensor(inner, math.sqrt(2.0 / math.pi)))
    return aten.mul.Tensor(aten.mul.Tensor(x, 0.5), aten.add.Tensor(tanh, 1.0))


GELU_TANH = Rule(
    patterns=(_gelu_new,),
    replace=lambda traced, out, found: call(
        traced, out, aten.gelu.default, (found["x"],), {"approximate": "tanh"}
    ),
)
