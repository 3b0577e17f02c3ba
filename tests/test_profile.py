"""What an instruction has to read and to compute, and the roofs it is held to."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import HEAD, HEADS, VOCABULARY, WIDTH, tiny_artifact, tiny_program

from gristmill.runtime.cpu import _native
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.profile import Forward, Roofs, collect, kind_of, profile, work
from gristmill.runtime.session import load

ROOFS = Roofs(stream=100.0, floats=1000.0, integers=4000.0)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("integer", [False, True])
def test_arithmetic_peak(isa: str, integer: bool) -> None:
    assert _native.arithmetic_peak(isa, integer, 1, 0.0) > 0


def test_arithmetic_peak_refuses() -> None:
    with pytest.raises(GristmillError, match="isa 'sse9'"):
        _native.arithmetic_peak("sse9", True, 1, 0.0)
    with pytest.raises(GristmillError, match="0 threads"):
        _native.arithmetic_peak("auto", True, 0, 0.0)


def test_work_of_linears_and_embeddings() -> None:
    program = tiny_program()
    by_weight = {i.weight: i for i in program.instructions if i.weight}
    qkv = (HEADS + 2) * HEAD
    assert work(program, by_weight["qkv"], Forward(5, 3)) == (4 * qkv * WIDTH, 2 * 5 * qkv * WIDTH, False)
    assert work(program, by_weight["embed"], Forward(5, 3)) == (5 * 4 * WIDTH, 0, False)
    head = program.instructions[-1]
    assert work(program, head, Forward(5, 3)) == (
        4 * VOCABULARY * WIDTH,
        2 * VOCABULARY * WIDTH,
        False,
    )  # one row


@pytest.mark.parametrize(
    "window, rows, context, seen, reach",
    [
        (0, 1, 0, 1, 1), (0, 1, 9, 10, 10), (0, 3, 2, 3 + 4 + 5, 5),
        (4, 1, 9, 4, 4), (4, 3, 2, 3 + 4 + 4, 5), (4, 3, 9, 12, 6),
    ],
)  # fmt: skip
def test_work_of_attention(window: int, rows: int, context: int, seen: int, reach: int) -> None:
    """Every row attends to the positions up to its own, or to the last ones of its window."""
    program = tiny_program(window=window)
    attention = next(i for i in program.instructions if i.op == "attention")
    read, operations, integer = work(program, attention, Forward(rows, context))
    assert (read, operations) == (program.caches[0].row_bytes() * reach, 2 * HEADS * 2 * HEAD * seen)
    assert not integer
    twice = work(program, attention, Forward(rows, context, 2))
    assert twice == (2 * read, 2 * operations, False)


def test_floors_are_those_of_the_scarcer_resource() -> None:
    program = tiny_program()
    times = [1e6] * len(program.instructions)
    found = {kind.name: kind for kind in collect(program, times, ROOFS, Forward())}
    linear = found["linear qkv f32"]
    assert linear.floor == linear.bytes / 100  # 4 bytes a weight at 100/s against 2 operations at 1000/s
    many = {kind.name: kind for kind in collect(program, times, ROOFS, Forward(100))}["linear qkv f32"]
    assert many.floor == many.operations / 1000
    assert found["rms_norm"].bound == "overhead"


def test_layers_of_a_kind_are_one() -> None:
    program = tiny_program()
    linear = next(i for i in program.instructions if i.weight == "qkv")
    linear.weight = "model.layers.12.self_attn.q_proj"
    program.weights[linear.weight] = program.weights["qkv"]
    assert kind_of(program, linear) == "linear self_attn.q_proj f32"


def test_profile_of_a_session(tmp_path: Path) -> None:
    session = load(tiny_artifact(tmp_path / "a"), threads=2)
    found = profile(session, ROOFS, Forward(3, 5, 2), 2)
    assert sum(kind.count for kind in found.kinds) == len(session.program.instructions)
    assert found.seconds == pytest.approx(sum(kind.seconds for kind in found.kinds)) and found.seconds > 0
    assert [k.seconds for k in found.kinds] == sorted((k.seconds for k in found.kinds), reverse=True)
    with pytest.raises(GristmillError, match="max_len"):
        profile(session, ROOFS, Forward(3, 5000), 1)
