"""The arena plan: where every value lies, so that values which are never alive together may share bytes."""

from __future__ import annotations

from ..runtime.program import LOGITS, Program

ALIGNMENT = 64


def plan_arena(program: Program) -> None:
    """Set the offset of every value and the program's arena_bytes, for max_tokens rows each.

    First fit in order of size, largest first: a value goes to the lowest offset where no value that is alive
    at the same time lies. Values are alive from the instruction that writes them to the last that reads them.
    """
    spans = _lifetimes(program)
    placed: list[tuple[int, int, tuple[int, int]]] = []
    sizes = [_aligned(v.width * 4 * program.limits.max_tokens) for v in program.values]
    for index in sorted(spans, key=lambda i: (-sizes[i], i)):
        offset = _lowest(sizes[index], spans[index], placed)
        program.values[index].offset = offset
        placed.append((offset, offset + sizes[index], spans[index]))
    program.arena_bytes = max((stop for _, stop, _ in placed), default=0)


def _lifetimes(program: Program) -> dict[int, tuple[int, int]]:
    spans: dict[int, tuple[int, int]] = {}
    for step, instruction in enumerate(program.instructions):
        for view in (*instruction.reads(), instruction.out):
            if view.value != LOGITS:
                first, _ = spans.get(view.value, (step, step))
                spans[view.value] = (first, step)
    return spans


def _lowest(size: int, span: tuple[int, int], placed: list[tuple[int, int, tuple[int, int]]]) -> int:
    offset = 0
    for start, stop, other in sorted(placed):
        if span[0] <= other[1] and other[0] <= span[1]:
            if offset + size <= start:
                break
            offset = max(offset, stop)
    return offset


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
