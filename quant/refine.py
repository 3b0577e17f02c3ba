"""What is left to gain after the integers are chosen: the same error, minimized further.

Two moves, neither of which can make the output error d H d^T of a row larger:

- sweep: coordinate descent over the columns. With all other columns fixed the error is a parabola in one
  weight, so that the level nearest to its minimum is the best one (QuantEase, arXiv 2309.01885, eq. 11).
- refit: with the integers fixed the error is a quadratic in the scales of a row, whose minimum is a small
  linear system. A row keeps its old scales where rounding them to the stored type eats the gain.

Both keep P = H d, of which the error is a sum, so that each costs one product with H or two. Everything is
transposed, [K, N]: a step reads and writes whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gristmill.quant.grid import Grid, nearest

BLOCK_COLUMNS = 64
SYSTEM_NUMBERS = 1 << 22  # of the linear systems solved together: 32 MiB of f64
RIDGE = 1e-6  # of a system's diagonal: what pulls towards the scales there are


@dataclass
class State:
    """Integers q and weight errors d = values - w, both [K, N], P = H d, and the grid they are on."""

    grid: Grid
    q: Tensor
    d: Tensor
    p: Tensor

    @staticmethod
    def of(w: Tensor, h: Tensor, grid: Grid, q: Tensor) -> State:
        """w, q: [K, N]; h: H [K, K] f32."""
        d = values(grid, q) - w
        return State(grid, q, d, h @ d)

    def errors(self) -> Tensor:
        """d H d^T of every row [N]."""
        return (self.p * self.d).sum(0)


def values(grid: Grid, q: Tensor) -> Tensor:
    """The weights [K, N] that integers q [K, N] stand for."""
    return grid.values(q.T).T.contiguous()


def refine(w: Tensor, h: Tensor, grid: Grid, q: Tensor, rounds: int = 2) -> tuple[Grid, Tensor, Tensor]:
    """Sweep and refit in turn; w, q [N, K] f32, h: H [K, K] f32 with a positive diagonal.

    Returns grid, q [N, K] and every row's error [N].
    """
    weights = w.T.contiguous()
    target = h @ weights
    state = State.of(weights, h, grid, q.T.contiguous())
    for _ in range(rounds):
        sweep(state, h)
        state = refit(state, weights, h, target)
    return state.grid, state.q.T.contiguous(), state.errors()


def sweep(state: State, h: Tensor, block_columns: int = BLOCK_COLUMNS) -> None:
    """One pass over all columns, in place; updates outside a block of columns are applied once a block."""
    scales, zeros = (x.T.contiguous() for x in state.grid.columns(len(h)))
    numbers = state.grid.scheme.numbers
    for first in range(0, len(h), block_columns):
        end = min(first + block_columns, len(h))
        before = state.d[first:end].clone()
        p = state.p[first:end].clone()
        for column in range(first, end):
            d, z = state.d[column], zeros[column]
            best = (state.q[column] - z) * scales[column] - p[column - first] / h[column, column]
            q = nearest(best, scales[column], z, numbers)
            moved = (q - state.q[column]) * scales[column]
            state.q[column] = q
            d += moved
            p += h[first:end, column, None] * moved
        state.p += h[:, first:end] @ (state.d[first:end] - before)


def refit(state: State, w: Tensor, h: Tensor, target: Tensor) -> State:
    """The scales that minimize every row's error for its integers. target: H w [K, N]."""
    z = state.q - state.grid.columns(len(h))[1].T
    width = state.grid.scheme.group_size or len(h)
    rows = max(1, SYSTEM_NUMBERS // state.grid.scale.shape[1] ** 2)
    parts = [
        _solve(h, state.grid.scale[n : n + rows], z[:, n : n + rows], target[:, n : n + rows], width)
        for n in range(0, w.shape[1], rows)
    ]
    fitted = State.of(w, h, state.grid.with_scale(torch.cat(parts)), state.q)
    better = fitted.errors() < state.errors()
    return State(
        state.grid.choose(fitted.grid, better),
        state.q,
        torch.where(better, fitted.d, state.d),
        torch.where(better, fitted.p, state.p),
    )


def _solve(h: Tensor, scale: Tensor, z: Tensor, target: Tensor, width: int) -> Tensor:
    """Scales s [n, G] with (Z H Z^T) s = Z H w for n rows; z [K, n] integers less their zero."""
    count = scale.shape[1]
    system = torch.zeros(scale.shape[0], count, count)
    for g in range(count):  # Z H Z^T is symmetric: one half of it, and its mirror image
        first, own = g * width, slice(g * width, (g + 1) * width)
        row = _group_sums((h[first:, own] @ z[own]).mul_(z[first:]), width)
        system[:, g, g:] = row
        system[:, g:, g] = row
    system, right = system.double(), _group_sums(z * target, width).double()
    diagonal = system.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # a group of zeros keeps its scale
    ridge = torch.where(empty, 1.0, RIDGE * diagonal.mean(1, keepdim=True))
    diagonal += ridge
    solved, failed = torch.linalg.solve_ex(system, right + ridge * scale)
    kept = empty | ~torch.isfinite(solved) | (failed != 0)[:, None] | (solved == 0)
    return torch.where(kept, scale.double(), solved).float()


def _group_sums(x: Tensor, width: int) -> Tensor:
    """Sums [n, G] of x [K, n] over groups of columns."""
    padded = functional.pad(x, (0, 0, 0, -len(x) % width))
    return padded.view(-1, width, x.shape[1]).sum(1).T
