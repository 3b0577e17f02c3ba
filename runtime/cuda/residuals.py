"""Residuals to which products add in place.

The arena plan lets a product's result and its residual lie apart, and cuBLAS adds to what lies in its result:
a residual from elsewhere is copied there first, which moves as many bytes as the addition. So values that
follow each other as residual and result, each read for the last time when the next is written, share a place
behind the arena.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gristmill.runtime.program import Program, View

ALIGNMENT = 64  # bytes


@dataclass
class _Place:
    """Bytes of the arena that a chain of values has until instruction ``end``."""

    offset: int
    size: int
    end: int


def added_in_place(program: Program) -> Program:
    """The program with a larger arena, in which products overwrite the residuals that nothing reads later."""
    lifetimes = _lifetimes(program)
    made = replace(program, values=[replace(value) for value in program.values])
    places: list[_Place] = []
    for chain in _chains(program, lifetimes):
        begin, end = lifetimes[chain[0]][0], lifetimes[chain[-1]][1]
        size = program.limits.max_tokens * program.values[chain[0]].width * 4
        place = next((p for p in places if p.end < begin and p.size == size), None)
        if place is None:
            offset = -(-made.arena_bytes // ALIGNMENT) * ALIGNMENT
            place = _Place(offset, size, end)
            places.append(place)
            made.arena_bytes = offset + size
        place.end = end
        for value in chain:
            made.values[value].offset = place.offset
    return made


def _lifetimes(program: Program) -> dict[int, tuple[int, int]]:
    """Of each value the first and the last instruction that name it."""
    found: dict[int, tuple[int, int]] = {}
    for index, i in enumerate(program.instructions):
        for view in (*i.reads(), i.out):
            found[view.value] = (found.get(view.value, (index, index))[0], index)
    return found


def _chains(program: Program, lifetimes: dict[int, tuple[int, int]]) -> list[list[int]]:
    """Values of which each takes the place of the one before, in the order in which the first are written."""
    chain_of: dict[int, list[int]] = {}
    for index, i in enumerate(program.instructions):
        residual = i.views.get("residual")
        if isinstance(residual, View) and _takes_place(program, lifetimes, index, residual):
            chain = chain_of.setdefault(residual.value, [residual.value])
            chain.append(i.out.value)
            chain_of[i.out.value] = chain
    chains = {id(chain): chain for chain in chain_of.values()}
    return sorted(chains.values(), key=lambda chain: lifetimes[chain[0]])


def _takes_place(
    program: Program, lifetimes: dict[int, tuple[int, int]], index: int, residual: View
) -> bool:
    """Whether the instruction is a product whose result is first named where its residual is last, and of the
    same size."""
    i = program.instructions[index]
    if i.op != "linear" or not _is_whole(program, residual) or not _is_whole(program, i.out):
        return False
    if [view.value for view in i.reads()].count(residual.value) > 1:
        return False
    before, after = program.values[residual.value], program.values[i.out.value]
    alike = (before.rows, before.width) == (after.rows, after.width)
    return alike and lifetimes[residual.value][1] == index == lifetimes[i.out.value][0]


def _is_whole(program: Program, view: View) -> bool:
    known = 0 <= view.value < len(program.values)
    return known and view == View(view.value, 0, program.values[view.value].width)
