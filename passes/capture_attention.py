"""Attention that a module calls by torch's name or spells out becomes the op of which the cache is a part.

Two spellings: scaled_dot_product_attention, and a softmax over masked products of q and k. What a mask hides
is not guessed from how it is made: the graph is asked for its values, which must be those of a causal mask or
a sliding window. Heads of k and v that are repeated for the heads of q are taken as they were before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .columns import SHAPE_OPS
from .graph import (
    EXAMPLE_ROWS,
    Traced,
    ancestors,
    arguments,
    aten,
    evaluate,
    exchanged,
    is_op,
    ours,
    shape,
    swap,
)
from .lift_positions import made
from .rule import Report

LARGEST_MASK = 8192  # rows of a mask that is looked at: 64 Mi values
HIDDEN = -1e4  # what is added to a hidden score is at most this
REPEATS = (aten.expand.default, aten.repeat_interleave.self_int, aten.clone.default, aten.contiguous.default)
UNCHANGED = (
    aten.dropout.default, aten.clone.default, aten.contiguous.default, aten.alias.default,
    aten.detach.default,
)  # fmt: skip
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default)


class NotAttention(Exception):
    """Why a softmax or a call is not attention of a kind that there is an op for."""


@dataclass
class Scores:
    """softmax's input as it is taken apart, from the outside: scale, softcap and masks of q k^T."""

    scale: float = 1.0
    softcap: float = 0.0
    masks: tuple[tuple[fx.Node, str], ...] = ()


def run(traced: Traced, report: Report, max_len: int) -> None:
    """max_len: positions for which a mask has to be causal."""
    for node in list(traced.graph.nodes):
        spelling = _called if is_op(node, aten.scaled_dot_product_attention.default) else None
        if is_op(node, *PRODUCTS) and is_op(_unchanged(node.args[0]), *SOFTMAXES):
            spelling = _spelled
        if spelling is None:
            continue
        try:
            swap(node, spelling(traced, node, max_len))
            report.hits += 1
        except NotAttention as reason:
            report.miss(node, str(reason))
    traced.clean()


def _called(traced: Traced, node: fx.Node, max_len: int) -> fx.Node:
    """scaled_dot_product_attention."""
    a = arguments(node)
    if a["dropout_p"]:
        raise NotAttention(
            f"it drops out {a['dropout_p']} of its weights; pass dropout_p=0 when not training"
        )
    if a["attn_mask"] is None and not a["is_causal"]:
        raise NotAttention("it is not causal (no mask, is_causal=False)")
    masks = () if a["attn_mask"] is None else ((a["attn_mask"], "allowed or added"),)
    window = _window(traced, masks, a["is_causal"], max_len)
    scale = a["scale"] if a["scale"] is not None else shape(a["query"])[-1] ** -0.5
    return _attention(traced, node, (a["query"], a["key"], a["value"]), float(scale), window, 0.0)


def _spelled(traced: Traced, node: fx.Node, max_len: int) -> fx.Node:
    """softmax(masked(q k^T)) v."""
    softmax = _unchanged(node.args[0])
    dim = softmax.args[1]
    if dim not in (-1, len(shape(softmax)) - 1):
        raise NotAttention(f"its softmax is over dimension {dim}, expected the last")
    scores, product = _taken_apart(traced, _unchanged(softmax.args[0]))
    window = _window(traced, scores.masks, False, max_len)
    q, k = _unchanged(product.args[0]), _turned(traced, _unchanged(product.args[1]))
    scale, q = _scaled(q, scores.scale)
    scale, k = _scaled(k, scale)
    return _attention(traced, node, (q, k, node.args[1]), scale, window, scores.softcap)


def _taken_apart(traced: Traced, node: fx.Node) -> tuple[Scores, fx.Node]:
    """What was done to the product of q and k, and that product."""
    scores, capped = Scores(), False
    while not is_op(node, *PRODUCTS):
        masked, factor = _masked(traced, node), _factor(node)
        if masked is not None and not scores.softcap:
            node, mask = masked
            scores.masks += (mask,)
        elif factor is None:
            raise NotAttention(f"its scores go through {node.target}")
        elif is_op(_unchanged(node.args[0]), aten.tanh.default) and scores == Scores(masks=scores.masks):
            scores.softcap, capped = factor, True
            node = _unchanged(node.args[0]).args[0]
        else:
            scores.scale *= factor * (scores.softcap if capped else 1.0)
            node, capped = node.args[0], False  # type: ignore[assignment]
        node = _unchanged(node)
    if capped:
        raise NotAttention("its scores go through tanh without being divided before")
    return scores, node


