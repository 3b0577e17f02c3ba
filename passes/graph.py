"""The graph that passes rewrite, and the few questions they ask of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ..kernels import ops as _ops  # noqa: F401  (registers the gristmill ops)

aten = torch.ops.aten
ours = torch.ops.gristmill
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
WRAPPED = "model"  # what the tracer's wrapper calls the model
EXAMPLE_ROWS = 13  # T while tracing: a number no model has as a width


class Quantized(Protocol):
    """The form of a matrix [n, k] that a checkpoint holds quantized, of which passes may only choose rows."""

    @property
    def merge_key(self) -> Hashable:
        """Linears of one input may be merged where this is equal."""

    def select(self, rows: Tensor) -> Any:
        """The same for these rows, in this order."""


@dataclass
class Lazy:
    """A weight that is read when asked for: shape, names in the checkpoint, how to load it (float32).

    origin: how it comes from the tensor of its first name, for who writes checkpoints: "checkpoint" (as it
    is), "transposed", "rows" (row i is row ``rows[i]`` of it), "computed" (not to be undone), or "constant"
    (the checkpoint has no such tensor). quantized: the form in which the checkpoint holds a linear's [n, k].
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    load: Callable[[], Tensor]
    origin: str = "computed"
    rows: Tensor | None = None
    quantized: Quantized | None = None

    def moved(self, rows: Tensor) -> Lazy:
        """These rows, in this order."""
        before = torch.arange(self.shape[0]) if self.rows is None else self.rows
        origin = "rows" if self.origin in ("checkpoint", "rows") else "computed"
        kept = self.quantized.select(rows) if self.quantized else None
        return Lazy(
            (len(rows), *self.shape[1:]), self.names, lambda: self.load()[rows], origin, before[rows], kept
        )

    def turned(self) -> Lazy:
        """The transpose of a matrix whose quantized form, if any, is that of the transpose already."""
        origin = "transposed" if self.origin == "checkpoint" else "computed"
        return replace(
            self,
            shape=self.shape[::-1],
            load=lambda: self.load().t().contiguous(),
            origin=origin,
        )


@dataclass
class Traced:
    """A graph whose placeholders are ``weights`` by name and inputs (``tokens``, ``slots`` ...: [1, T])."""

    graph: fx.Graph
    weights: dict[str, Lazy]
    config: Any
    max_position: int | None = None  # positions that frozen rotary frequencies hold for

    def weight(self, node: Any) -> Lazy | None:
        """The weight a node stands for, or None."""
        return self.weights.get(node.name) if isinstance(node, fx.Node) and node.op == "placeholder" else None

    def add_weight(self, name: str, lazy: Lazy) -> fx.Node:
        """A new placeholder for ``lazy``, or the one of that name made earlier."""
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name == name:
                return node
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(name)
        self.weights[node.name] = lazy
        return node

    def input(self, name: str) -> fx.Node:
        """The placeholder of an input; made when the graph has none yet."""
        found = [n for n in self.graph.find_nodes(op="placeholder") if n.name == name]
        if found:
            return found[0]
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            return self.graph.placeholder(name)

    @property
    def logits(self) -> Any:
        """The node whose value is the graph's result."""
        return next(n for n in reversed(self.graph.nodes) if n.op == "output").args[0][0]

    @property
    def vocabulary(self) -> int:
        """How wide the logits are."""
        return int(self.logits.meta["val"].shape[-1])

    def clean(self) -> None:
        """Drop dead nodes and weights that nothing uses."""
        self.graph.eliminate_dead_code()
        for node in list(self.graph.find_nodes(op="placeholder")):
            if node.name in self.weights and not node.users:
                del self.weights[node.name]
                self.graph.erase_node(node)
        self.graph.lint()


def is_op(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def exchanged(transpose: fx.Node) -> set[Any]:
    """The two dimensions that aten.transpose exchanges, counted from the first."""
    return {d % len(shape(transpose)) for d in transpose.args[1:]}  # type: ignore[operator]


def shape(node: fx.Node) -> tuple[int, ...]:
    """The node's shape with T = EXAMPLE_ROWS."""
    return tuple(int(s) if isinstance(s, int) else int(s.node.hint) for s in node.meta["val"].shape)


def width(node: fx.Node) -> int:
    return shape(node)[-1]


def call(
    traced: Traced, before: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """A new call placed before ``before``, with its meta: the caller replaces ``before`` or sets another."""
    with traced.graph.inserting_before(before):
        node = traced.graph.call_function(target, args, kwargs or {})
    node.meta = dict(before.meta)
    return node


def swap(old: fx.Node, new: fx.Node) -> None:
    """Every use of ``old`` becomes a use of ``new``; ``old`` is erased."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by the names of the op's schema, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    out = {}
    for n, argument in enumerate(schema.arguments):
        if n < len(node.args):
            out[argument.name] = node.args[n]
        else:
            out[argument.name] = node.kwargs.get(
                argument.name, argument.default_value if argument.has_default_value() else None
            )
    return out


def with_arguments(traced: Traced, node: fx.Node, before: fx.Node, **changes: Any) -> fx.Node:
    """A copy of a call with some arguments changed, placed before ``before`` and carrying its meta."""
    given = arguments(node) | changes
    return call(traced, before, node.target, tuple(given.values()))


def place(node: fx.Node) -> str:
    """Where a node comes from in the model, for messages: its module path when the tracer knew it."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    known = [p for p in paths if p not in ("", WRAPPED) and not p.startswith("_")]  # exporter hooks begin so
    if not known:
        return str(node.target)
    return f"{node.target} in {known[-1].removeprefix('L__self___').replace('model.', '', 1)}"


def evaluate(target: Any, args: Any, kwargs: Any, value: Callable[[fx.Node], Any]) -> Any:
    """Run a call with ``value`` of its inputs; views as reshapes: the copies before them may be gone."""
    target = aten.reshape.default if target in VIEWS else target
    return target(*fx.map_arg(args, value), **fx.map_arg(kwargs, value))


def ancestors(node: fx.Node, known: fx.Node | None = None) -> list[fx.Node]:
    """``node`` and all that it is computed from, in order; ``known``: what of that is not looked behind."""
    seen: set[fx.Node] = set() if known is None else {known}
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack += current.all_input_nodes
    return [n for n in node.graph.nodes if n in seen]


def only_user(node: fx.Node) -> bool:
    return len(node.users) == 1


def plain_linear(node: Any) -> bool:
    """Whether a node is a linear with nothing after its bias."""
    if not is_op(node, ours.linear.default):
        return False
    a = arguments(node)
    extras = (a["activation"], a["glu"], a["residual"], a["scale"], a["softcap"])
    return extras == ("none", False, None, 1.0, 0.0)
