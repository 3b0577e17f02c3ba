"""Which scheme for which matrix when all of them together may take so many bits.

Every matrix has a few choices, each with its size in bits and its cost (how much worse the model gets); one
choice per matrix, the sizes within the budget, the sum of the costs least: a multiple-choice knapsack
(Kellerer, Pferschy, Pisinger, Knapsack Problems, chapter 11).

A multiplier λ, the price of one bit, takes the matrices apart: each by itself minimizes cost + λ bits. The
sum of these minima less λ × budget is a lower bound for every solution that fits, and the best λ is where the
greedy solution of the relaxed problem breaks off. That greedy solution, repaired to fit, is already near. The
rest is a dynamic program over (bits, cost) pairs that keeps only pairs which no other beats in both and whose
lower bound is below the best solution known: few survive, as the greedy gap is small, and the optimum is
exact. Should more than MOST_STATES survive, only some are kept, and the bound says how far the result can be
from the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.runtime.errors import GristmillError

MOST_STATES = 1 << 15
ROUNDING = 1e-12  # of the sum of all |costs|: two totals nearer than this are equal

Array = NDArray[Any]


@dataclass(frozen=True)
class Choice:
    """One way to store one matrix.

    scheme: such as `int4-g64`; bits: all it takes, scales included; cost: what it adds to the error, any unit
    that may be summed over matrices. Costs may be below zero, as measured ones are where nothing is lost.
    """

    scheme: str
    bits: int
    cost: float


@dataclass(frozen=True)
class Solution:
    """chosen: an index into each matrix's choices; bits, cost: their sums; budget: what bits may be.

    bound: no choice that fits costs less, up to rounding; exact: nothing was left out in the search, and cost
    is the optimum.
    """

    chosen: tuple[int, ...]
    bits: int
    cost: float
    budget: int
    bound: float
    exact: bool

    @property
    def gap(self) -> float:
        """How much below ``cost`` the optimum may lie: 0 when exact."""
        return 0.0 if self.exact else max(0.0, self.cost - self.bound)

    def __str__(self) -> str:
        proof = "the least possible" if self.exact else f"within {self.gap:.3g} of the least possible"
        return f"cost {self.cost:.4g}, {proof}, in {self.bits} of {self.budget} bits"


def solve(choices: Sequence[Sequence[Choice]], budget_bits: int, most_states: int = MOST_STATES) -> Solution:
    """The choice per matrix with the least sum of costs whose bits sum to at most ``budget_bits``.

    Among equal costs fewer bits win, then the order given: the same input gives the same result. Raises
    GristmillError where even the smallest choices are beyond the budget.
    """
    _check(choices, budget_bits)
    ladders = [_ladder(matrix) for matrix in choices]
    greedy, price = _greedy(choices, ladders, budget_bits)
    bound = _lower_bound(choices, price, budget_bits)
    found, exact = _search(choices, price, budget_bits, _total_cost(choices, greedy), bound, most_states)
    best = min(
        (solution for solution in (found, greedy) if solution is not None),
        key=lambda solution: (_total_cost(choices, solution), _total_bits(choices, solution)),
    )
    cost = _total_cost(choices, best)
    least = cost if exact else min(cost, bound)
    return Solution(tuple(best), _total_bits(choices, best), cost, budget_bits, least, exact)


def _check(choices: Sequence[Sequence[Choice]], budget: int) -> None:
    for number, matrix in enumerate(choices):
        assert matrix, f"matrix {number} has no choice"
        assert all(c.bits >= 0 and math.isfinite(c.cost) for c in matrix), f"matrix {number}: {matrix}"
    least = sum(min(c.bits for c in matrix) for matrix in choices)
    if least > budget:
        raise GristmillError(
            f"a budget of {budget} bits is too small: the smallest choices take {least} "
            f"({least / max(budget, 1):.4g} × as many); allow more bits or smaller formats"
        )


def _total_bits(choices: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> int:
    return sum(matrix[i].bits for matrix, i in zip(choices, chosen, strict=True))


def _total_cost(choices: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> float:
    """Summed exactly, so that the order of the matrices does not matter."""
    return math.fsum(matrix[i].cost for matrix, i in zip(choices, chosen, strict=True))


def frontier(matrix: Sequence[Choice]) -> list[int]:
    """Indices of the choices that no other beats in bits and cost: bits rise, costs fall.

    >>> frontier([Choice("int8", 8, 1.0), Choice("int4", 4, 2.0), Choice("worse", 5, 3.0)])
    [1, 0]
    """
    kept: list[int] = []
    for i in sorted(range(len(matrix)), key=lambda i: (matrix[i].bits, matrix[i].cost, i)):
        if not kept or matrix[i].cost < matrix[kept[-1]].cost:
            kept.append(i)
    return kept


def _ladder(matrix: Sequence[Choice]) -> list[int]:
    """The lower convex hull of the frontier: every step buys less per bit than the one before."""
    kept: list[int] = []
    for i in frontier(matrix):
        while len(kept) > 1 and _gain(matrix, kept[-1], i) >= _gain(matrix, kept[-2], kept[-1]):
            kept.pop()
        kept.append(i)
    return kept


def _gain(matrix: Sequence[Choice], cheap: int, dear: int) -> float:
    """Cost saved per bit by the dearer choice."""
    return (matrix[cheap].cost - matrix[dear].cost) / (matrix[dear].bits - matrix[cheap].bits)


def _greedy(
    choices: Sequence[Sequence[Choice]], ladders: Sequence[Sequence[int]], budget: int
) -> tuple[list[int], float]:
    """A solution that fits, and the price λ of a bit where the relaxed problem's solution breaks off.

    From the smallest choices up, always the step that saves most per bit; one that does not fit is left out
    together with the later steps of its matrix, and the rest go on.
    """
    chosen = [ladder[0] for ladder in ladders]
    left = budget - _total_bits(choices, chosen)
    steps = [
        (-_gain(choices[m], ladder[i], ladder[i + 1]), m, i)
        for m, ladder in enumerate(ladders)
        for i in range(len(ladder) - 1)
    ]
    price, stuck = 0.0, set()
    for negative_gain, m, i in sorted(steps):
        bits = choices[m][ladders[m][i + 1]].bits - choices[m][ladders[m][i]].bits
        if m in stuck or bits > left:
            price = price or -negative_gain
            stuck.add(m)
            continue
        chosen[m] = ladders[m][i + 1]
        left -= bits
    return chosen, price


def _least(matrix: Sequence[Choice], price: float) -> float:
    return min(c.cost + price * c.bits for c in matrix)


def _lower_bound(choices: Sequence[Sequence[Choice]], price: float, budget: int) -> float:
    """No solution within the budget costs less, whatever the price from 0."""
    return math.fsum(_least(matrix, price) for matrix in choices) - price * budget


@dataclass
class _States:
    """After some matrices [S]: bits beyond the smallest choices, cost, what was given away against the bound;
    parent: which state of the matrix before, choice: of this matrix.
    """

    bits: Array
    cost: Array
    given_away: Array
    parent: Array
    choice: Array

    def take(self, index: Array) -> _States:
        return _States(*(a[index] for a in vars(self).values()))


def _search(
    choices: Sequence[Sequence[Choice]], price: float, budget: int, best: float, bound: float, most: int
) -> tuple[list[int] | None, bool]:
    """The dynamic program: the best solution among the states kept, and whether none was left out.

    Against the minima at ``price`` every choice gives something away. A state that has given away more than
    ``best`` - ``bound`` cannot lead to anything better than ``best``.
    """
    slack = ROUNDING * math.fsum(max(abs(c.cost) for c in matrix) for matrix in choices)
    allowed = best - bound + slack
    smallest = [min(c.bits for c in matrix) for matrix in choices]
    room = budget - sum(smallest)  # for what is above the smallest choices
    states = _States(np.zeros(1, np.int64), *np.zeros((2, 1)), *np.zeros((2, 1), np.int32))
    steps: list[tuple[Array, Array]] = []
    exact = True
    for matrix, base in zip(choices, smallest):
        states = _undominated(_extend(states, matrix, base, price), room, allowed)
        if len(states.bits) > most:
            exact = False
            states = states.take(np.sort(np.argsort(states.given_away, kind="stable")[:most]))
        if not len(states.bits):
            return None, exact
        steps.append((states.parent, states.choice))
    return _trace_back(steps, len(states.bits) - 1), exact


def _extend(states: _States, matrix: Sequence[Choice], base: int, price: float) -> _States:
    """Every state with every undominated choice of the next matrix."""
    indices = frontier(matrix)
    least = _least(matrix, price)
    extra = np.array([matrix[i].bits - base for i in indices], np.int64)
    costs = np.array([matrix[i].cost for i in indices])
    reduced = np.array([matrix[i].cost + price * matrix[i].bits - least for i in indices])
    count = len(states.bits)
    return _States(
        (states.bits[:, None] + extra).ravel(),
        (states.cost[:, None] + costs).ravel(),
        (states.given_away[:, None] + reduced).ravel(),
        np.repeat(np.arange(count, dtype=np.int32), len(indices)),
        np.tile(np.array(indices, np.int32), count),
    )


def _undominated(states: _States, room: int, allowed: float) -> _States:
    """The states worth keeping, bits rising and costs falling; of equal ones the first."""
    fits = np.flatnonzero((states.bits <= room) & (states.given_away <= allowed))
    order = fits[np.lexsort((fits, states.cost[fits], states.bits[fits]))]
    cost = states.cost[order]
    before = np.minimum.accumulate(np.concatenate([[np.inf], cost]))[:-1]
    return states.take(order[cost < before])


def _trace_back(steps: Sequence[tuple[Array, Array]], last: int) -> list[int]:
    """The choices that lead to state ``last``: the cheapest one, as costs fall while bits rise."""
    chosen: list[int] = []
    for parent, choice in reversed(steps):
        chosen.append(int(choice[last]))
        last = int(parent[last])
    return chosen[::-1]


def table(
    names: Sequence[str], weights: Iterable[int], choices: Sequence[Sequence[Choice]], solution: Solution
) -> str:
    """A line per matrix: scheme, bits per weight, cost, and what the neighbouring choices would change.

    weights: how many each matrix has. The last line sums up and says how good the solution is.
    """
    counts = list(weights)
    rows = [("matrix", "scheme", "bits/weight", "cost", "next smaller", "next larger")]
    for name, count, matrix, i in zip(names, counts, choices, solution.chosen, strict=True):
        smaller, larger = _neighbours(matrix, i)
        c = matrix[i]
        rows.append((name, c.scheme, f"{c.bits / count:.3f}", f"{c.cost:.3g}", smaller, larger))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    total = f"{solution.bits / max(sum(counts), 1):.3f} bits per weight: {solution}"
    return "\n".join([*lines, total])


def _neighbours(matrix: Sequence[Choice], i: int) -> tuple[str, str]:
    """What the next smaller and the next larger choice on the frontier are, and what they would change."""
    kept = frontier(matrix)
    smaller = [j for j in kept if matrix[j].bits < matrix[i].bits]
    larger = [j for j in kept if matrix[j].bits > matrix[i].bits]
    return _change(matrix, i, smaller[-1:]), _change(matrix, i, larger[:1])


def _change(matrix: Sequence[Choice], i: int, other: Sequence[int]) -> str:
    if not other:
        return "-"
    here, there = matrix[i], matrix[other[0]]
    bits = f"{100 * (there.bits / here.bits - 1):+.0f} % bits" if here.bits else f"{there.bits:+d} bits"
    return f"{there.scheme} ({bits}, {there.cost - here.cost:+.2g})"
