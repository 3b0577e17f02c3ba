"""The residual stream turned by a random Hadamard matrix, offline (QuaRot, arXiv 2404.00456; SpinQuant's R1
and R2, arXiv 2405.16406).

A few columns of the stream are often much larger than the others, and with them some rows and columns of
every weight beside it: a group that holds one loses all its small weights. With an orthogonal Q, x Q has the
norm of x, so an rms norm without weight commutes with Q and the whole stream may be kept turned:

    what writes to the stream     y = f(x) Wᵀ + b   →   y Q = f(x) (Qᵀ W)ᵀ + b Q
    a norm that reads it          rms(x) diag(g)    →   rms(x Q) = rms(x) Q; g moves into the linears after it
    the linears after the norm    W diag(g)         →   W diag(g) Q

Exact: only roundings differ, and nothing is left to do when the model runs. The same holds inside attention
for every head's values and the columns of the linear that reads them, whose H cancels.

The stream is found in the graph: what the logits are computed from, followed along residual adds. It is
turned as a whole or not at all. A layer norm subtracts the mean over the columns and a post-norm multiplies
by its weight after the rotation would have to be there: both are refused, with the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .graph import Lazy, Traced, arguments, aten, is_op, ours, width
from .hadamard import Rotation
from .rule import Report

NORMS = (ours.rms_norm.default, ours.layer_norm.default)
UNTIED_HEAD = "lm_head.weight"


class _Refusal(Exception):
    """Why the stream cannot be turned, and the node that keeps it from it."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


@dataclass
class Stream:
    """The residual stream: ``nodes`` hold it, ``norms`` and ``readers`` (linear, norm or None) read it."""

    nodes: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)
    readers: list[tuple[fx.Node, fx.Node | None]] = field(default_factory=list)

    @property
    def writers(self) -> list[fx.Node]:
        """Embeddings and linears; gather_rows only passes the stream on."""
        return [n for n in self.nodes if not is_op(n, ours.gather_rows.default)]


def run(traced: Traced, report: Report) -> None:
    """Hits: every embedding and linear that the stream's rotation changes, and every attention turned.

    Where the stream is refused the graph stays as it is and the report says why.
    """
    try:
        stream = find_stream(traced)
    except _Refusal as refusal:
        report.miss(refusal.node, refusal.reason)
        return
    columns = width(stream.nodes[0])
    rotation = Rotation.of(columns)
    if rotation is None:
        report.miss(
            stream.nodes[0], f"no Hadamard matrix fits {columns} columns; expected a multiple of four"
        )
        return
    _turn_stream(traced, stream, rotation, report)
    for node in traced.graph.find_nodes(op="call_function", target=ours.attention.default):
        _turn_values(traced, node, report)
    traced.clean()


def find_stream(traced: Traced) -> Stream:
    """Follow the stream from the logits. Raises _Refusal at whatever a rotation would not commute with."""
    stream = Stream()
    found = [_root(traced)]
    while found:
        node = found.pop()
        if node not in stream.nodes:
            stream.nodes.append(node)
            found += _sources(node)
            for user in node.users:
                found += _users(stream, node, user)
    order = {n: i for i, n in enumerate(traced.graph.nodes)}
    stream.nodes.sort(key=order.__getitem__)
    return stream


def _root(traced: Traced) -> fx.Node:
    """What the last norm reads: the stream after the last layer."""
    head = traced.logits
    if not is_op(head, ours.linear.default):
        raise _Refusal(head, "the logits do not come from a linear")
    x = arguments(head)["x"]
    while is_op(x, *NORMS, ours.gather_rows.default) and arguments(x).get("residual") is None:
        x = arguments(x)["x"]
    return x


def _sources(node: fx.Node) -> list[fx.Node]:
    """Where a stream node has the stream from; [] where it begins."""
    if is_op(node, ours.gather_rows.default):
        return [arguments(node)["x"]]
    if is_op(node, *NORMS):
        raise _Refusal(node, "a post-norm's weight stands between what is added and the stream")
    if not is_op(node, ours.linear.default, ours.embedding.default):
        raise _Refusal(node, "the stream is written by something else than an embedding or a linear")
    a = arguments(node)
    if is_op(node, ours.linear.default):
        if a["activation"] != "none" or a["glu"] or a["softcap"]:
            raise _Refusal(node, "what a linear adds to the stream passes an activation first")
        if len(a["weights"]) != 1:
            raise _Refusal(node, "a linear of several segments writes the stream")
    return [] if a["residual"] is None else [a["residual"]]


