"""A fused graph → a Program and the list of tensors it needs.

Every node becomes an instruction, except column slices, which become views. Weights are named after the
checkpoint tensors they come from; a tied embedding and head are one matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from ..passes.graph import Lazy, Traced, arguments, aten, is_op, ours, shape
from ..quant.formats.weight import QuantizedWeight
from ..quant.scheme import Scheme, activation_group
from ..quant.tensor import QuantizedTensor
from ..runtime.errors import GristmillError
from ..runtime.program import (
    CACHE_GROUP,
    LOGITS,
    CacheSpec,
    Instruction,
    Limits,
    Program,
    RopeSpec,
    Segment,
    Value,
    View,
)
from .options import CacheFormat


@dataclass
class Matrix:
    """A weight matrix [n, k] to be stored under ``name`` with ``scheme``.

    ``stored``: its stored form where a calibrated method made it, or the checkpoint holds it; None: rounded
    to nearest when written. ``wide``: its scales are known to be f32.
    """

    name: str
    lazy: Lazy
    scheme: Scheme
    stored: Callable[[], QuantizedTensor] | None = None
    wide: bool = False


@dataclass
class Lowered:
    """``matrices``, ``vectors`` (float32) and column ``orders`` [k] (int32) are what the program refers to,
    in the order of first need.

    ``placeholders``: name of a matrix's placeholder in the graph → its stored name; ``roles``: stored name →
    "embedding", "head" or "linear". ``origins``: what the checkpoint calls each of them. ``channel_scales``:
    NAME.input_scale [k] and NAME.output_scale [n] that a matrix's columns and rows were multiplied by, for
    adapters to follow.
    """

    program: Program
    matrices: dict[str, Matrix] = field(default_factory=dict)
    vectors: dict[str, Lazy] = field(default_factory=dict)
    placeholders: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    orders: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    origins: Origins = field(default_factory=dict)
    channel_scales: dict[str, NDArray[np.float32]] = field(default_factory=dict)


# Stored name → the checkpoint's tensors that it is made of, one after the other: name (None: the checkpoint
# has none), rows, origin (see Lazy). "rows": row i is row NAME.rows[i], an i32 vector beside the weights.
Origins = dict[str, list[tuple[str | None, int, str]]]

# role ("embedding", "head", "linear") and the name that the matrix is stored under → scheme
Assign = Callable[[str, str], Scheme]


def lower(
    traced: Traced, assign: Assign, kv: CacheFormat, limits: Limits, float_activations: bool = False
) -> Lowered:
    """Walk the graph once. ``kv``: the format of every cache.

    ``float_activations``: integer weights are multiplied by f32 activations, not by int8 ones.
    """
    return _Lowering(traced, assign, kv, limits, float_activations).run()


class _Lowering:
    def __init__(
        self, traced: Traced, assign: Assign, kv: CacheFormat, limits: Limits, float_activations: bool
    ) -> None:
        self.float_activations = float_activations
        self.traced = traced
        self.assign = assign
        self.kv = kv
        self.result = Lowered(Program(vocabulary=0, limits=limits))
        self.program = self.result.program
        self.views: dict[fx.Node, View] = {}
        self.names: dict[str, str] = {}  # placeholder → stored name
        self.merged: dict[str, list[Lazy | int]] = {}  # placeholder → parts of a bias; int: that many zeros
        self.roles = _roles(traced)

    def run(self) -> Lowered:
        self.head = self.traced.logits
        for node in self._calls():
            if is_op(node, aten.slice.Tensor):
                self.views[node] = self._slice(node)
            else:
                LOWERINGS[node.target](self, node, arguments(node))
        if self.views[self.head].value != LOGITS:
            raise GristmillError(
                "the logits are not computed from the rows asked for; expected a linear head"
            )
        self.program.vocabulary = shape(self.head)[-1]
        return self.result

    def _calls(self) -> list[fx.Node]:
        return [n for n in self.traced.graph.nodes if n.op == "call_function"]

    def emit(
        self,
        node: fx.Node,
        op: str,
        views: dict[str, Any],
        vectors: dict[str, Any],
        weight: str | None = None,
        part: View | None = None,
        column: int = 0,
        **attributes: Any,
    ) -> None:
        """Append an instruction whose result is ``node``, or ``part`` of its columns from ``column`` on."""
        named = {k: v if isinstance(v, list) else self.views[v] for k, v in views.items() if v is not None}
        whole = named.get("residual")
        if part is not None and isinstance(whole, View):
            named["residual"] = View(whole.value, whole.column + column, part.width)
        out = part or self._output(node, self._rows(named, op))
        held = {k: self.vector(v) for k, v in vectors.items() if v is not None}
        self.program.instructions.append(Instruction(op, out, named, held, attributes, weight))
        self.views[node] = self.views[node] if part else out

    def _rows(self, views: dict[str, Any], op: str) -> str:
        if op == "gather_rows":
            return "R"
        first = next((v[0] if isinstance(v, list) else v for v in views.values()), None)
        return "T" if first is None else self.program.values[first.value].rows

    def _output(self, node: fx.Node, rows: str) -> View:
        width = shape(node)[-1]
        if node is self.head and rows == "R":
            return View(LOGITS, 0, width)
        self.program.values.append(Value(rows, width))
        return View(len(self.program.values) - 1, 0, width)

    def _slice(self, node: fx.Node) -> View:
        a = arguments(node)
        if a["dim"] not in (2, -1) or a["step"] != 1:
            raise GristmillError(
                f"a slice over dimension {a['dim']} with step {a['step']} cannot be lowered; "
                "expected columns of a row"
            )
        whole, start = self.views[a["self"]], int(a["start"] or 0)
        column = start if start >= 0 else whole.width + start
        return View(whole.value, whole.column + column, shape(node)[-1])

    def vector(self, node: fx.Node) -> str:
        """The stored name of a vector weight."""
        lazy = self.traced.weights[node.name]
        if node.name not in self.names:
            self.names[node.name] = self._fresh(lazy)
            self.result.vectors[self.names[node.name]] = lazy
            self._note_origin(self.names[node.name], self.merged.get(node.name, [lazy]))
        return self.names[node.name]

    def matrix(self, node: fx.Node) -> Segment:
        """The segment of a matrix weight; asked for twice, it is stored once."""
        lazy = self.traced.weights[node.name]
        if node.name not in self.names:
            name = self._fresh(lazy).removesuffix(".weight")
            self.names[node.name] = name
            self.result.matrices[name] = self._matrix(name, lazy, self.roles[node])
            self._note_origin(name, [lazy])
            self.result.placeholders[node.name] = name
            self.result.roles[name] = self.roles[node]
        made = self.result.matrices[self.names[node.name]]
        n, k = lazy.shape
        return Segment(made.name, made.scheme.format, n, k, made.scheme.group_size, made.scheme.symmetric)

    def _note_origin(self, name: str, parts: list[Lazy | int]) -> None:
        """For who writes a checkpoint again: where a stored tensor comes from, and which rows went where."""
        self.result.origins[name] = [
            (None, part, "constant") if isinstance(part, int) else (part.names[0], part.shape[0], part.origin)
            for part in parts
        ]
        if any(isinstance(part, Lazy) and part.origin == "rows" for part in parts):
            rows = [_rows_of(part) for part in parts]
            self.result.orders[f"{name}.rows"] = np.concatenate(rows).astype(np.int32)

    def _matrix(self, name: str, lazy: Lazy, role: str) -> Matrix:
        """Stored as the checkpoint holds it, where it is quantized there, else by its role."""
        found = lazy.quantized
        if not isinstance(found, QuantizedWeight):
            return Matrix(name, lazy, self.assign(role, name).normalize(lazy.shape[1]))
        if found.scheme is None:
            raise GristmillError(
                f"{name} is fp8, which this version cannot keep; give --weights bf16 or another format"
            )
        wide = found.scale_dtype == "float32"
        return Matrix(name, lazy, found.scheme.normalize(found.k), partial(found.stored, name), wide)

    def order(self, key: str, segments: list[Segment]) -> dict[str, str]:
        """The column order that the weights of an instruction share: {"order": stored name}, or nothing."""
        found = self.result.matrices[segments[0].name].lazy.quantized
        if not isinstance(found, QuantizedWeight) or found.order is None:
            return {}
        name = f"{key}.order"
        self.result.orders[name] = found.order
        return {"order": name}

    def _fresh(self, lazy: Lazy) -> str:
        name = base = lazy.names[0]
        taken = set(self.names.values())
        count = 1
        while name in taken or name.removesuffix(".weight") in taken:
            count += 1
            name = f"{base}.{count}"
        return name

    def weight_list(self, segments: list[Segment]) -> str:
        key = _joined([s.name for s in segments])
        self.program.weights[key] = segments
        return key


def _rows_of(part: Lazy | int) -> NDArray[Any]:
    """Which rows of its tensor a part has."""
    if isinstance(part, Lazy) and part.rows is not None:
        return part.rows.numpy()
    return np.arange(part if isinstance(part, int) else part.shape[0])


def round_anew(traced: Traced, roles: Container[str]) -> list[str]:
    """Forget the quantized form of weights of these roles, so that they are rounded from their values.

    Returns their names.
    """
    found = [traced.weights[node.name] for node, role in _roles(traced).items() if role in roles]
    quantized = [lazy for lazy in found if lazy.quantized is not None]
    for lazy in quantized:
        lazy.quantized = None
    return [lazy.names[0] for lazy in quantized]


def _roles(traced: Traced) -> dict[fx.Node, str]:
    """What each matrix is used for. A tied pair is the head's."""
    roles: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        if is_op(node, ours.embedding.default):
            roles.setdefault(node.args[1], "embedding")
        elif is_op(node, ours.linear.default):
            head = any(user.op == "output" for user in node.users)
            for weight in arguments(node)["weights"]:
                roles[weight] = "head" if head else "linear"
    return roles


