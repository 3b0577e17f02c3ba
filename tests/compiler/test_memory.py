"""The arena plan: values that are alive together never overlap."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.compiler.memory import ALIGNMENT, plan_arena
from gristmill.runtime.program import LOGITS, Instruction, Limits, Program, Value, View


@st.composite
def programs(draw):
    """Instructions that each write a fresh value and read some earlier ones, or columns of them."""
    widths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=12))
    values = [Value(draw(st.sampled_from("TR")), width) for width in widths]
    instructions = []
    for index, width in enumerate(widths):
        reads = draw(st.lists(st.integers(0, index - 1), max_size=3, unique=True)) if index else []
        views = [View(r, 0, draw(st.integers(1, widths[r]))) for r in reads]
        instructions.append(
            Instruction("pointwise", View(index, 0, width), {"in": views}, attributes={"steps": []})
        )
    last = View(len(widths) - 1, 0, widths[-1])
    instructions.append(Instruction("linear", View(LOGITS, 0, 9), {"in": last}, weight="head"))
    limits = Limits(max_tokens=draw(st.integers(1, 9)))
    return Program(9, limits, values=values, instructions=instructions)


def lifetimes(program):
    """Straight from the definition: from the writer to the last reader."""
    spans: dict[int, list[int]] = {}
    for step, instruction in enumerate(program.instructions):
        for view in [instruction.out, *instruction.reads()]:
            spans.setdefault(view.value, []).append(step)
    return {value: (min(steps), max(steps)) for value, steps in spans.items() if value != LOGITS}


@settings(max_examples=200, deadline=None)
@given(programs())
def test_live_values_do_not_overlap(program):
    plan_arena(program)
    spans, rows = lifetimes(program), program.limits.max_tokens
    placed = {v: (program.values[v].offset, program.values[v].width * 4 * rows) for v in spans}
    for offset, size in placed.values():
        assert offset % ALIGNMENT == 0
        assert offset + size <= program.arena_bytes
    for a, b in itertools.combinations(spans, 2):
        together = spans[a][0] <= spans[b][1] and spans[b][0] <= spans[a][1]
        apart = placed[a][0] + placed[a][1] <= placed[b][0] or placed[b][0] + placed[b][1] <= placed[a][0]
        assert apart or not together, (a, b, placed[a], placed[b])


def test_a_chain_needs_two_places():
    views = [View(i, 0, 16) for i in range(10)]
    steps = [
        Instruction("rms_norm", b, {"in": a}, attributes={"eps": 0.0}) for a, b in itertools.pairwise(views)
    ]
    first = Instruction("embedding", views[0], attributes={"ids": "tokens"}, weight="e")
    program = Program(
        9, Limits(max_tokens=4), values=[Value("T", 16) for _ in views], instructions=[first, *steps]
    )
    plan_arena(program)
    assert program.arena_bytes == 2 * 16 * 4 * 4