def _users(stream: Stream, node: fx.Node, user: fx.Node) -> list[fx.Node]:
    """Note who reads ``node`` of the stream; returns the nodes where the stream goes on."""
    a = arguments(user) if user.op == "call_function" else {}
    if is_op(user, ours.gather_rows.default):
        return [user]
    if is_op(user, ours.layer_norm.default) and a["x"] is node:
        raise _Refusal(user, "a layer norm subtracts the mean over columns, which a rotation does not keep")
    if is_op(user, ours.rms_norm.default) and a["x"] is node and a["residual"] is None:
        if user not in stream.norms:
            stream.norms.append(user)
            stream.readers += [(linear, user) for linear in _linears_after(user)]
        return []
    if not is_op(user, ours.linear.default, ours.embedding.default, *NORMS):
        raise _Refusal(user, "the stream is read by something else than an rms norm or a linear")
    if is_op(user, ours.linear.default) and a["x"] is node and (user, None) not in stream.readers:
        stream.readers.append((user, None))
    return [user] if a["residual"] is node else []


def _linears_after(norm: fx.Node) -> list[fx.Node]:
    """The linears that read a norm's result, perhaps only some rows of it."""
    linears: list[fx.Node] = []
    for user in norm.users:
        if is_op(user, ours.gather_rows.default):
            linears += _linears_after(user)
        elif is_op(user, ours.linear.default) and arguments(user)["residual"] is not norm:
            linears.append(user)
        else:
            raise _Refusal(user, "a norm of the stream is read by something else than a linear")
    return linears


def _turn_stream(traced: Traced, stream: Stream, rotation: Rotation, report: Report) -> None:
    report.notes.append(f"stream of {width(stream.nodes[0])} columns, {rotation}")
    _untie_head(traced, stream, report)
    turn = _Turn(traced, rotation)
    for linear, norm in stream.readers:
        gain = None if norm is None else arguments(norm)["weight"]
        _change(linear, weights=[turn.columns(w, gain) for w in arguments(linear)["weights"]])
    for norm in stream.norms:
        _change(norm, weight=None)
    for node in stream.writers:
        a = arguments(node)
        if is_op(node, ours.embedding.default):
            _change(node, weight=turn.columns(a["weight"], None))
        else:
            _change(node, weights=turn.all_rows(a["weights"]), biases=turn.all_rows(a["biases"]))
    report.hits += len({linear for linear, _ in stream.readers} | set(stream.writers))


def _untie_head(traced: Traced, stream: Stream, report: Report) -> None:
    """A head that shares the embedding's table takes a norm's weight, so that it needs a name of its own."""
    tables = [arguments(n)["weight"] for n in stream.writers if is_op(n, ours.embedding.default)]
    for linear, norm in stream.readers:
        weights = arguments(linear)["weights"]
        for weight in weights:
            if weight not in tables or norm is None or arguments(norm)["weight"] is None:
                continue
            lazy = traced.weights[weight.name]
            own = Lazy(lazy.shape, (UNTIED_HEAD,), lazy.load)
            head = traced.add_weight(f"{weight.name}_untied", own)
            _change(linear, weights=[head if w is weight else w for w in weights])
            report.notes.append(
                f"{lazy.names[0]} is no longer the head too: {UNTIED_HEAD} takes the last norm's weight"
            )


