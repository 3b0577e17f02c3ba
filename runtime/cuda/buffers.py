"""Memory that lives as long as the executor: values, logits, and the ids of a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import LOGITS, Program, View

LOGIT_ROWS = 64  # at 128,000 tokens 31 MiB; all 512 rows of a batch would be 250
IDS = ("tokens", "positions", "slots", "rows")


class Values:
    """Every value of the program as columns of rows in one arena, at the offsets of its memory plan.

    Of the logits there are ``logit_rows`` rows; where more are asked for they are computed in pieces.
    """

    def __init__(self, program: Program, device: torch.device, logit_rows: int = LOGIT_ROWS) -> None:
        most = program.limits.max_tokens
        self.arena = torch.zeros(program.arena_bytes // 4, device=device)
        self.logits = torch.zeros(min(most, logit_rows), program.vocabulary, device=device)
        self._values = {LOGITS: self.logits}
        for index, value in enumerate(program.values):
            begin, size = value.offset // 4, most * value.width
            if value.offset % 4 or value.offset < 0 or begin + size > self.arena.numel():
                raise _malformed(f"value {index} lies outside the arena of {program.arena_bytes} bytes")
            self._values[index] = self.arena[begin : begin + size].view(most, value.width)
        for n, instruction in enumerate(program.instructions):
            for view in (instruction.out, *instruction.reads()):
                self._check(view, n)
            if any(view.value == LOGITS for view in instruction.reads()):
                raise _malformed(f"instruction {n} reads the logits")

    def _check(self, view: View, n: int) -> None:
        whole = self._values.get(view.value)
        if whole is None or view.column < 0 or not 0 < view.width <= whole.shape[1] - view.column:
            raise _malformed(f"instruction {n} names {view}, which no value holds")

    def view(self, view: View, rows: int, first: int = 0) -> Tensor:
        """``rows`` rows of a view from ``first`` on, [rows, width] f32."""
        return self._values[view.value][first : first + rows, view.column : view.column + view.width]


def _malformed(what: str) -> GristmillError:
    return GristmillError(f"program.json: {what}; compile the model again")


class Batch:
    """The ids of a batch, i32, filled on the host and sent to the device in one copy."""

    def __init__(self, max_tokens: int, scratch_slot: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.max_tokens = max_tokens
        self._host = torch.zeros(len(IDS), max_tokens, dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros_like(self._host, device=device)
        self._scratch = scratch_slot

    def fill(self, given: dict[str, np.ndarray]) -> None:
        """Rows beyond the given ones: token 0 at position 0 of the scratch slot, logits of row 0."""
        self._host.zero_()
        self._host[IDS.index("slots")] = self._scratch
        for name, values in given.items():
            self._host[IDS.index(name), : len(values)] = torch.from_numpy(np.ascontiguousarray(values))
        self._device.copy_(self._host, non_blocking=True)

    def host(self, name: str, rows: int) -> Tensor:
        return self._host[IDS.index(name), :rows]

    def ids(self, name: str, rows: int, first: int = 0) -> Tensor:
        """[rows] i32 on the device, from row ``first`` on."""
        return self._device[IDS.index(name), first : first + rows]
