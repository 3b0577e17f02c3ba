"""What each format would cost each matrix, measured on the calibration set without gradients.

The cost of a matrix in a format is the squared error of its output relative to the output itself, times the
share that the branch it belongs to has of the residual stream where it is added: noise in a projection goes
through its branch in about its proportion, and a branch that adds little may be noisy. Costs of different
matrices can then be added up and traded against bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.graph import arguments, is_op, ours
from ..quant.grid import scale_type
from ..quant.hessian import Moments, row_errors
from ..quant.methods import Input, Method
from ..quant.scheme import Scheme
from ..quant.search import search_grid
from . import scale_channels
from .lower import Lowered
from .walk import Values, Walk


class Sensitivity:
    """costs: matrix name → scheme → cost. ``records`` keeps all that a resumed run needs."""

    def __init__(self, lowered: Lowered, choices: Sequence[Scheme], records: dict[str, Any]) -> None:
        self.lowered, self.choices = lowered, choices
        self.costs: dict[str, dict[str, float]] = records.setdefault("costs", {})
        self.pending: dict[str, dict[str, float]] = records.setdefault("pending", {})

    def measure(self, walk: Walk, node: fx.Node) -> None:
        """Relative output errors of a linear's matrices in every format; its input is at hand."""
        weights = [w for w in arguments(node)["weights"] if self._open(walk, w)] if self.choices else []
        if not weights:
            return
        moments = Moments(walk.traced.weights[weights[0].name].shape[1])
        for chunk in walk.values[arguments(node)["x"]]:
            moments.add(chunk[0])
        h = Input.of(moments, Method()).h
        for weight in weights:
            w = walk.traced.weights[weight.name].load()
            energy = float(row_errors(w, h).sum(dtype=torch.float64))
            self.pending[self.lowered.placeholders[weight.name]] = {
                str(scheme): _error(w, h, scheme) / max(energy, 1e-300) for scheme in self.choices
            }

    def _open(self, walk: Walk, weight: fx.Node) -> bool:
        """Whether a matrix takes part: an integer linear that the checkpoint holds as floats."""
        name = self.lowered.placeholders[weight.name]
        lazy = walk.traced.weights[weight.name]
        return self.lowered.matrices[name].scheme.is_integer and scale_channels.is_float(lazy) and (
            self.lowered.roles[name] == "linear"
        )  # fmt: skip

    def residual_of(self, walk: Walk, node: fx.Node) -> Values | None:
        """The residual stream that a linear adds to, before it does."""
        if not self.pending or not is_op(node, ours.linear.default):
            return None
        residual = arguments(node)["residual"]
        return None if residual is None else walk.values[residual]

    def weigh(self, walk: Walk, node: fx.Node, residual: Values | None) -> None:
        """After a linear added its branch: the branch's share weighs what was measured within it."""
        if residual is None:
            return
        out = walk.values[node]
        branch = sum(_energy(y - x) for y, x in zip(out, residual, strict=True))
        self._settle(branch / max(sum(map(_energy, out)), 1e-300))

    def finish(self) -> None:
        """What no branch was found for counts as it is."""
        self._settle(1.0)

    def _settle(self, share: float) -> None:
        for name, errors in self.pending.items():
            self.costs[name] = {scheme: error * share for scheme, error in errors.items()}
        self.pending.clear()


def _error(w: Tensor, h: Tensor, scheme: Scheme) -> float:
    found = search_grid(w, h, scheme.normalize(w.shape[1]), scale_type(w, scheme))
    return float(found.errors.sum(dtype=torch.float64))


def _energy(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))
