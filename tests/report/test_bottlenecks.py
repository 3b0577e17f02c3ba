"""Verdicts and remedies from made-up times, where the truth is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import tiny_program

from gristmill.report.bottlenecks import Timed, intercept, overheads, verdicts, works
from gristmill.report.judge import judged
from gristmill.report.remedies import Phase, changes, more_rows, remedies, with_remedies
from gristmill.report.schema import KindVerdict
from gristmill.runtime.profile import Forward, Roofs
from gristmill.runtime.program import Program

SLOW_MEMORY = Roofs(stream=1e3, floats=1e9, integers=4e9)
SLOW_UNITS = Roofs(stream=1e9, floats=1e3, integers=4e3)
SLACK = 1.25  # times its floor that every kind takes


def made(program: Program, forward: Forward, roofs: Roofs, each: float, around: float = 0.0) -> Timed:
    """A forward whose every instruction takes SLACK times its floor and ``each`` seconds more."""
    todo = works(program, forward)
    kinds = {name: SLACK * w.floor(roofs) + each * w.count for name, w in todo.items()}
    return Timed(forward, sum(kinds.values()) + around, kinds)


def decode(roofs: Roofs, each: float) -> tuple[Program, Timed, list[Timed]]:
    program = tiny_program()
    series = [made(program, forward, roofs, each) for forward in (Forward(1, 32), Forward(1, 2, 4))]
    return program, made(program, Forward(1, 2), roofs, each), series


def test_intercepts() -> None:
    assert intercept([(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]) == pytest.approx(3.0)
    assert intercept([(1.0, 1.0), (2.0, 2.5)]) == 0.0, "no time is less than none"
    assert intercept([(1.0, 5.0), (2.0, 5.0)]) == pytest.approx(5.0), "nothing of it grows"
    assert intercept([(1.0, 5.0), (1.2, 5.4)]) is None, "too alike to tell"
    assert intercept([(1.0, 5.0)]) is None and intercept([(0.0, 1.0), (1.0, 2.0)]) is None


@pytest.mark.parametrize("roofs", [SLOW_MEMORY, SLOW_UNITS])
@pytest.mark.parametrize("each", [0.0, 1e-3, 10.0])
def test_what_was_added_to_every_instruction_is_its_overhead(roofs: Roofs, each: float) -> None:
    program, base, series = decode(roofs, each)
    found = overheads(program, base, series, roofs)
    todo = works(program, base.forward)
    for name, value in found.items():
        assert value == pytest.approx(each * todo[name].count, rel=1e-6, abs=1e-9), name


def test_an_overhead_is_no_more_than_what_is_above_the_floor() -> None:
    program, base, series = decode(SLOW_MEMORY, 10.0)
    faster = replace(
        base, kinds={name: 0.5 * w.floor(SLOW_MEMORY) for name, w in works(program, base.forward).items()}
    )
    assert set(overheads(program, faster, series, SLOW_MEMORY).values()) == {0.0}


def test_products_show_their_overhead_by_their_sizes_alone() -> None:
    """The weights are the same whatever grows; the matrices of the program have three sizes."""
    program, base, series = decode(SLOW_MEMORY, 2.0)
    assert {w["linear qkv f32"].bytes for w in (works(program, t.forward) for t in series)} == {2048}
    found = overheads(program, base, series, SLOW_MEMORY)
    assert found["linear qkv f32"] == pytest.approx(2.0) == found["linear head f32"]


def test_verdicts_where_they_are_known() -> None:
    program, base, series = decode(SLOW_MEMORY, 1e-6)
    by_name = {kind.kind: kind for kind in verdicts(program, base, series, SLOW_MEMORY)}
    head = by_name["linear head f32"]
    assert head.verdict == "memory" and head.memory_floor == head.bytes / 1e3
    assert head.roof_share == pytest.approx(1 / SLACK, rel=1e-3) and head.error == pytest.approx(
        1 / SLACK - 1, rel=1e-3
    )
    program, base, series = decode(SLOW_UNITS, 1e-6)
    assert {
        k.verdict for k in verdicts(program, base, series, SLOW_UNITS) if k.kind.startswith("linear")
    } == {"compute"}
    program, base, series = decode(SLOW_MEMORY, 100.0)
    assert {kind.verdict for kind in verdicts(program, base, series, SLOW_MEMORY)} == {"overhead"}


@pytest.mark.parametrize(
    "roofs, each, around, communication, verdict",
    [
        (SLOW_MEMORY, 1e-6, 0.0, None, "memory"),
        (SLOW_UNITS, 1e-6, 0.0, None, "compute"),
        (SLOW_MEMORY, 100.0, 0.0, None, "overhead"),
        (SLOW_MEMORY, 1e-6, 1e4, None, "overhead"),
        (SLOW_MEMORY, 1e-6, 1e4, 1e4, "communication"),
    ],
)
def test_a_phase_is_bound_by_what_takes_most_of_it(
    roofs: Roofs, each: float, around: float, communication: float | None, verdict: str
) -> None:
    program, base, series = decode(roofs, each)
    base = replace(base, seconds=base.seconds + around)
    found = judged(program, "decode", base, series, [base], roofs, communication=communication)
    assert found.verdict == verdict
    assert found.communication == communication
    assert found.seconds == base.seconds and found.modelled == pytest.approx((1 + found.error) * base.seconds)
    assert found.growth[0].rows == 1 and found.growth[0].seconds == base.seconds
    assert found.read_bytes_s == roofs.stream
    assert max(found.kinds, key=lambda kind: kind.seconds) == found.kinds[0]


def test_a_phase_without_overhead_has_the_error_of_its_kernels() -> None:
    program, base, series = decode(SLOW_MEMORY, 0.0)
    found = judged(program, "decode", base, series, [], SLOW_MEMORY)
    assert found.error == pytest.approx(1 / SLACK - 1)
    assert found.overhead == pytest.approx(0.0, abs=1e-9 * found.seconds)
    assert "at the roof" in found.reason and "rows take" not in found.reason


DECODE, PREFILL = Forward(1, 2), Forward(8)


def phase(roofs: Roofs, each: float = 0.0, outside: float = 0.0, forward: Forward = DECODE) -> Phase:
    program = tiny_program()
    base = made(program, forward, roofs, each)
    others = (Forward(4), Forward(2)) if forward.rows > 1 else (replace(forward, sequences=4), Forward(1, 32))
    series = [made(program, other, roofs, each) for other in others]
    return Phase(program, forward, verdicts(program, base, series, roofs), roofs, outside)


def gains(given: Phase) -> dict[str, float]:
    return {remedy.name: remedy.gain for remedy in remedies(given)}


def test_narrower_weights_help_where_bytes_count() -> None:
    """16 columns of f32 take 64 bytes; of int8 a block of 64 and a scale, of int4 32 and a scale."""
    bound = phase(SLOW_MEMORY)
    found = gains(bound)
    assert "int8 weights" not in found, "rows this short become no shorter"
    linear = sum(k.seconds for k in bound.kinds if k.kind.startswith(("linear", "embedding")))
    assert found["int4 weights"] == pytest.approx(bound.seconds / (bound.seconds - linear * (1 - 34 / 64)))
    assert found["int4 weights"] > 1.5
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_narrower_weights_help_products_by_integers_where_there_are_any() -> None:
    bound = phase(SLOW_UNITS, forward=PREFILL)
    with_integers = next(change for change in changes(bound) if change.name == "int4 weights")
    head = next(kind for kind in bound.kinds if kind.kind == "linear head f32")
    assert with_integers.seconds(head) == pytest.approx(head.seconds / 4)
    floats = replace(bound, integer=False)
    without = next(change for change in changes(floats) if change.name == "int4 weights")
    assert without.seconds(head) == pytest.approx(head.seconds)


def test_a_narrower_cache_helps_attention() -> None:
    """A row of 8 columns: 32 bytes of f32, 8 + 16 of int8."""
    bound = phase(SLOW_MEMORY, forward=Forward(1, 8))
    attention = next(kind for kind in with_remedies(bound) if kind.kind.startswith("attention"))
    left = bound.seconds - attention.seconds / 4
    assert [(r.name, pytest.approx(r.gain)) for r in attention.remedies] == [
        ("int8 KV", bound.seconds / left)
    ]


def test_fusion_saves_what_has_no_weights_and_replay_what_is_around() -> None:
    bound = phase(SLOW_MEMORY, each=5.0, outside=7.0)
    found = gains(bound)
    values = sum(kind.seconds for kind in bound.kinds if kind.kind in ("rms_norm", "gather_rows"))
    assert found["fusion"] == pytest.approx(bound.seconds / (bound.seconds - values))
    assert found["graph replay"] == pytest.approx(bound.seconds / (bound.seconds - 7.0))
    assert "graph replay" not in gains(phase(SLOW_MEMORY))


def test_more_rows_share_the_weights() -> None:
    program, forward, roofs = tiny_program(), DECODE, SLOW_MEMORY
    bound = phase(roofs)
    eight = {
        name: SLACK * w.floor(roofs) for name, w in works(program, replace(forward, sequences=8)).items()
    }
    found = more_rows(bound, 8, {})
    assert found.gain == pytest.approx(8 * bound.seconds / sum(eight.values()), rel=1e-6)
    assert 2 < found.gain < 8
    measured = more_rows(bound, 8, {replace(forward, sequences=8): 2 * bound.seconds})
    assert measured.gain == found.gain and measured.rule.endswith("a gain of 4.00")
    assert gains(phase(SLOW_UNITS, forward=PREFILL)).get("more rows", 1.0) < 1.2, "nothing is shared there"


def test_kinds_without_time_divide_nothing() -> None:
    program, base, _ = decode(SLOW_MEMORY, 0.0)
    still = replace(base, kinds=dict.fromkeys(base.kinds, 0.0))
    found = judged(program, "decode", still, [], [], SLOW_MEMORY)
    assert all(isinstance(kind, KindVerdict) and kind.error == 0.0 for kind in found.kinds)
