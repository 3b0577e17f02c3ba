"""GPTQ: round column by column, and let the columns still to come make up for each error.

arXiv 2210.17323, algorithm 1, with its letters: W the weights, H the Hessian of the output error, U the upper
Cholesky factor of the inverse of H. After column i is rounded to Q_i, err = (W_i - Q_i) / U_ii and every
later column takes W_j -= err U_ij. Updates of later blocks are applied once a block (lazy batch updates),
which changes nothing but the order of sums.

Act-order takes the columns with the largest second moments first. Scales and zero points are those of the
columns' own groups (static groups), so that the stored layout needs no permutation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gristmill.quant.grid import Grid, nearest
from gristmill.quant.hessian import inverse_factor

DAMPING = 0.01
BLOCK_COLUMNS = 128
SHIFT_ROWS = 512


@dataclass(frozen=True)
class Plan:
    """What all matrices of one input share: the order of columns [K] and U [K, K] f32 in that order."""

    order: Tensor
    upper: Tensor
    damping: float  # that it took to factor H

    @staticmethod
    def of(h: Tensor, act_order: bool = True, damping: float = 0.0) -> Plan:
        """h: H [K, K] f64; damping: share of its mean diagonal added to it, more where it has to be."""
        natural = torch.arange(len(h))
        order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else natural
        factor = inverse_factor(h, order, damping)
        return Plan(order, factor.upper, factor.damping)


def gptq(w: Tensor, plan: Plan, grid: Grid, block_columns: int = BLOCK_COLUMNS) -> Tensor:
    """Integers q [N, K] f32 on ``grid`` for w [N, K] f32; rows do not see each other."""
    k = w.shape[1]
    # columns become rows: each step reads and writes them whole
    weights, scales, zeros = (x.T[plan.order].contiguous() for x in (w, *grid.columns(k)))
    q = torch.empty_like(weights)
    for first in range(0, k, block_columns):
        end = min(first + block_columns, k)
        errors = _round_block(weights, scales, zeros, plan.upper, q, grid, first, end)
        weights[end:] -= plan.upper[first:end, end:].T @ errors
    out = torch.empty_like(q)
    out[plan.order] = q
    return out.T.contiguous()


def _round_block(
    weights: Tensor, scales: Tensor, zeros: Tensor, upper: Tensor, q: Tensor, grid: Grid, first: int, end: int
) -> Tensor:
    """Round columns [first, end) of the whole matrix in turn; returns their errors [end - first, N]."""
    errors = torch.empty_like(weights[first:end])
    for column in range(first, end):
        w = weights[column]
        q[column] = nearest(w, scales[column], zeros[column], grid.scheme.numbers)
        rounded = (q[column] - zeros[column]) * scales[column]
        error = (w - rounded) / upper[column, column]
        errors[column - first] = error
        weights[column + 1 : end] -= upper[column, column + 1 : end, None] * error
    return errors


def asymmetric_shift(h: Tensor, cross: Tensor) -> Tensor:
    """S [K, K] f32: W + W S over the quantized model's inputs X comes nearest to W over the float model's.

    GPTAQ (arXiv 2504.02692, eq. 4) minimizes |W X_float - Q X|^2. With X_float = X + D that is, but for a
    constant, |(W' - Q) X|^2 for W' = W + W (D X^T) (X X^T)^-1: plain GPTQ on other weights. The paper spreads
    the same term over its column steps. A linear that adds to a residual stream can make up for that
    stream's error R = r_float - r just so, by (R X^T) (X X^T)^-1. h, cross: mean(X X^T), damped, and
    mean(D X^T) or mean(R X^T), f64; the result has the shape of cross.
    """
    lower = torch.linalg.cholesky(h)
    out = torch.empty(cross.shape)
    for n in range(0, len(cross), SHIFT_ROWS):  # whole, the f64 solution would be one more matrix of K^2
        out[n : n + SHIFT_ROWS] = torch.cholesky_solve(cross[n : n + SHIFT_ROWS].T, lower).T
    return out