def _turn_values(traced: Traced, node: fx.Node, report: Report) -> None:
    """Turn the values of every head, and the columns of the linear that reads them back."""
    a = arguments(node)
    found = _value_rows(traced, a["v"], node)
    readers = list(node.users)
    rotation = Rotation.of(width(a["v"]) // a["kv_heads"])
    if isinstance(found, str):
        report.miss(node, found)
    elif len(readers) != 1 or not _reads(readers[0], node):
        report.miss(node, "the result does not go to one linear only")
    elif rotation is None or rotation.size * a["kv_heads"] != width(a["v"]):
        report.miss(node, f"no Hadamard matrix has the order {width(a['v']) // a['kv_heads']} of a head")
    else:
        linear, segment, start, stop = found
        turn = _Turn(traced, rotation)
        for name in ("weights", "biases"):
            parts = list(arguments(linear)[name])
            parts[segment] = turn.rows(parts[segment], start, stop)
            _change(linear, **{name: parts})
        weights = arguments(readers[0])["weights"]
        _change(readers[0], weights=[turn.columns(w, None) for w in weights])
        report.hits += 1


def _reads(user: fx.Node, node: fx.Node) -> bool:
    return is_op(user, ours.linear.default) and arguments(user)["residual"] is not node


def _value_rows(traced: Traced, v: fx.Node, attention: fx.Node) -> tuple[fx.Node, int, int, int] | str:
    """(linear, segment, first row, last row + 1 in it) whose result the values are, or why not."""
    linear, start = v, 0
    if is_op(v, aten.slice.Tensor):
        a = arguments(v)
        linear, start = a["self"], int(a["start"] or 0)
    if not is_op(linear, ours.linear.default):
        return "the values do not come from a linear"
    a, stop = arguments(linear), start + width(v)
    if a["activation"] != "none" or a["glu"] or a["softcap"] or a["residual"] is not None:
        return "the values' linear has an epilogue"
    if _others_use(v, attention) or (linear is not v and _overlap(linear, v, start, stop)):
        return "the values are used elsewhere too"
    first = 0
    for number, weight in enumerate(a["weights"]):
        rows = traced.weights[weight.name].shape[0]
        if first <= start and stop <= first + rows:
            return linear, number, start - first, stop - first
        first += rows
    return "the values come from several segments of a linear"


def _others_use(v: fx.Node, attention: fx.Node) -> bool:
    a = arguments(attention)
    return set(v.users) != {attention} or a["q"] is v or a["k"] is v


def _overlap(linear: fx.Node, v: fx.Node, start: int, stop: int) -> bool:
    """Whether anything but ``v`` reads the columns from start to stop of ``linear``."""
    for user in set(linear.users) - {v}:
        if not is_op(user, aten.slice.Tensor):
            return True
        first = int(arguments(user)["start"] or 0)
        if first < stop and start < first + width(user):
            return True
    return False


def _change(node: fx.Node, **changes: Any) -> None:
    """Change some arguments of a call in place."""
    node.args, node.kwargs = tuple((arguments(node) | changes).values()), {}


class _Turn:
    """New weights from old by one rotation; the same change of the same weight is one weight."""

    def __init__(self, traced: Traced, rotation: Rotation) -> None:
        self.traced, self.rotation = traced, rotation
        self.known: dict[tuple[Any, ...], fx.Node] = {}

    def columns(self, weight: fx.Node, gain: fx.Node | None) -> fx.Node:
        """W diag(gain) Q."""
        g = None if gain is None else self.traced.weights[gain.name]

        def load(w: Tensor) -> Tensor:
            return self.rotation.columns(w, None if g is None else g.load())

        return self._new(weight, ("columns", gain), load)

    def rows(self, weight: fx.Node | None, start: int, stop: int) -> fx.Node | None:
        """Qᵀ W for the rows from start to stop; a vector is a column."""
        if weight is None:
            return None

        def load(w: Tensor) -> Tensor:
            if stop - start == len(w):
                return self.rotation.rows(w)
            return torch.cat([w[:start], self.rotation.rows(w[start:stop]), w[stop:]])

        return self._new(weight, ("rows", start, stop), load)

    def all_rows(self, weights: list[fx.Node | None]) -> list[fx.Node | None]:
        """Qᵀ W of whole weights and biases."""
        return [w if w is None else self.rows(w, 0, self.traced.weights[w.name].shape[0]) for w in weights]

    def _fresh(self, name: str) -> str:
        """``name``, numbered when a weight has it already: one table may be turned in two ways."""
        count = 1
        while (found := name if count == 1 else f"{name}_{count}") in self.traced.weights:
            count += 1
        return found

    def _new(self, weight: fx.Node, how: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> fx.Node:
        key = (weight, *how)
        if key not in self.known:
            lazy = self.traced.weights[weight.name]
            turned = Lazy(lazy.shape, lazy.names, lambda: change(lazy.load()))
            self.known[key] = self.traced.add_weight(self._fresh(f"{weight.name}_turned"), turned)
        return self.known[key]