def _joined(names: list[str]) -> str:
    """model.layers.0.self_attn.q_proj and ...k_proj → model.layers.0.self_attn.q_proj+k_proj."""
    prefix = names[0].rpartition(".")[0]
    same = all(n.rpartition(".")[0] == prefix for n in names)
    return "+".join([names[0], *(n.rpartition(".")[2] if same else n for n in names[1:])])


def _embedding(low: _Lowering, node: fx.Node, a: dict[str, Any]) -> None:
    segments = [low.matrix(a["weight"])]
    key = low.weight_list(segments)
    if low.order(key, segments):
        raise GristmillError(f"{key}: an embedding with a column order is not supported; give --weights")
    extra = {"offset": a["offset"]} if a["offset"] else {}
    low.emit(
        node,
        "embedding",
        {"residual": a["residual"]},
        {},
        key,
        ids=a["ids"].name,
        scale=float(a["scale"]),
        **extra,
    )


def _norm(op: str) -> Callable[[_Lowering, fx.Node, dict[str, Any]], None]:
    def lower_norm(low: _Lowering, node: fx.Node, a: dict[str, Any]) -> None:
        vectors: dict[str, Any] = {k: a[k] for k in ("weight", "bias") if k in a}
        low.emit(node, op, {"in": a["x"], "residual": a["residual"]}, vectors, eps=float(a["eps"]))

    return lower_norm


