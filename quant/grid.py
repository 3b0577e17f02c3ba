"""The levels that a row's weights may take, in torch: what searching, GPTQ and refining share.

A grid fixes scale and zero point of every group; the integers are then a matter of choice. `rtn` makes the
grids of rounding to nearest and stores them; here they are looked at column by column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gristmill.quant import rtn
from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import Format, Scheme


@dataclass(frozen=True)
class Grid:
    """scale [N, G] f32, exactly as it will be stored in ``scale_dtype``, and zero point [N, G] f32.

    scheme: normalized for the matrix's columns.
    """

    scale: Tensor
    zero: Tensor
    scheme: Scheme
    scale_dtype: type

    def columns(self, k: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every column, [N, k] each."""
        width = self.scheme.group_size or k
        scale, zero = (x[..., None].expand(-1, -1, width).flatten(1)[:, :k] for x in (self.scale, self.zero))
        return scale, zero

    def nearest(self, w: Tensor) -> Tensor:
        """The nearest integers q [N, K] f32 of w [N, K]."""
        scale, zero = self.columns(w.shape[1])
        return nearest(w, scale, zero, self.scheme.numbers)

    def values(self, q: Tensor) -> Tensor:
        """The weights [N, K] that integers stand for."""
        scale, zero = self.columns(q.shape[1])
        return (q - zero) * scale

    def with_scale(self, scale: Tensor) -> Grid:
        """The same with other scales, rounded to the stored type."""
        return replace(self, scale=stored(scale, self.scale_dtype))

    def choose(self, other: Grid, rows: Tensor) -> Grid:
        """This grid, and the other one's in ``rows`` [N] bool."""
        take = rows[:, None]
        scale, zero = torch.where(take, other.scale, self.scale), torch.where(take, other.zero, self.zero)
        return replace(self, scale=scale, zero=zero)

    def quantized(self, q: Tensor) -> Quantized:
        """Integers q [N, K] on this grid as `pack` takes them."""
        dtype = self.scheme.numbers.dtype
        zero = None if self.scheme.symmetric else self.zero.numpy().astype(dtype)
        return Quantized(q.numpy().astype(dtype), self.scale.numpy().astype(self.scale_dtype), zero)


def nearest(w: Tensor, scale: Tensor, zero: Tensor, numbers: Format) -> Tensor:
    """The nearest integers of w for scale and zero of one shape with it."""
    return (torch.round(w / scale) + zero).clamp_(numbers.low, numbers.high)


def stored(scale: Tensor, scale_dtype: type) -> Tensor:
    """Scales rounded to the type they are stored in; a group of zeros has scale 1."""
    ones = torch.where(scale == 0, 1.0, scale)
    return ones.half().float() if scale_dtype is np.float16 else ones


def rounding_grid(w: Tensor, scheme: Scheme, scale_dtype: type) -> Grid:
    """The grid of rounding w [N, K] to nearest."""
    scheme = scheme.normalize(w.shape[1])
    groups = rtn.grouped(w.numpy(), scheme.group_size)
    with np.errstate(all="ignore"):  # a scale that f16 cannot hold is 0 or infinite here
        scale, zero = rtn.group_scales(groups, scheme, scale_dtype)
    zeros = torch.from_numpy(zero.astype(np.float32))
    return Grid(torch.from_numpy(scale.astype(np.float32)), zeros, scheme, scale_dtype)


def rounded_grid(w: Tensor, scheme: Scheme) -> Grid:
    """The same with f16 scales, or f32 where rounding to nearest needs scales beyond f16's range."""
    grid = rounding_grid(w, scheme, np.float16)
    if rtn.scales_fit(grid.scale.numpy().astype(np.float16)):
        return grid
    return rounding_grid(w, scheme, np.float32)


def scale_type(w: Tensor, scheme: Scheme) -> type:
    """The type of `rounded_grid`'s scales."""
    return rounded_grid(w, scheme).scale_dtype
