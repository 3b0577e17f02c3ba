"""The token at every position of every slot, and from it the tokens that a row has behind it.

A repetition penalty is for the tokens that a sequence holds already. They are looked up anew for each draw: a
slot that is rolled back or copied needs no care then, and 4 bytes for each position are next to nothing
beside its keys and values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def _record_kernel(tokens, positions, slots, history, stride, rows, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = t < rows
    slot = tl.load(slots + t, here, 0).to(tl.int64)
    position = tl.load(positions + t, here, 0)
    tl.store(history + slot * stride + position, tl.load(tokens + t, here, 0), here)


def record(tokens: Tensor, positions: Tensor, slots: Tensor, history: Tensor) -> None:
    """history[slots[t], positions[t]] = tokens[t]. tokens, positions, slots: [T] i32; history: [S, L] i32.

    Rows at one place, as those that fill up a bucket are, leave one of their tokens there.
    """
    rows = len(tokens)
    grid = (triton.cdiv(rows, BLOCK),)
    _record_kernel[grid](tokens, positions, slots, history, history.stride(0), rows, BLOCK=BLOCK)


@triton.jit
def _clear_kernel(penalty, seen, vocabulary, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    if tl.load(penalty + r) != 1.0:
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(seen + r * vocabulary + at, tl.zeros((BLOCK,), tl.int8), at < vocabulary)


@triton.jit
def _mark_kernel(
    history, rows, positions, slots, penalty, seen, stride, vocabulary,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    if tl.load(penalty + r) != 1.0:
        row = tl.load(rows + r)
        slot, last = tl.load(slots + row).to(tl.int64), tl.load(positions + row)
        for start in range(tl.program_id(1) * BLOCK, last + 1, STEP):
            position = start + tl.arange(0, BLOCK)
            token = tl.load(history + slot * stride + position, position <= last, 0)
            tl.store(seen + r * vocabulary + token, tl.full((BLOCK,), 1, tl.int8), position <= last)


MARKING = 8  # programs that share a row's positions


def mark_seen(
    history: Tensor, rows: Tensor, positions: Tensor, slots: Tensor, penalty: Tensor, seen: Tensor
) -> None:
    """seen[r] = 1 for the tokens of row rows[r]'s slot up to its position, 0 for others.

    history: [S, L] i32; rows: [R] i32; positions, slots: [T] i32; seen: [R, V] i8. Where penalty [R] f32 is 1
    nothing is asked for, and nothing written.
    """
    count, vocabulary = seen.shape
    _clear_kernel[(count, triton.cdiv(vocabulary, 8 * BLOCK))](penalty, seen, vocabulary, BLOCK=8 * BLOCK)
    _mark_kernel[(count, MARKING)](
        history, rows, positions, slots, penalty, seen, history.stride(0), vocabulary,
        STEP=MARKING * BLOCK, BLOCK=BLOCK,
    )  # fmt: skip
