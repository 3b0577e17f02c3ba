"""Which columns of a row a reshaped tensor holds.

Models cut a linear's output into heads by views, transposes, splits and slices. Running those ops once over
column numbers says, for every element of the result, which column it is: no pattern per model, and
interleaved layouts (GPT-NeoX) come out as well.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .graph import EXAMPLE_ROWS, arguments, aten, evaluate, is_op, ours, shape

SHAPE_OPS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int,
    aten.permute.default, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.unbind.int,
    operator.getitem,
)  # fmt: skip


@dataclass
class Heads:
    """A [1, H, T, D] tensor: column ``columns[h, d]`` of ``base`` ([1, T, N]), perhaps normed over D."""

    base: fx.Node
    columns: Tensor
    norm: fx.Node | None


def trace_heads(node: fx.Node) -> Heads | None:
    """Follow a head-shaped tensor back to the rows it is cut from.

    None when something else than reshaping happens on the way.
    """
    chain: list[fx.Node] = []
    norm: fx.Node | None = None
    current = node
    while not _is_row(current):
        if is_op(current, *SHAPE_OPS):
            chain.append(current)
        elif (
            is_op(current, ours.rms_norm.default) and norm is None and arguments(current)["residual"] is None
        ):
            norm = current
            if shape(current)[-1] != shape(node)[-1] or any(_moves_last(n) for n in chain):
                return None
        else:
            return None
        current = current.args[0]  # type: ignore[assignment]
    columns = _column_numbers(current, chain)
    return None if columns is None else Heads(current, columns, norm)


def _is_row(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor) and len(shape(node)) == 3 and not is_op(node, *SHAPE_OPS)


def _moves_last(node: fx.Node) -> bool:
    """Whether a shape op could mix the last dimension: only transposes of the middle two are known not to."""
    dims: Any = node.args[1:]
    return not (is_op(node, aten.transpose.int) and {d % 4 for d in dims} == {1, 2})


def _column_numbers(base: fx.Node, chain: list[fx.Node]) -> Tensor | None:
    rows, columns = EXAMPLE_ROWS, shape(base)[-1]
    value: Any = torch.arange(rows * columns).view(1, rows, columns)
    for node in reversed(chain):
        value = _reshaped(node, value)
    if value.dim() != 4 or value.shape[0] != 1 or value.shape[2] != rows:
        return None
    relative = value[0] - torch.arange(rows)[None, :, None] * columns
    return relative[:, 0].contiguous() if bool((relative == relative[:, :1]).all()) else None


def _reshaped(node: fx.Node, value: Any) -> Any:
    """One shape op over ``value``; other inputs are symbolic sizes."""

    def known(source: fx.Node) -> Any:
        return value if source is node.args[0] else int(source.meta["val"].node.hint)

    return evaluate(node.target, node.args, node.kwargs, known)