def _factor(node: fx.Node) -> float | None:
    """By what a node multiplies its first operand."""
    if not is_op(node, aten.mul.Tensor, aten.div.Tensor) or not isinstance(node.args[1], (int, float)):
        return None
    return float(node.args[1]) if is_op(node, aten.mul.Tensor) else 1 / float(node.args[1])


def _masked(traced: Traced, node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, str]] | None:
    """(scores, (mask, what it says)) of a step that hides scores."""
    args: Any = node.args
    if is_op(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor) and _hides(traced, args[2]):
        return args[0], (args[1], "hidden")
    if is_op(node, aten.where.ScalarOther, aten.where.self) and _hides(traced, args[2]):
        return args[1], (args[0], "allowed or added")
    if is_op(node, aten.add.Tensor) and not node.kwargs and isinstance(args[1], fx.Node):
        scores, mask = args if _depends_on_rows(args[0]) else args[::-1]
        return scores, (mask, "allowed or added")
    return None


def _hides(traced: Traced, value: Any) -> bool:
    """Whether what scores are replaced by is as good as -inf."""
    if isinstance(value, fx.Node):
        value = float(_values(traced, value, EXAMPLE_ROWS).max())
    return bool(value <= HIDDEN)


def _depends_on_rows(node: Any) -> bool:
    """Whether a product is among what a node is computed from: masks are made without."""
    return any(is_op(n, *PRODUCTS) for n in ancestors(node))


def _scaled(node: fx.Node, scale: float) -> tuple[float, fx.Node]:
    """q * 0.125 before the product is a scale after it."""
    factor = _factor(node)
    return (scale, node) if factor is None else (scale * factor, _unchanged(node.args[0]))


def _turned(traced: Traced, node: fx.Node) -> fx.Node:
    """k of a node that is k^T."""
    last = len(shape(node)) - 1
    if is_op(node, aten.transpose.int) and exchanged(node) == {last - 1, last}:
        return node.args[0]  # type: ignore[return-value]
    return made(traced, node.next, aten.transpose.int, node, -2, -1)


def _unchanged(node: Any) -> Any:
    """What a node renames."""
    while is_op(node, *UNCHANGED) or (is_op(node, aten._to_copy.default) and _same_type(node)):
        node = node.args[0]
    return node


def _same_type(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == node.args[0].meta["val"].dtype)  # type: ignore[union-attr]


def _attention(
    traced: Traced, node: fx.Node, heads: tuple[Any, Any, Any], scale: float, window: int, softcap: float
) -> fx.Node:
    q, k, v = (_unchanged(h) for h in heads)
    for name, value in (("q", q), ("k", k), ("v", v)):
        if len(shape(value)) != 4 or shape(value)[0] != 1 or shape(value)[2] != EXAMPLE_ROWS:
            raise NotAttention(f"its {name} is {list(shape(value))}, expected [1, heads, T, columns]")
    k, v = _before_repeats(traced, node, k), _before_repeats(traced, node, v)
    if shape(k)[1] != shape(v)[1] or shape(q)[1] % shape(k)[1]:
        raise NotAttention(f"{shape(q)[1]} heads of q, {shape(k)[1]} of k and {shape(v)[1]} of v")
    op = ours.attention_heads.default
    rows = made(traced, node, op, q, k, v, 0, scale, window, softcap, None)
    return made(traced, node, aten.transpose.int, rows, 1, 2)


def _before_repeats(traced: Traced, before: fx.Node, node: fx.Node) -> fx.Node:
    """[1, KV, T, D] of which ``node`` has every head several times in a row; ``node`` where it has not."""
    chain: list[fx.Node] = []
    current, repeated = node, False
    while is_op(current, *SHAPE_OPS, *REPEATS) and isinstance(current.args[0], fx.Node):
        repeated = repeated or is_op(current, aten.expand.default, aten.repeat_interleave.self_int)
        chain.append(current)
        current = current.args[0]
        if repeated and isinstance(current.meta["val"], Tensor) and len(shape(current)) == 4:
            for turned in (False, True):
                if _repeats(current, chain, turned):
                    return made(traced, before, aten.transpose.int, current, 1, 2) if turned else current
    return node


