"""The calibrated methods, put together from their parts, for one matrix at a time.

rtn rounds to nearest and needs no calibration. rtn+search searches scales and clipping by output error. gptq
starts from those scales, rounds by GPTQ and refines. awq scales input channels first (that happens in the
graph, before any matrix is quantized) and then searches; awq+gptq scales first and then does as gptq.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.quant.gptq import DAMPING, Plan, asymmetric_target, gptq
from gristmill.quant.grid import Grid, rounding_grid, scale_type
from gristmill.quant.hessian import Moments, damped, row_errors
from gristmill.quant.refine import refine
from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import Scheme
from gristmill.quant.search import search_grid

CHUNK_WEIGHTS = 1 << 23  # weights quantized together: 32 MiB of f32, some ten times that at work


@dataclass(frozen=True)
class Method:
    """Which parts a method has."""

    awq: bool = False
    search: bool = False
    gptq: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration text."""
        return self.awq or self.search or self.gptq


METHODS = {
    "rtn": Method(),
    "rtn+search": Method(search=True),
    "gptq": Method(search=True, gptq=True),
    "awq": Method(awq=True, search=True),
    "awq+gptq": Method(awq=True, search=True, gptq=True),
}


@dataclass(frozen=True)
class Input:
    """What the matrices that share one input share: H [K, K] f64, and GPTQ's plan for it."""

    h: Tensor
    cross: Tensor | None
    plan: Plan | None

    @staticmethod
    def of(moments: Moments, method: Method, act_order: bool = True, damping: float = DAMPING) -> Input:
        h = moments.hessian()
        plan = Plan.of(h, act_order, damping) if method.gptq else None
        return Input(damped(h, damping), moments.cross(), plan)


@dataclass(frozen=True)
class Calibrated:
    """A quantized matrix, and its squared output error over that of rounding to nearest, both relative to
    the squared output itself."""

    quantized: Quantized
    error_rtn: float
    error: float


def quantize_calibrated(w: Tensor, shared: Input, scheme: Scheme, method: Method) -> Calibrated:
    """Quantize w [N, K] f32 by a calibrated method. Deterministic; rows do not see each other."""
    scheme = scheme.normalize(w.shape[1])
    scale_dtype = scale_type(w, scheme)
    rows = max(1, CHUNK_WEIGHTS // w.shape[1])
    target = w if shared.cross is None else asymmetric_target(w, shared.h, shared.cross)
    h = shared.h.float()
    parts, sums = [], torch.zeros(3, dtype=torch.float64)
    for n in range(0, len(w), rows):
        part = target[n : n + rows]
        grid, q = _quantize_rows(part, shared, scheme, scale_dtype, method)
        parts.append(grid.quantized(q))
        plain = rounding_grid(part, scheme, scale_dtype)
        for i, difference in enumerate((part, part - plain.values(plain.nearest(part)), part - grid.values(q))):
            sums[i] += row_errors(difference, h).sum(dtype=torch.float64)
    energy, before, after = (float(s) for s in sums)
    tiny = torch.finfo(torch.float64).tiny
    return Calibrated(joined(parts), before / max(energy, tiny), after / max(energy, tiny))


def _quantize_rows(
    w: Tensor, shared: Input, scheme: Scheme, scale_dtype: type, method: Method
) -> tuple[Grid, Tensor]:
    grid = search_grid(w, shared.h, scheme, scale_dtype)
    if shared.plan is None:
        return grid, grid.nearest(w)
    return refine(w, shared.h, grid, gptq(w, shared.plan, grid))


def joined(parts: list[Quantized]) -> Quantized:
    """Row chunks of one matrix below each other."""
    import numpy as np

    zeros = [part.zero for part in parts if part.zero is not None]
    return Quantized(
        np.concatenate([part.q for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )
