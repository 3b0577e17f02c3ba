"""What a KV cache gives back of the rows that it was given, in each of its formats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GRIDS = 16  # candidates for a row's scale, narrower by 1/32 of the range each
LEAST_STEP = 1e-35  # rows of a smaller range count as constant
INT4_COLUMNS = 32  # that share a scale
LARGEST_E4M3 = 448.0


def rounded(x: Tensor, dtype: str) -> Tensor:
    """x [..., D] f32 as the cache format `dtype` returns it: rounded to the format and back, each row (int4:
    each 32 columns of it) for itself."""
    if dtype == "f32":
        return x
    if dtype == "f16":
        return x.half().float()
    if dtype == "fp8":
        return _fp8(x)
    if dtype == "int8":
        return _best_grid(x, 255, 1.0, torch.float32)
    parts = [_best_grid(part, 15, 0.75, torch.float16) for part in x.split(INT4_COLUMNS, -1)]
    return torch.cat(parts, -1)


def hadamard(x: Tensor, block: int) -> Tensor:
    """Each `block` columns, a power of two, times the orthonormal Walsh-Hadamard matrix. x [..., D]."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (x.unflatten(-1, (-1, block)) @ (matrix / math.sqrt(block))).flatten(-2)


def _fp8(x: Tensor) -> Tensor:
    """The largest magnitude of a row meets e4m3's."""
    largest = x.abs().amax(-1, keepdim=True)
    scaled = x * (LARGEST_E4M3 / torch.where(largest > 0, largest, 1.0))
    return scaled.to(torch.float8_e4m3fn).float() * (largest / LARGEST_E4M3)


def _best_grid(x: Tensor, levels: int, narrowest: float, stored: torch.dtype) -> Tensor:
    """The best by squared error of 16 grids step * (0..levels) + offset, both kept as `stored`."""
    high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    middle = 0.5 * high + 0.5 * low
    share = narrowest + torch.arange(GRIDS) / 32
    step = (share * ((high - low) / levels)).to(stored).float()  # [..., GRIDS]
    offset = (middle.double() - levels / 2 * step.double()).float().to(stored).float()
    usable = step > LEAST_STEP
    inverse = 1 / torch.where(usable, step, 1.0)
    q = ((x[..., None, :] - offset[..., None]) * inverse[..., None]).round().clamp(0, levels)
    values = q.double() * step.double()[..., None] + offset.double()[..., None]  # [..., GRIDS, D]
    error = (values - x[..., None, :].double()).square().sum(-1)
    error = torch.where(usable, error, torch.inf)
    best = error.argmin(-1)[..., None, None].expand(*x.shape[:-1], 1, x.shape[-1])
    chosen = values.gather(-2, best)[..., 0, :].float()
    return torch.where(usable.any(-1, keepdim=True), chosen, middle.to(stored).float())
