"""Scales chosen by the error they cause in the output, not by the largest weight.

The largest weight of a group sets the scale of plain rounding, and every other weight pays for it. Here
narrower ranges are tried (clipping, as in AWQ, arXiv 2306.00978 section 3.2 and its released search), both
signs of a symmetric scale, and then the scale that fits the integers best in the least-squares sense. A
group is judged by its own block of H: (w - q) H_gg (w - q)^T. Groups interact, so that a row's groups may
win one by one and lose together: a row whose whole error is not smaller keeps its plain scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gristmill.quant.grid import Grid, nearest, rounding_grid, stored
from gristmill.quant.hessian import row_errors
from gristmill.quant.scheme import Scheme

BLOCK = 128  # widest block of H that a group is judged by
CHUNK_WEIGHTS = 1 << 17  # weights looked at together: 512 KiB, what a core's cache holds
REFITS = 3
SHRINK = tuple(1 - 0.03 * i for i in range(20))  # share of the range that is kept, down to 0.43
FINE_SHRINK = tuple(1 - 0.01 * i for i in range(8))  # for eight bits, where clipping costs more
CANDIDATES_ABOUT = 45  # that a group is tried with, refits included
SIDES = (1.0, 0.9, 0.8, 0.65, 0.5)  # the same of either side of an asymmetric range


@dataclass(frozen=True)
class Found:
    """A grid, and the squared output error of every row [N] when rounded to it, and to the plain grid."""

    grid: Grid
    errors: Tensor
    plain_errors: Tensor


def search_grid(w: Tensor, h: Tensor, scheme: Scheme, scale_dtype: type) -> Found:
    """A grid for w [N, K] f32 under H [K, K] f32; its rounding never has more output error than plain.

    Deterministic; rows do not see each other.
    """
    plain = rounding_grid(w, scheme, scale_dtype)
    blocks = Blocks.of(h, plain.scheme.group_size)
    rows = max(1, CHUNK_WEIGHTS // w.shape[1])
    found = [_search_rows(w[n : n + rows], _rows(plain, n, n + rows), blocks) for n in range(0, len(w), rows)]
    scale, zero = torch.cat([g.scale for g in found]), torch.cat([g.zero for g in found])
    searched = Grid(scale, zero, plain.scheme, scale_dtype)
    errors, plain_errors = (row_errors(w - g.values(g.nearest(w)), h) for g in (searched, plain))
    better = errors < plain_errors
    return Found(plain.choose(searched, better), torch.where(better, errors, plain_errors), plain_errors)


def _rows(grid: Grid, start: int, stop: int) -> Grid:
    return Grid(grid.scale[start:stop], grid.zero[start:stop], grid.scheme, grid.scale_dtype)


@dataclass(frozen=True)
class Blocks:
    """The diagonal blocks of H that groups are judged by: h [B, b, b], groups of ``group`` columns."""

    h: Tensor
    group: int
    columns: int

    @staticmethod
    def of(h: Tensor, group: int) -> Blocks:
        """A group is one block, or where it is wider than BLOCK (a whole row) several."""
        k = len(h)
        width = min(group or BLOCK, BLOCK)
        pad = -k % width
        padded = functional.pad(h, (0, pad, 0, pad))
        count = len(padded) // width
        tiles = padded.view(count, width, count, width)
        index = torch.arange(count)
        return Blocks(tiles[index, :, index].contiguous(), group or len(padded), k)

    def grouped(self, w: Tensor) -> Tensor:
        """w [N, K] -> [N, G, group], filled up with zeros."""
        return functional.pad(w, (0, -self.columns % self.group)).view(len(w), -1, self.group)

    def product(self, x: Tensor) -> Tensor:
        """x [N, G, group] times its blocks of H, of the same shape."""
        blocks = x.reshape(len(x), -1, self.h.shape[1]).transpose(0, 1)
        return torch.bmm(blocks, self.h).transpose(0, 1).reshape(x.shape)

    def form(self, x: Tensor, y: Tensor) -> Tensor:
        """x H_gg y^T [N, G] of x, y [N, G, group]."""
        return (self.product(x) * y).sum(-1)


def _search_rows(w: Tensor, plain: Grid, blocks: Blocks) -> Grid:
    """The best of all candidates for every group of some rows, each improved by least squares."""
    groups = blocks.grouped(w)
    best = _Best(groups, plain, blocks)
    for scale, zero in _candidates(groups, plain):
        best.offer(scale, zero)
    for _ in range(REFITS):
        best.offer(best.refitted(), best.zero)
    return Grid(best.scale, best.zero, plain.scheme, plain.scale_dtype)


class _Best:
    """The best scale and zero [N, G] so far, with their error and their integers."""

    def __init__(self, groups: Tensor, plain: Grid, blocks: Blocks) -> None:
        self.groups, self.blocks, self.plain = groups, blocks, plain
        self.scale, self.zero = plain.scale, plain.zero
        self.error = self._error(self.scale, self.zero)

    def _round(self, scale: Tensor, zero: Tensor) -> Tensor:
        """q - zero [N, G, group]."""
        z = zero[..., None]
        return nearest(self.groups, scale[..., None], z, self.plain.scheme.numbers).sub_(z)

    def _error(self, scale: Tensor, zero: Tensor) -> Tensor:
        difference = self.groups - self._round(scale, zero) * scale[..., None]
        return self.blocks.form(difference, difference)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        scale = stored(scale, self.plain.scale_dtype)
        error = self._error(scale, zero)
        better = error < self.error
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)
        self.error = torch.where(better, error, self.error)

    def refitted(self) -> Tensor:
        """The scale that fits the present integers best: (z H w) / (z H z) with z = q - zero."""
        z = self._round(self.scale, self.zero)
        product = self.blocks.product(z)
        square = (product * z).sum(-1)
        fitted = (product * self.groups).sum(-1) / square
        return torch.where((square > 0) & torch.isfinite(fitted), fitted, self.scale)


def _candidates(groups: Tensor, plain: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zero points [N, G] worth a try."""
    numbers = plain.scheme.numbers
    low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    if plain.scheme.symmetric:
        size = torch.maximum(-low, high)
        signed = torch.where(-low >= high, size, -size)  # the longer side of the range meets the largest
        below, above = numbers.zero_point - numbers.low, numbers.high - numbers.zero_point
        for kept in SHRINK if numbers.bits < 8 else FINE_SHRINK:
            yield size * (kept / above), plain.zero
            if numbers.bits < 8:
                yield signed * (kept / below), plain.zero
        return
    for kept_low in SIDES:
        for kept_high in SIDES:
            scale = stored((high * kept_high - low * kept_low) / numbers.levels, plain.scale_dtype)
            zero = torch.round(-low * kept_low / scale) + numbers.low
            yield scale, zero.clamp_(numbers.low, numbers.high)