def _linear(low: _Lowering, node: fx.Node, a: dict[str, Any]) -> None:
    segments = [low.matrix(w) for w in a["weights"]]
    pieces = _pieces(low, segments)
    if len(pieces) == 1:
        return _emit_linear(low, node, a, segments, a["biases"])
    if a["glu"]:
        raise GristmillError(
            f"{_joined([s.name for s in segments])} is a gated pair of a float and an integer matrix, which "
            "cannot be one linear; keep both or neither"
        )
    out, column = low._output(node, low._rows({"in": low.views[a["x"]]}, "linear")), 0
    low.views[node] = out
    for first, stop in pieces:
        width = sum(s.n for s in segments[first:stop])
        part = View(out.value, out.column + column, width)
        _emit_linear(low, node, a, segments[first:stop], a["biases"][first:stop], part, column)
        column += width


def _pieces(low: _Lowering, segments: list[Segment]) -> list[tuple[int, int]]:
    """Runs of neighbouring segments that are all integer or all float: one linear cannot mix the two."""
    kinds = [low.result.matrices[s.name].scheme.is_integer for s in segments]
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
    return list(zip(starts, [*starts[1:], len(kinds)], strict=True))


def _emit_linear(
    low: _Lowering, node: fx.Node, a: dict[str, Any], segments: list[Segment], biases: list[Any],
    out: View | None = None, column: int = 0,
) -> None:  # fmt: skip
    """One instruction; ``out``: the columns of the node's value that it computes, from ``column`` on."""
    schemes = [low.result.matrices[s.name].scheme for s in segments]
    group = 0 if low.float_activations else activation_group(schemes, segments[0].k)
    key = low.weight_list(segments)
    low.emit(
        node, "linear", {"in": a["x"], "residual": a["residual"]}, {"bias": _bias(low, biases, segments)},
        key, out, column, activation=a["activation"], glu=a["glu"],
        scale=float(a["scale"]), softcap=float(a["softcap"]), act_group=group,
    )  # fmt: skip
    low.program.instructions[-1].vectors.update(low.order(key, segments))


