"""Matrices and second moments that quantizers are tried on, and GPTQ by the book."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.quant.grid import Grid, nearest
from gristmill.quant.hessian import Moments


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=generator(seed)) * 0.1


def inputs(rows: int, k: int, seed: int = 1, outliers: int = 0) -> Tensor:
    """Correlated rows [rows, K]; the first ``outliers`` channels are 30 times as large."""
    g = generator(seed)
    mix = torch.eye(k) + 0.5 * torch.randn(k, k, generator=g) / k**0.5
    x = torch.randn(rows, k, generator=g) @ mix
    x[:, :outliers] *= 30
    return x


def hessian(x: Tensor) -> Tensor:
    moments = Moments(x.shape[1])
    moments.add(x)
    return moments.hessian()


def gptq_by_the_book(w: Tensor, h: Tensor, grid: Grid, damping: float, order: Tensor) -> Tensor:
    """Optimal brain quantization in a fixed order, the inverse of the remaining H made anew for each column
    (arXiv 2210.17323, eq. 2): no Cholesky factor, no blocks."""
    k = w.shape[1]
    damped = h + damping * h.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    scale, zero = (x.double() for x in grid.columns(k))
    left, q = w.double().clone(), torch.zeros(w.shape, dtype=torch.float64)
    remaining = order.tolist()
    while remaining:
        column = remaining[0]
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        q[:, column] = nearest(left[:, column], scale[:, column], zero[:, column], grid.scheme.numbers)
        error = left[:, column] - (q[:, column] - zero[:, column]) * scale[:, column]
        left[:, remaining] -= error[:, None] * inverse[0] / inverse[0, 0]
        remaining = remaining[1:]
    return q
