"""What a product leaves ready for the next one, instead of kernels between the two.

Between two products of few rows there is often a norm, and the rounding of its result to int8. Each would be
a kernel that runs for a microsecond and waits longer for the one ahead of it. Both follow group by group:

    rms_norm        h = x w / rms,  rms = sqrt(sum x^2 / k + eps)         (arXiv 1910.07467, eq. 4)
    W h             = (W (x w)) / rms: a row of the result is divided at its end
    int8 of h       s = max |x w| / 127 of a group,  q = round(x w / s),  and W h = (W (q s)) / rms

so of a group of columns only its own x is needed, and of the others a sum of squares, which the next product
adds up. Programs of the product ahead count themselves in, group by group; the last one of a group prepares
it. What it computes does not depend on which of them that is. GRISTMILL_HANDOVER=0 leaves it all to kernels
of their own, to be compared.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .matrix import padded
from .quantize import Quantized, store_groups

FLOAT_GROUP = 128  # columns whose squares are added up, where nothing is quantized
VARIABLE = "GRISTMILL_HANDOVER"


@dataclass(frozen=True)
class Prepared:
    """A product's input as the kernels ahead left it, instead of x [T, k].

    quantized: x as int8; floats: x [T, k] f32; squares: [T, groups] f32, of what x was before the norm's
    weight sums of squares by groups, divided by k: the product's rows are to be divided by sqrt(sum + eps).
    None for what is not so.
    """

    quantized: Quantized | None = None
    floats: Tensor | None = None
    squares: Tensor | None = None
    eps: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """Of a kernel that multiplies it, for `row_factor`."""
        count = 0 if self.squares is None else self.squares.shape[1]
        return {
            "squares": self.squares, "square_count": count, "eps": self.eps,
            "SQUARES": triton.next_power_of_2(count) if count else 0,
        }  # fmt: skip


@dataclass(frozen=True)
class Handover:
    """What a product writes beside its result.

    to: the next product's input; group: columns that are prepared together; weight: of the norm between the
    two, [k] of any float type; counters: i32, zeros, one for each group and tile of tokens.
    """

    to: Prepared
    group: int
    weight: Tensor | None
    counters: Tensor

    def arguments(self) -> dict[str, Any]:
        """Of a kernel that writes it."""
        q = self.to.quantized
        return {
            "next_q": q and q.q, "next_scale": q and q.scale, "next_floats": self.to.floats,
            "next_squares": self.to.squares, "next_weight": self.weight, "counters": self.counters,
            "NEXT_GROUP": self.group,
        }  # fmt: skip


NOTHING: dict[str, Any] = {
    "next_q": None, "next_scale": None, "next_floats": None, "next_squares": None, "next_weight": None,
    "counters": None, "NEXT_GROUP": 0,
}  # fmt: skip


def is_whole(group: int, k: int) -> bool:
    """Whether groups of k columns fill all that is stored of them."""
    return padded(k) <= -(-k // group) * group


def is_wanted() -> bool:
    """Whether products hand over at all."""
    return os.environ.get(VARIABLE) != "0"


@triton.jit
def row_factor(squares, count, eps, token, tokens, SQUARES: tl.constexpr):
    """1 / rms of each token, [T]."""
    group = tl.arange(0, SQUARES)[None, :]
    there = (token < tokens)[:, None] & (group < count)
    parts = tl.load(squares + token.to(tl.int64)[:, None] * count + group, there, 0.0)
    return 1.0 / tl.sqrt_rn(tl.sum(parts, 1) + eps)


@triton.jit
def prepare(
    x, token, group, there, n, q, scale, floats, squares, weight, GROUP: tl.constexpr
):  # fmt: skip
    """x [A, GROUP] f32, zero beyond n: groups ``group`` [A] of rows ``token`` [A], where ``there`` [A]."""
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = there[:, None] & (column < n)
    groups = (n + GROUP - 1) // GROUP
    token = token.to(tl.int64)
    if squares is not None:
        tl.store(squares + token * groups + group, tl.sum(x * x, 1) / n, there)
    if weight is not None:
        x *= tl.load(weight + column, column < n, 0.0).to(tl.float32)
    if floats is not None:
        tl.store(floats + token[:, None] * n + column, x, inside)
    if q is not None:
        store_groups(x, group, token, there, q, scale, n)


@triton.jit
def hand_over(
    out, ldo, tile, token, tokens, n, q, scale, floats, squares, weight, counters,
    COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Counts this program in, whose ``tile`` of COLUMNS columns of out is stored; the last one of a group
    prepares it for the tokens [T]."""
    share: tl.constexpr = GROUP // COLUMNS
    group = tile // share
    programs = tl.minimum(tl.cdiv(n, COLUMNS) - group * share, share)
    counter = counters + tl.program_id(2) * tl.cdiv(n, GROUP) + group
    tl.debug_barrier()  # every thread has stored before one of them counts
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(counter, 0)  # for the next kernel
        column = group * GROUP + tl.arange(0, GROUP)
        there = token < tokens
        at = out + token.to(tl.int64)[:, None] * ldo + column[None, :]
        x = tl.load(at, there[:, None] & (column < n)[None, :], 0.0, cache_modifier=".cg").to(tl.float32)
        prepare(x, token, token * 0 + group, there, n, q, scale, floats, squares, weight, GROUP)
