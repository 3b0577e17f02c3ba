"""Tokens drawn from the logits on the device: the options of rows, room for kernels, what each slot holds.

Greedy rows take two launches and others nineteen; each is a graph of its own for every captured bucket, which
follows the batch's graph in the stream, so that a batch is captured once however its tokens are drawn.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gristmill.kernels.triton.history import mark_seen, record
from gristmill.kernels.triton.sampling import Options, allocate_workspace, sample, workspace_bytes
from gristmill.runtime.cuda.buffers import Batch
from gristmill.runtime.decoding.draws import Draws

MAX_VOCABULARY = 1 << 20  # that the kernels count exactly
LONGS, INTS = ("seed", "sequence"), ("top_k", "position")
FLOATS = ("temperature", "top_p", "penalty")
WORDS = 2 * len(LONGS) + len(INTS) + len(FLOATS)  # of 32 bits, for each row


def drawing_bytes(rows: int, vocabulary: int, max_len: int, max_slots: int) -> int:
    """Bytes on the device that a Drawing takes."""
    rows = rows if vocabulary <= MAX_VOCABULARY else 0
    history, seen = 4 * (max_slots + 1) * max_len, rows * vocabulary
    return workspace_bytes(rows, vocabulary) + history + seen + 4 * rows * (WORDS + 1)


class Drawing:
    """Draws for up to as many rows at once as ``logits`` [rows, V] has; none from too large a vocabulary."""

    def __init__(self, batch: Batch, logits: Tensor, max_len: int, max_slots: int) -> None:
        device, (rows, vocabulary) = logits.device, logits.shape
        rows = rows if vocabulary <= MAX_VOCABULARY else 0
        self._batch, self._logits = batch, logits
        self._history = torch.zeros(max_slots + 1, max_len, dtype=torch.int32, device=device)
        self._seen = torch.zeros(rows, vocabulary, dtype=torch.int8, device=device)
        self._workspace = allocate_workspace(rows, vocabulary, device)
        pinned = device.type == "cuda"
        self._host = torch.zeros(WORDS * rows, dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros_like(self._host, device=device)
        self._given, self._options = _cut(self._host, rows), _cut(self._device, rows)
        self._tokens = torch.zeros(rows, dtype=torch.int32, device=device)
        self._drawn = torch.zeros(rows, dtype=torch.int32, pin_memory=pinned)

    def record(self, count: int) -> None:
        """Launches what remembers the tokens of a batch of ``count`` rows."""
        tokens, positions, slots = (self._batch.ids(n, count) for n in ("tokens", "positions", "slots"))
        record(tokens, positions, slots, self._history)

    def copy_slot(self, source: int, target: int, length: int, start: int) -> None:
        self._history[target, start:length].copy_(self._history[source, start:length])

    def fill(self, draws: Draws) -> None:
        """Sends the options; rows beyond the given ones are greedy."""
        self._host.zero_()
        self._given["penalty"].fill_(1.0)
        for name, values in self._given.items():
            given = np.ascontiguousarray(getattr(draws, name))
            given = given.view(np.int64) if name in LONGS else given
            values[: len(draws)] = torch.from_numpy(given)
        self._device.copy_(self._host, non_blocking=True)

    def launch(self, first: int, count: int, greedy: bool) -> None:
        """Launches the draws from the first ``count`` logits, which are of the rows from ``first`` on."""
        seen, options = None, Options(**{name: values[:count] for name, values in self._options.items()})
        if not greedy:
            seen, rows = self._seen[:count], self._batch.ids("rows", count, first)
            most = self._batch.max_tokens
            positions, slots = self._batch.ids("positions", most), self._batch.ids("slots", most)
            mark_seen(self._history, rows, positions, slots, options.penalty, seen)
        sample(self._logits[:count], options, self._workspace, self._tokens[:count], seen, greedy)

    def read(self, count: int) -> np.ndarray:
        """[count] i32, on the host once the stream has come here: -1 where logits are not finite."""
        self._drawn[:count].copy_(self._tokens[:count], non_blocking=True)
        if self._tokens.is_cuda:
            torch.cuda.current_stream().synchronize()
        return np.array(self._drawn[:count].numpy())


def _cut(words: Tensor, rows: int) -> dict[str, Tensor]:
    """The fields of `Options`, all rows of one after all rows of another."""
    longs = words[: 2 * len(LONGS) * rows].view(torch.int64).view(len(LONGS), rows)
    rest = words[2 * len(LONGS) * rows :].view(len(INTS) + len(FLOATS), rows)
    found = {name: longs[n] for n, name in enumerate(LONGS)}
    found |= {name: rest[n] for n, name in enumerate(INTS)}
    return found | {name: rest[len(INTS) + n].view(torch.float32) for n, name in enumerate(FLOATS)}
