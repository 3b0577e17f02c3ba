"""Products with packed weights, written so that TorchInductor makes one loop of each: words are loaded,
taken apart, scaled and summed in registers, and no matrix of floats is ever in memory.

A row is blocks of columns, a block `lanes` words of 32 bits. Of each word a format has `terms` weights, which
shifts take out; the same term of neighbouring words makes a vector. Instead of the weights, which would cost
a pass over them, the activations are brought into that order: [term, block, lane].

    int8, fp8   blocks of 32 columns, 8 words; term t of lane l is column 4 l + t
    int4        blocks of 64, 8 words; term t is column 32 (t % 2) + 4 l + t // 2
    int2, int3  blocks of 64, 4 words (int3: and 2 of third bits); term t is 16 (t % 4) + 4 l + t // 4

With groups of 32 columns a block of 64 has two scales: its terms belong to one half or the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gristmill.runtime.program import Segment

ROWS_AT_ONCE_BYTES = 64 << 20  # of a matrix that is widened to f32, for products with many rows


@dataclass(frozen=True)
class Form:
    """columns: of a block. words: of a block in memory. lanes: words that hold whole weights. axes: how the
    columns of a block become (shape, order of axes) terms and lanes. middle: zero point where none is
    stored."""

    columns: int
    words: int
    lanes: int
    axes: tuple[tuple[int, ...], tuple[int, ...]]
    middle: int = 0

    @property
    def terms(self) -> int:
        return self.columns // self.lanes

    def half(self, term: int) -> int:
        """Which 32 columns of a block a term belongs to."""
        return 0 if self.columns == 32 else term % 2 if self.terms == 8 else term % 4 // 2


_CRUMBS = ((4, 4, 4), (2, 0, 1))  # columns as [quarter, lane, byte]; terms are byte, quarter
FORMS = {
    "int8": Form(32, 8, 8, ((8, 4), (1, 0))),
    "fp8": Form(32, 8, 8, ((8, 4), (1, 0))),
    "int4": Form(64, 8, 8, ((2, 8, 4), (2, 0, 1)), 8),
    "int3": Form(64, 6, 4, _CRUMBS, 4),
    "int2": Form(64, 4, 4, _CRUMBS, 2),
}


class PackedMatrix(nn.Module):
    """A stored matrix [n, k], from the tensors of runtime.pt2.constants."""

    weight: Tensor
    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, segment: Segment, weight: Tensor, scale: Tensor | None, zero: Tensor | None) -> None:
        super().__init__()
        self.segment, self.form = segment, FORMS.get(segment.format)
        for name, tensor in (("weight", weight), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, tensor)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix as f32, for embeddings. ids [T]; result [T, k]."""
        zero = None if self.zero is None else self.zero[ids]
        scale = None if self.scale is None else self.scale[ids]
        found = self._widened(self.weight[ids], scale, zero)
        return found if self.form is None else self._in_order(found)

    def product(self, x: Tensor, one_row: bool) -> Tensor:
        """x [T, k] times the matrix transposed: [T, n] f32; one_row: T is 1 and weights stay in registers."""
        x = x if self.form is None else self._in_terms(x)
        if not one_row:
            return self._many_rows(x.flatten(1))
        return (self.weight.float() * x).sum(-1)[None] if self.form is None else self._one_row(x)

    def _in_terms(self, x: Tensor) -> Tensor:
        """[T, k] to [T, terms, blocks, lanes], in memory: else each row would gather it again."""
        assert self.form is not None
        shape, order = self.form.axes
        x = functional.pad(x, (0, -x.shape[1] % 64)).unflatten(1, (-1, *shape))
        axes = [axis + 2 for axis in order]
        x = x.permute(0, *axes[:-1], 1, axes[-1]).contiguous()
        blocks = x.shape[-2]
        shape4 = (x.shape[0], self.form.terms, blocks, self.form.lanes)
        strides = (self.form.terms * blocks * self.form.lanes, blocks * self.form.lanes, self.form.lanes, 1)
        return torch.as_strided(x, shape4, strides)

    def _in_order(self, w: Tensor) -> Tensor:
        """[T, terms, blocks, lanes] back to [T, k]."""
        assert self.form is not None
        shape, order = self.form.axes
        w = w.unflatten(1, [shape[axis] for axis in order[:-1]])  # [T, *terms, blocks, lanes]
        places = [*order[:-1], -1, order[-1]]  # the block comes first
        axes = [1 + places.index(axis) for axis in range(-1, len(shape))]
        return w.permute(0, *axes).flatten(1)[:, : self.segment.k]

    def _one_row(self, x: Tensor) -> Tensor:
        """Of each word all terms are summed before the scale; a zero point meets the sum of activations."""
        form = self.form
        assert form is not None and self.scale is not None
        scales, zeros = self._by_block(self.scale), self._zeros(self.zero)
        total: Tensor | None = None
        for half in range(len(scales)):
            terms = [t for t in range(form.terms) if len(scales) == 1 or form.half(t) == half]
            part = sum_of([_level(self.segment.format, self._words(self.weight), t) * x[0, t] for t in terms])
            if zeros is not None:
                given = sum_of([x[0, t] for t in terms])
                sums = torch.as_strided(given.contiguous(), given.shape, (form.lanes, 1))
                part = part - zeros[half] * sums
            part = part * scales[half]
            total = part if total is None else total + part
        assert total is not None
        return total.sum((1, 2))[None]

    def _many_rows(self, x: Tensor) -> Tensor:
        """Rows of the matrix are widened to f32, some at once, and multiplied. x [T, columns]."""
        if self.segment.format == "f32":
            return functional.linear(x, self.weight)
        count = max(1, ROWS_AT_ONCE_BYTES // (4 * x.shape[1]))
        parts = []
        for start in range(0, self.segment.n, count):
            rows = slice(start, min(start + count, self.segment.n))
            scale = None if self.scale is None else self.scale[rows]
            zero = None if self.zero is None else self.zero[rows]
            parts.append(functional.linear(x, self._widened(self.weight[rows], scale, zero).flatten(1)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _widened(self, weight: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
        """scale * (q - zero) of some rows: [rows, terms, blocks, lanes], floats: [rows, k]."""
        form = self.form
        if form is None or scale is None:
            return weight.float()
        scales, zeros = self._by_block(scale), self._zeros(zero)
        parts = []
        for t in range(form.terms):
            half = form.half(t) if len(scales) == 2 else 0
            q = _level(self.segment.format, self._words(weight), t)
            parts.append((q if zeros is None else q - zeros[half]) * scales[half])
        return torch.stack(parts, 1)

    def _words(self, weight: Tensor) -> Tensor:
        assert self.form is not None
        return weight.unflatten(1, (-1, self.form.words))

    def _by_block(self, values: Tensor) -> list[Tensor]:
        """[n, G] to f32 [n, blocks or 1, 1]: one for all terms, or one for each half of a block."""
        assert self.form is not None
        group, columns, values = self.segment.group, self.form.columns, values.float()
        if not group:
            return [values[..., None]]
        blocks = -(-self.segment.k // 64) * 64 // columns
        if group < columns:
            pairs = functional.pad(values, (0, 2 * blocks - values.shape[1])).unflatten(1, (blocks, 2))
            return [pairs[..., :1], pairs[..., 1:]]
        repeated = values.repeat_interleave(group // columns, 1) if group > columns else values
        short = blocks - repeated.shape[1]  # a row's last block of 32 may be padding alone
        repeated = functional.pad(repeated, (0, short)) if short > 0 else repeated[:, :blocks]
        return [repeated[..., None]]

    def _zeros(self, zero: Tensor | None) -> list[Tensor | float] | None:
        assert self.form is not None
        if zero is not None:
            return list(self._by_block(zero))
        return [float(self.form.middle)] * 2 if self.form.middle else None


def sum_of(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _level(form: str, words: Tensor, term: int) -> Tensor:
    """[..., blocks, words] int32 to the integers of a term [..., blocks, lanes], or fp8's values, as f32."""
    if form == "int8":
        return (words << (24 - 8 * term) >> 24).float()
    if form == "fp8":
        return _e4m3(words >> 8 * term)
    if form == "int4":
        return (words >> 4 * term & 15).float()
    low = words[..., :4] >> 2 * term & 3
    if form == "int2":
        return low.float()
    byte, quarter = term // 4, term % 4
    high = words[..., 4 + quarter // 2, None] >> 16 * (quarter % 2) + byte
    lanes = torch.arange(4, dtype=torch.int32) * 4
    return (low | (high >> lanes & 1) << 2).float()


def _e4m3(bits: Tensor) -> Tensor:
    """By arithmetic on the low 8 bits; a normal number is a float with another bias."""
    normal = ((bits & 127) + (120 << 3) << 20).view(torch.float32)
    size = torch.where(bits & 120 > 0, normal, (bits & 7).float() * 2.0**-9)
    return torch.where(bits & 128 > 0, -size, size)
