"""The calibrated methods, put together from their parts, for one matrix at a time.

rtn rounds to nearest and needs no calibration. rtn+search searches scales and clipping by output error. gptq
starts from those scales, rounds by GPTQ and refines. awq scales input channels first (that happens in the
graph, before any matrix is quantized) and then searches; awq+gptq scales first and then does as gptq.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gristmill.quant.gptq import DAMPING, Plan, asymmetric_shift, gptq
from gristmill.quant.hessian import Moments, damp, dead_columns, row_errors
from gristmill.quant.refine import refine
from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import Scheme
from gristmill.quant.search import search_grid

CHUNK_WEIGHTS = 3 << 22  # weights quantized together: 48 MiB of f32, some ten times that at work


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
    """What the matrices that share one input share.

    h: damped H [K, K] f32; plan: GPTQ's, for methods that have it; shift [K, K], residual_shift [N, K] f32: W
    shift + residual_shift is what the asymmetric error adds to the weights W; dead: number of inputs that
    never were anything but 0; damping: what H took.
    """

    h: Tensor
    plan: Plan | None
    shift: Tensor | None
    residual_shift: Tensor | None
    dead: int
    damping: float

    @staticmethod
    def of(moments: Moments, method: Method, act_order: bool = True, damping: float = DAMPING) -> Input:
        """Uses up the moments."""
        h = moments.hessian()
        dead = int(dead_columns(h).sum())
        damp(h, damping)
        shifts: list[Tensor | None] = []
        for cross in (moments.cross, moments.residual):
            shifts.append(None if cross is None else asymmetric_shift(h, cross))
        del cross
        moments.cross = moments.residual = None  # K^2 numbers less while H is factored
        plan = Plan.of(h, act_order) if method.gptq else None
        return Input(h.float(), plan, shifts[0], shifts[1], dead, damping + (plan.damping if plan else 0))

    def of_rows(self, rows: Tensor) -> Input:
        """For the matrices of some rows [n] of the linear only."""
        if self.residual_shift is None:
            return self
        return replace(self, residual_shift=self.residual_shift[rows])

    def target(self, w: Tensor, rows: slice) -> Tensor:
        """What to quantize in place of W [N, K], whose rows are these of all that share the input."""
        out = w if self.shift is None else w + w @ self.shift
        return out if self.residual_shift is None else out + self.residual_shift[rows]


@dataclass(frozen=True)
class Calibrated:
    """Quantized rows, and their squared output errors: [N] f64 each, of rounding to nearest, of this method,
    and of leaving the weights out, which is the size of the output."""

    quantized: Quantized
    rtn: Tensor
    error: Tensor
    energy: Tensor


def quantize_calibrated(
    w: Tensor, shared: Input, scheme: Scheme, scale_dtype: type, method: Method
) -> Calibrated:
    """Quantize w [N, K] f32 by a calibrated method. Deterministic; rows do not see each other."""
    scheme = scheme.normalize(w.shape[1])
    rows = max(1, CHUNK_WEIGHTS // w.shape[1])
    chunks = [slice(n, min(n + rows, len(w))) for n in range(0, len(w), rows)]
    parts = [_quantize_rows(w[chunk], shared, chunk, scheme, scale_dtype, method) for chunk in chunks]
    rtn, error, energy = (torch.cat([getattr(p, name) for p in parts]) for name in ("rtn", "error", "energy"))
    return Calibrated(_joined([p.quantized for p in parts]), rtn, error, energy)


def _quantize_rows(
    w: Tensor, shared: Input, rows: slice, scheme: Scheme, scale_dtype: type, method: Method
) -> Calibrated:
    energy = row_errors(w, shared.h)
    w = shared.target(w, rows)
    found = search_grid(w, shared.h, scheme, scale_dtype)
    grid, q, error = found.grid, found.grid.nearest(w), found.errors
    if shared.plan is not None:
        tuned, q_tuned, error_tuned = refine(w, shared.h, grid, gptq(w, shared.plan, grid))
        # on a grid too coarse for the columns to come, making up for errors may lose
        better = error_tuned < error
        grid, q = grid.choose(tuned, better), torch.where(better[:, None], q_tuned, q)
        error = torch.where(better, error_tuned, error)
    return Calibrated(grid.quantized(q), found.plain_errors.double(), error.double(), energy.double())


def _joined(parts: list[Quantized]) -> Quantized:
    """Row chunks of one matrix below each other."""
    zeros = [part.zero for part in parts if part.zero is not None]
    q, scale = np.concatenate([p.q for p in parts]), np.concatenate([p.scale for p in parts])
    return Quantized(q, scale, np.concatenate(zeros) if zeros else None)
