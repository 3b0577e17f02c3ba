"""Which number format each matrix gets: by its role, as kept by pattern, or chosen under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..quant.budget import Choice, Solution, solve, table
from ..quant.request import (
    Keep,
    budget_of_bits,
    budget_of_size,
    keep_scheme,
    matrix_bits,
    parse_bits,
    parse_keep,
    parse_size,
    refuse_unmatched,
)
from ..quant.scheme import FORMATS, Scheme, parse
from ..quant.tensor import stored_shapes
from .lower import Lowered
from .options import CompileOptions

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
TENSOR_BYTES = 320  # at most, of header, alignment and padding for one tensor of the weights file


@dataclass
class Formats:
    """`scheme(role, name)` for every matrix. ``chosen``: what a budget decided, by name."""

    options: CompileOptions
    keeps: Sequence[Keep]
    chosen: dict[str, Scheme] = field(default_factory=dict)

    @staticmethod
    def of(options: CompileOptions) -> Formats:
        return Formats(options, [parse_keep(text) for text in options.keep])

    def scheme(self, role: str, name: str) -> Scheme:
        """Kept formats first, then the budget's, then those of the role."""
        kept = keep_scheme(self.keeps, name, role)
        if kept is not None:
            return self._parsed(kept, role)
        return self.chosen.get(name) or self._by_role(role)

    def _by_role(self, role: str) -> Scheme:
        """8-bit embeddings and heads have one scale per row."""
        names = {"embedding": self.options.embedding_format, "head": self.options.head_format}
        name = names.get(role, self.options.linear_format)
        return self._parsed(name, role)

    def _parsed(self, text: str, role: str) -> Scheme:
        """A scheme's text, with the group and the zero points of the options where it leaves them unsaid."""
        numbers = FORMATS[text.strip().lower().split("-")[0]]
        group = self.options.group(numbers) if role == "linear" or numbers.default_group else 0
        return parse(text, group, not (numbers.integer and self.options.asymmetric and role == "linear"))

    def check(self, lowered: Lowered) -> None:
        """Raises GristmillError for a pattern that no matrix matches."""
        refuse_unmatched(self.keeps, lowered.roles)

    @property
    def has_budget(self) -> bool:
        return self.options.bits is not None or self.options.size is not None

    def choices(self) -> list[Scheme]:
        """The formats that a budget chooses among."""
        symmetric = not self.options.asymmetric
        return [Scheme(f.name, self.options.group(f), symmetric) for f in FORMATS.values() if f.integer]

    def choose(self, lowered: Lowered, costs: Mapping[str, Mapping[str, float]]) -> str:
        """Decide for the matrices that costs were measured for; returns the decision as a table."""
        open_names = [n for n in costs if keep_scheme(self.keeps, n, lowered.roles[n]) is None]
        shapes = {name: matrix.lazy.shape for name, matrix in lowered.matrices.items()}
        choices = [
            [Choice(s, self._bits(parse(s), *shapes[n]), cost) for s, cost in costs[n].items()]
            for n in open_names
        ]
        solution = solve(choices, self._budget(lowered, open_names))
        for name, matrix, index in zip(open_names, choices, solution.chosen, strict=True):
            self.chosen[name] = parse(matrix[index].scheme)
        return _table(open_names, shapes, choices, solution)

    def _bits(self, scheme: Scheme, n: int, k: int) -> int:
        if self.options.size is not None:
            return stored_bits(scheme, n, k)
        return matrix_bits(scheme.normalize(k), n, k)

    def _budget(self, lowered: Lowered, open_names: Sequence[str]) -> int:
        """Bits for the open matrices: what the others take is taken off."""
        others = {n: m for n, m in lowered.matrices.items() if n not in open_names}
        taken = sum(self._bits(m.scheme, *m.lazy.shape) for m in others.values())
        if self.options.size is not None:
            tensors = 3 * len(lowered.matrices) + len(lowered.vectors)
            vectors = sum(4 * math.prod(lazy.shape) for lazy in lowered.vectors.values())
            return budget_of_size(parse_size(self.options.size), vectors + tensors * TENSOR_BYTES) - taken
        assert self.options.bits is not None
        weights = sum(math.prod(m.lazy.shape) for m in lowered.matrices.values())
        return budget_of_bits(parse_bits(self.options.bits), weights) - taken


def stored_bits(scheme: Scheme, n: int, k: int) -> int:
    """All bits of a matrix [n, k] in the weights file, padded columns included."""
    tensors = stored_shapes("", n, k, scheme, np.float16)
    return 8 * sum(ITEM_BYTES[dtype] * math.prod(shape) for _, dtype, shape in tensors)


def _table(
    names: Sequence[str], shapes: Mapping[str, tuple[int, ...]], choices: Sequence[Sequence[Choice]],
    solution: Solution,
) -> str:  # fmt: skip
    return table(names, [math.prod(shapes[n]) for n in names], choices, solution)
