"""Products that add to their residual in place: where values lie, and that nothing comes out otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from interpreter import Reference
from programs import Format, llama
from programs import Program as Made

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from cuda_cases import (  # noqa: F401  (the fixture is for all)
    CASES,
    FEW_TOLERANCE,
    MANY_TOLERANCE,
    a_small_gpu,
    assert_close,
    in_chunks,
    make,
    tokens_for,
)

from gristmill.runtime.cuda.residuals import added_in_place
from gristmill.runtime.program import Program

SIZE = 8 * 64 * 4  # of a value of 8 rows of 64 columns


def made(form: str = "f32", layers: int = 2) -> Made:
    """As the compiler writes programs: every result is a value of its own."""
    program = llama(dataclasses.replace(CASES["f32"], form=Format(form), layers=layers))
    number: dict[int, int] = {}
    for i in program.json["instructions"]:
        for name in ("in", "residual", "q", "k", "v"):
            if name in i:
                i[name] = [number.get(i[name][0], i[name][0]), *i[name][1:]]
        if i.get("residual") and i["out"][0] == i["residual"][0] or i["out"][0] in number:
            number[i["out"][0]] = program.value(64)[0]
            i["out"] = [number[i["out"][0]], *i["out"][1:]]
    return program


def offsets(program: Program) -> list[int]:
    return [value.offset for value in program.values]


def test_a_chain_of_residuals_has_one_place() -> None:
    program = Program.from_json(made().json)
    chain = [i.out.value for i in program.instructions if i.op == "embedding" or "residual" in i.views]
    assert len(set(chain)) == 5
    placed = added_in_place(program)
    assert placed.arena_bytes == program.arena_bytes + SIZE
    for value, (before, after) in enumerate(zip(offsets(program), offsets(placed), strict=True)):
        assert after == (program.arena_bytes if value in chain else before)


def test_what_is_read_later_keeps_its_place() -> None:
    """The embedding is added to the first layer's end as well, which ends its chain before it begins."""
    program = Program.from_json(made().json)
    chain = [i.out.value for i in program.instructions if i.op == "embedding" or "residual" in i.views]
    norm = next(n for n, i in enumerate(program.instructions) if n > 4 and i.op == "rms_norm")
    program.instructions[norm].views["residual"] = program.instructions[0].out
    placed = offsets(added_in_place(program))
    assert placed[chain[0]] == offsets(program)[chain[0]]
    assert {placed[value] for value in chain[1:]} == {program.arena_bytes}


def test_chains_that_follow_each_other_share_a_place() -> None:
    program = Program.from_json(made().json)
    chain = [i.out.value for i in program.instructions if i.op == "embedding" or "residual" in i.views]
    middle = next(i for i in program.instructions if i.out.value == chain[3])
    middle.views.pop("residual")
    placed = added_in_place(program)
    assert placed.arena_bytes == program.arena_bytes + SIZE
    assert {placed.values[value].offset for value in chain} == {program.arena_bytes}


@pytest.mark.parametrize("form", ["f32", "bf16"])
def test_results_are_those_of_values_apart(form: str, tmp_path: Path) -> None:
    """In 7 rows bf16 is multiplied by cuBLAS, f32 on the device's own; one row by splits of k."""
    program = made(form)
    executor = make(program, tmp_path)
    assert offsets(executor._program) != [value["offset"] for value in program.json["values"]]
    tokens = tokens_for(program, 9)
    expected = in_chunks(Reference(program), tokens, [7, 1, 1])
    tolerance = FEW_TOLERANCE["f32"] if form == "f32" else MANY_TOLERANCE
    assert_close(in_chunks(executor, tokens, [7, 1, 1]), expected, tolerance)