def _bias(low: _Lowering, biases: list[Any], segments: list[Segment]) -> fx.Node | None:
    """One vector for all segments; a segment without a bias has zeros."""
    if all(b is None for b in biases):
        return None
    if len(biases) == 1:
        return biases[0]
    parts = [None if b is None else low.traced.weights[b.name] for b in biases]
    names = [p.names[0] for p in parts if p is not None]

    def load() -> torch.Tensor:
        return torch.cat(
            [torch.zeros(s.n) if p is None else p.load() for p, s in zip(parts, segments, strict=True)]
        )

    lazy = Lazy(
        (sum(s.n for s in segments),), (_joined([n.removesuffix(".bias") for n in names]) + ".bias",), load
    )
    node = low.traced.add_weight(lazy.names[0].replace(".", "_").replace("+", "_"), lazy)
    low.merged[node.name] = [s.n if p is None else p for p, s in zip(parts, segments, strict=True)]
    return node


def _attention(low: _Lowering, node: fx.Node, a: dict[str, Any]) -> None:
    program = low.program
    k_dim, v_dim = shape(a["k"])[-1] // a["kv_heads"], shape(a["v"])[-1] // a["kv_heads"]
    program.caches.append(CacheSpec(a["kv_heads"], k_dim, v_dim, low.kv.k, low.kv.v, a["window"]))
    low.emit(
        node, "attention", {n: a[n] for n in "qkv"}, {n: a[n] for n in ("q_norm", "k_norm", "sinks")},
        cache=len(program.caches) - 1, heads=a["heads"], scale=float(a["scale"]), softcap=float(a["softcap"]),
        rope=_rope(low, a), hadamard=hadamard_block(k_dim) if low.kv.rotate else 0,
        norm_eps=float(a["norm_eps"]),
    )  # fmt: skip


def hadamard_block(k_dim: int) -> int:
    """Columns that a rotation of keys mixes: the largest power of two that divides ``k_dim``, at most 32.

    The columns of a group share what an outlier costs, other groups stay as exact as they are: against keys
    with a few large channels this rounds better than a transform of the whole head.
    """
    return min(k_dim & -k_dim, CACHE_GROUP)


def _rope(low: _Lowering, a: dict[str, Any]) -> int:
    if a["inv_freq"] is None:
        return -1
    dims = 2 * low.traced.weights[a["inv_freq"].name].shape[0]
    spec = RopeSpec(low.vector(a["inv_freq"]), dims, a["rope_style"], float(a["rope_scale"]))
    if spec not in low.program.ropes:
        low.program.ropes.append(spec)
    return low.program.ropes.index(spec)


def _gather_rows(low: _Lowering, node: fx.Node, a: dict[str, Any]) -> None:
    low.emit(node, "gather_rows", {"in": a["x"]}, {})


def _pointwise(low: _Lowering, node: fx.Node, a: dict[str, Any]) -> None:
    low.emit(node, "pointwise", {"in": [low.views[x] for x in a["inputs"]]}, {}, steps=json.loads(a["steps"]))


LOWERINGS: dict[Any, Callable[[_Lowering, fx.Node, dict[str, Any]], None]] = {
    ours.embedding.default: _embedding,
    ours.rms_norm.default: _norm("rms_norm"),
    ours.layer_norm.default: _norm("layer_norm"),
    ours.linear.default: _linear,
    ours.attention.default: _attention,
    ours.gather_rows.default: _gather_rows,
    ours.pointwise.default: _pointwise,
}
