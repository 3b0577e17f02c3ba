"""The tokens that rows have behind them, in Triton."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from triton_device import DEVICE, generator, on_device  # noqa: F401  (the fixture is for all)

from gristmill.kernels.triton.history import BLOCK, MARKING, mark_seen, record


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_tokens_are_recorded_at_their_places() -> None:
    history = torch.full((3, 7), -1, dtype=torch.int32)
    record(ints([5, 6, 9]), ints([2, 3, 0]), ints([1, 1, 2]), history)
    assert history.tolist() == [[-1] * 7, [-1, -1, 5, 6, -1, -1, -1], [9] + [-1] * 6]
    rows = BLOCK + 5
    long = torch.zeros(1, rows, dtype=torch.int32)
    record(torch.arange(rows).int(), torch.arange(rows).int(), torch.zeros(rows).int(), long)
    assert torch.equal(long[0], torch.arange(rows).int())


def test_a_row_sees_its_slot_up_to_its_position() -> None:
    vocabulary, length = 9000, MARKING * BLOCK + 300  # more than one step of either kernel
    history = torch.randint(0, vocabulary, (2, length), generator=generator(0), dtype=torch.int32)
    positions, slots = ints([length - 1, 0, 40, 2]), ints([0, 1, 1, 0])
    rows, penalty = ints([2, 0, 3, 1]), torch.tensor([1.5, 0.5, 1.0, 2.0])
    seen = torch.full((4, vocabulary), 7, dtype=torch.int8)
    mark_seen(history, rows, positions, slots, penalty, seen)
    for r, row in enumerate(rows.tolist()):
        expected = torch.zeros(vocabulary, dtype=torch.int8)
        expected[history[slots[row], : positions[row] + 1].long()] = 1
        assert torch.equal(seen[r], torch.full_like(expected, 7) if r == 2 else expected)