def _repeats(source: fx.Node, chain: list[fx.Node], turned: bool) -> bool:
    extents = shape(source)
    numbers: Any = torch.arange(math.prod(extents)).view(extents)
    heads = numbers.transpose(1, 2) if turned else numbers
    value = numbers
    for node in reversed(chain):
        value = _reshaped(node, value)
    if not isinstance(value, Tensor) or value.shape[2:] != heads.shape[2:] or value.shape[1] % heads.shape[1]:
        return False
    return torch.equal(value, heads.repeat_interleave(value.shape[1] // heads.shape[1], 1))


def _reshaped(node: fx.Node, value: Any) -> Any:
    def known(source: fx.Node) -> Any:
        return value if source is node.args[0] else int(source.meta["val"].node.hint)

    return evaluate(node.target, node.args, node.kwargs, known)


def _window(traced: Traced, masks: tuple[tuple[fx.Node, str], ...], causal: bool, max_len: int) -> int:
    """Positions that a row sees; 0: all before it and itself. Raises NotAttention for another mask."""
    rows = _mask_rows(traced, masks, max_len)
    allowed = torch.ones(rows, rows, dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    for mask, kind in masks:
        allowed &= _allowed(_values(traced, mask, rows), kind, rows)
    if masks:  # beyond, nobody looked
        traced.max_position = rows
    last = int(allowed[-1].sum())
    band = torch.ones(rows, rows, dtype=torch.bool).tril()
    if torch.equal(allowed, band):
        return 0
    if last and torch.equal(allowed, band.triu(1 - last)):
        return last
    raise NotAttention("its mask is neither causal nor a sliding window" if masks else "it has no mask")


def _mask_rows(traced: Traced, masks: tuple[tuple[fx.Node, str], ...], max_len: int) -> int:
    if not masks:
        return EXAMPLE_ROWS
    # all that the program will hold: a window may begin far out
    rows = min(max_len, traced.max_position or max_len)
    if rows > LARGEST_MASK:
        raise NotAttention(
            f"a mask over {rows} positions is too large to be looked at; give max_len {LARGEST_MASK} or "
            "less, or call gristmill.attention"
        )
    return max(rows, 2)


def _allowed(mask: Tensor, kind: str, rows: int) -> Tensor:
    """[rows, rows]: whether a row sees another."""
    if any(n != 1 for n in mask.shape[:-2]) or mask.dim() < 2:
        raise NotAttention(f"its mask is {list(mask.shape)}, expected one for all heads")
    values = mask.reshape(mask.shape[-2:]).expand(rows, rows)
    if values.dtype == torch.bool:
        return ~values if kind == "hidden" else values
    if kind == "hidden" or not bool(((values == 0) | (values <= HIDDEN)).all()):
        raise NotAttention("what it adds to scores is not a mask of 0 and -inf")
    return values == 0


def _values(traced: Traced, mask: fx.Node, rows: int) -> Tensor:
    """The mask over ``rows`` positions of one sequence."""
    env: dict[fx.Node, Any] = {}
    tokens = torch.zeros(1, rows, dtype=torch.long)
    for node in ancestors(mask):
        if node.op != "placeholder":
            env[node] = evaluate(node.target, node.args, node.kwargs, env.__getitem__)
        elif node.name in traced.weights:
            env[node] = traced.weights[node.name].load()
        elif node.name == "positions":
            env[node] = torch.arange(rows)[None]
        elif _only_sizes(node, mask):
            env[node] = tokens
        else:
            raise NotAttention("its mask depends on the tokens")
    value = env[mask]
    if not isinstance(value, Tensor):
        raise NotAttention("its mask is not a tensor")
    return value


def _only_sizes(tokens: fx.Node, mask: fx.Node) -> bool:
    """Whether a mask asks the token ids for nothing but how many there are."""
    inner = set(ancestors(mask))
    return all(is_op(user, aten.sym_size.int) for user in tokens.users if user in inner)
