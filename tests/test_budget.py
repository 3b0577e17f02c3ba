"""budget: the choice of schemes against trying all of them."""

import itertools
import random
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gristmill.quant.budget import Choice, frontier, solve, table
from gristmill.runtime.errors import GristmillError

TOLERANCE = 1e-9  # of the sum of |costs|
SIZES = st.one_of(st.integers(0, 12), st.integers(0, 10**12))
COSTS = st.one_of(st.integers(-3, 9).map(float), st.floats(-1e6, 1e6), st.floats(0, 1e-6))
MATRICES = st.lists(
    st.lists(st.builds(Choice, st.just("x"), SIZES, COSTS), min_size=1, max_size=4), min_size=0, max_size=5
)


def brute_force(choices, budget):
    """(cost, bits) of the best choice, None when nothing fits."""
    sums = (
        (sum(c.cost for c in picked), sum(c.bits for c in picked)) for picked in itertools.product(*choices)
    )
    return min((s for s in sums if s[1] <= budget), default=None)


def check(choices, budget, solution):
    """The solution is what it says it is; returns the tolerance of its costs."""
    picked = [matrix[i] for matrix, i in zip(choices, solution.chosen, strict=True)]
    slack = TOLERANCE * sum(max(abs(c.cost) for c in matrix) for matrix in choices)
    assert solution.bits == sum(c.bits for c in picked) <= budget == solution.budget
    assert abs(solution.cost - sum(c.cost for c in picked)) <= slack
    assert solution.bound <= solution.cost
    return slack


@settings(max_examples=500, deadline=None)
@given(MATRICES, st.floats(0, 1))
@example([], 0.5)
@example([[Choice("a", 5, 1.0), Choice("b", 5, 1.0)]], 1.0)
def test_the_optimum_is_found(choices, share):
    least, most = (sum(pick(c.bits for c in matrix) for matrix in choices) for pick in (min, max))
    budget = least + int(share * (most - least))
    best = brute_force(choices, budget)
    assert best is not None
    solution = solve(choices, budget)
    slack = check(choices, budget, solution)
    assert solution.exact
    assert abs(solution.cost - best[0]) <= slack
    assert solution.gap == 0.0


@settings(max_examples=300, deadline=None)
@given(MATRICES, st.floats(0, 1), st.integers(1, 3))
def test_the_bound_holds_when_states_are_left_out(choices, share, most_states):
    least, most = (sum(pick(c.bits for c in matrix) for matrix in choices) for pick in (min, max))
    budget = least + int(share * (most - least))
    best = brute_force(choices, budget)
    assert best is not None
    solution = solve(choices, budget, most_states)
    slack = check(choices, budget, solution)
    assert solution.bound - slack <= best[0] <= solution.cost + slack
    if solution.exact:
        assert abs(solution.cost - best[0]) <= slack


def test_equal_costs_take_fewer_bits_and_the_first():
    choices = [[Choice("a", 8, 1.0), Choice("b", 4, 1.0), Choice("c", 4, 1.0)]] * 2
    assert solve(choices, 100).chosen == (1, 1)
    assert solve(choices, 100).bits == 8


def test_a_step_that_greedy_takes_too_early_is_taken_back():
    """One bit cheaper per cost, but it keeps the better pair from fitting."""
    choices = [
        [Choice("s", 0, 10.0), Choice("l", 6, 0.0)],
        [Choice("s", 0, 8.0), Choice("l", 5, 0.0)],
        [Choice("s", 0, 8.0), Choice("l", 5, 0.0)],
    ]
    solution = solve(choices, 10)
    assert (solution.chosen, solution.cost) == ((0, 1, 1), 10.0)


def model(matrices, seed=0):
    """Matrices of a few shapes at six formats each; an error falls by about four per bit."""
    draw = random.Random(seed)
    sizes = [draw.choice([2048 * 2048, 2048 * 256, 2048 * 5632]) for _ in range(matrices)]
    return [
        [
            Choice(f"int{bits}", int(n * (bits + 0.125)), draw.lognormvariate(0, 1) * n * 4.0**-bits)
            for bits in (2, 3, 4, 5, 6, 8)
        ]
        for n in sizes
    ]


def test_a_model_of_two_hundred_matrices():
    choices = model(224)
    weights = sum(matrix[-1].bits for matrix in choices) / 8.125
    start = time.process_time()
    solution = solve(choices, int(3.5 * weights))
    assert time.process_time() - start < 20
    check(choices, int(3.5 * weights), solution)
    assert solution.gap <= 1e-4 * solution.cost
    uniform = sum(matrix[1].cost for matrix in choices)  # int3 throughout: 3.125 bits
    assert solution.cost < uniform
    assert solve(choices, int(3.5 * weights)) == solution


def test_no_two_sizes_equal():
    """Nothing is dominated by luck: sizes drawn one by one."""
    draw = random.Random(1)
    choices = [
        [Choice(str(b), draw.randrange(1, 10**9) * b, draw.random() * 4.0**-b) for b in (2, 3, 4, 8)]
        for _ in range(60)
    ]
    budget = sum(sorted(c.bits for c in matrix)[1] for matrix in choices)
    solution = solve(choices, budget, most_states=2000)
    check(choices, budget, solution)
    assert solution.gap <= 0.01 * solution.cost


def test_a_budget_below_the_smallest_choices():
    with pytest.raises(GristmillError, match=r"budget of 7 bits is too small: the smallest choices take 8 "):
        solve([[Choice("a", 8, 1.0), Choice("b", 9, 0.0)]], 7)


def test_frontier():
    matrix = [Choice("a", 8, 1.0), Choice("b", 4, 2.0), Choice("c", 4, 1.5), Choice("d", 9, 1.0)]
    assert frontier(matrix) == [2, 0]


def test_table():
    choices = [
        [Choice("int4", 1000, 0.5), Choice("int8", 2000, 0.125)],
        [Choice("int4", 4000, 0.25), Choice("int3", 3000, 1.0), Choice("int8", 9000, 0.0)],
    ]
    lines = table(["model.a", "b"], [250, 1000], choices, solve(choices, 6500)).splitlines()
    assert lines == [
        "matrix   scheme  bits/weight  cost   next smaller              next larger",
        "model.a  int8    8.000        0.125  int4 (-50 % bits, +0.38)  -",
        "b        int4    4.000        0.25   int3 (-25 % bits, +0.75)  int8 (+125 % bits, -0.25)",
        "4.800 bits per weight: cost 0.375, the least possible, in 6000 of 6500 bits",
    ]


def test_a_solution_that_is_not_exact_says_how_far_it_may_be_off():
    choices = model(40)
    budget = int(0.4 * sum(matrix[-1].bits for matrix in choices))
    solution = solve(choices, budget, most_states=1)
    assert not solution.exact
    assert f"within {solution.gap:.3g} of the least possible" in str(solution)
