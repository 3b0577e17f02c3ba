"""Second moments of a linear's inputs: what every calibrated method minimizes its output error with.

The squared error of a linear's output over calibration rows x is the quadratic form of its weight error:
sum_x |(W - Q) x|^2 = tr((W - Q) H (W - Q)^T) with H = sum_x x x^T (arXiv 2210.17323, eq. 1). H is kept as a
mean over the rows, so that a damping means the same for any number of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_DAMPING = 1e-6  # where none was asked for, and H cannot be factored without
PIECE_ROWS = 4096  # that enter the sums together


class Moments:
    """Accumulates H = mean(x x^T) [K, K] over rows, and for GPTAQ's asymmetric error what the float model has
    more: ``cross`` mean((x_float - x) x^T) [K, K], ``residual`` mean((r_float - r) x^T) [N, K] where the
    linear adds to a residual stream r of N columns.

    Products are f32, sums f64: the result does not depend on the size of the pieces beyond f32 rounding of
    each piece, and the pieces are fixed by the calibration set.
    """

    def __init__(self, k: int, cross: bool = False, residual: int = 0) -> None:
        self.rows = 0
        self._pending: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        self._sum = torch.zeros(k, k, dtype=torch.float64)
        self.cross = torch.zeros(k, k, dtype=torch.float64) if cross else None
        self.residual = torch.zeros(residual, k, dtype=torch.float64) if residual else None

    def add(self, x: Tensor, x_float: Tensor | None = None, residual: Tensor | None = None) -> None:
        """Rows x [T, K] f32; x_float: the same rows in the float model; residual: r_float - r [T, N]."""
        assert (x_float is None) == (self.cross is None) and (residual is None) == (self.residual is None)
        self._pending.append((x, x_float, residual))
        if sum(len(rows[0]) for rows in self._pending) >= PIECE_ROWS:
            self._sum_up()

    def _sum_up(self) -> None:
        """Enter the rows at hand: few large products, as adding to K^2 f64 numbers takes its time too."""
        if not self._pending:
            return
        x, x_float, residual = (_joined(parts) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        assert x is not None
        self.rows += len(x)
        self._sum += x.T @ x
        if self.cross is not None and x_float is not None:
            self.cross += (x_float - x).T @ x
        if self.residual is not None and residual is not None:
            self.residual += residual.T @ x

    def hessian(self) -> Tensor:
        """H [K, K] f64. All sums become means, in place: nothing can be added afterwards."""
        self._sum_up()
        count, self.rows = max(self.rows, 1), 0
        for sums in (self.cross, self.residual):
            if sums is not None:
                sums /= count
        return self._sum.div_(count)


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


@dataclass(frozen=True)
class Factor:
    """U [K, K] f32, upper triangular, with U^T U = (H + damping I)^-1, and the damping that it took."""

    upper: Tensor
    damping: float


def dead_columns(h: Tensor) -> Tensor:
    """Which inputs [K] never were anything but 0."""
    return h.diagonal() <= 0


def damp(h: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) I in place, the mean on the diagonal of dead columns, which then round to
    nearest."""
    mean, dead = h.diagonal().mean(), dead_columns(h)
    h.diagonal().add_(damping * mean)
    h.diagonal()[dead] = mean if mean > 0 else 1.0
    return h


def inverse_factor(h: Tensor, order: Tensor, damping: float) -> Factor:
    """The Cholesky factor that GPTQ reads its updates from (arXiv 2210.17323, section 3.3, step 3), of H with
    its columns in ``order``.

    A matrix of too low a rank gets ten times the damping until it can be factored.
    """
    for attempt in range(20):
        tried = damping * 10**attempt if damping or not attempt else LEAST_DAMPING * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(damp(h[order[:, None], order], tried))
        if failed:
            continue
        inverse = torch.cholesky_inverse(lower)
        del lower  # matrices of K^2 f64 are what bounds the memory of a calibration
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and torch.isfinite(upper).all():
            return Factor(upper.float(), tried)
    raise AssertionError("a positive diagonal of this size always factors")


def row_errors(difference: Tensor, h: Tensor) -> Tensor:
    """difference [N, K] of the weights -> d H d^T of every row [N], the squared error of its output."""
    return ((difference @ h) * difference).sum(1)
