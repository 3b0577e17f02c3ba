"""What is left to gain after the integers are chosen: the same error, minimized further.

Two moves, neither of which can make the output error d H d^T of a row larger:

- sweep: coordinate descent over the columns. With all other columns fixed the error is a parabola in one
  weight, so that the level nearest to its minimum is the best one (QuantEase, arXiv 2309.01885, eq. 11).
- refit: with the integers fixed the error is a quadratic in the scales of a row, whose minimum is a small
  linear system. A row keeps its old scales where rounding them to the stored type eats the gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.quant.grid import Grid, nearest
from gristmill.quant.hessian import row_errors

BLOCK_COLUMNS = 128
CHUNK_WEIGHTS = 1 << 21


def refine(w: Tensor, h: Tensor, grid: Grid, q: Tensor, rounds: int = 2) -> tuple[Grid, Tensor]:
    """Refit and sweep in turn; w, q [N, K] f32, H [K, K] f64 with a positive diagonal."""
    h = h.float()
    for _ in range(rounds):
        grid = refit_scales(w, h, grid, q)
        q = sweep(w, h, grid, q)
    return refit_scales(w, h, grid, q), q


def sweep(w: Tensor, h: Tensor, grid: Grid, q: Tensor, block_columns: int = BLOCK_COLUMNS) -> Tensor:
    """One pass over all columns; H f32."""
    k = w.shape[1]
    scales, zeros = (x.T.contiguous() for x in grid.columns(k))
    values = grid.values(q).T.contiguous()
    gradient = h @ (values - w.T)  # [K, N]: H d
    out = q.T.contiguous()
    for first in range(0, k, block_columns):
        end = min(first + block_columns, k)
        before = values[first:end].clone()
        for column in range(first, end):
            best = values[column] - gradient[column] / h[column, column]
            out[column] = nearest(best, scales[column], zeros[column], grid.scheme.numbers)
            moved = (out[column] - zeros[column]) * scales[column] - values[column]
            values[column] += moved
            gradient[column:end] += h[column, column:end, None] * moved
        moved_block = values[first:end] - before
        gradient[end:] += h[end:, first:end] @ moved_block
    return out.T.contiguous()


def refit_scales(w: Tensor, h: Tensor, grid: Grid, q: Tensor) -> Grid:
    """The scales that minimize every row's error for its integers; H f32."""
    rows = max(1, CHUNK_WEIGHTS // w.shape[1])
    target = w @ h
    parts = [
        _refit_rows(h, grid.scale[n : n + rows], (q - grid.columns(w.shape[1])[1])[n : n + rows],
                    target[n : n + rows], grid.scheme.group_size)
        for n in range(0, len(w), rows)
    ]  # fmt: skip
    fitted = grid.with_scale(torch.cat(parts))
    errors = [row_errors(w - g.values(q), h) for g in (fitted, grid)]
    return grid.choose(fitted, errors[0] < errors[1])


def _refit_rows(h: Tensor, scale: Tensor, z: Tensor, target: Tensor, group: int) -> Tensor:
    """Solve (Z H Z^T) s = Z H w for some rows; z [n, K] integers less their zero, target [n, K] = w H."""
    n, k = z.shape
    width = group or k
    count = scale.shape[1]
    system = torch.zeros(n, count, count, dtype=torch.float64)
    right = torch.zeros(n, count, dtype=torch.float64)
    for g in range(count):
        own = slice(g * width, min((g + 1) * width, k))
        row = (z[:, own] @ h[own]) * z
        system[:, g] = _group_sums(row, width)
        right[:, g] = (z[:, own] * target[:, own]).sum(1, dtype=torch.float64)
    diagonal = system.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # a group of zeros keeps its scale
    ridge = 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30
    diagonal += torch.where(empty, 1.0, ridge)
    # the ridge pulls towards the scales there are
    right += torch.where(empty, 0.0, ridge) * scale
    solved, failed = torch.linalg.solve_ex(system, right)
    kept = empty | ~torch.isfinite(solved) | (failed != 0)[:, None] | (solved == 0)
    return torch.where(kept, scale.double(), solved).float()


def _group_sums(x: Tensor, width: int) -> Tensor:
    """Sums [n, G] of x [n, K] over groups of columns."""
    pad = -x.shape[1] % width
    return torch.nn.functional.pad(x, (0, pad)).view(len(x), -1, width).sum(2, dtype=torch.float64)
