"""An executor over a TorchScript module: a call for each slot, over its caches, written in place."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program
from gristmill.runtime.slotwise import Array, SlotwiseExecutor

MODULE = "model.pt"


class TorchScriptExecutor(SlotwiseExecutor):
    """See SlotwiseExecutor. The number of threads is torch's, for the whole process."""

    def __init__(
        self, folder: Artifact, program: Program, threads: int, max_len: int, max_slots: int
    ) -> None:
        super().__init__(program, folder.files[MODULE].size, threads, max_len, max_slots)
        torch.set_num_threads(threads)
        self._module = _frozen(folder)
        self._slots: dict[int, list[Tensor]] = {}

    def run(self, slot: int, tokens: Array, positions: Array, rows: Array, hidden: bool) -> list[Array]:
        end = int(positions[-1]) + 1  # rows behind it are not read: spares the products with them
        caches = [cache[:, :end] for cache in self._caches(slot)]
        ids = [torch.from_numpy(array.astype(np.int64)) for array in (tokens, positions, rows)]
        with torch.no_grad():
            found = self._module(*ids, caches)
        return [part.numpy() for part in found[: 1 + hidden]]

    def copy(self, source: int, target: int, length: int, start: int) -> None:
        for ours, theirs in zip(self._caches(source), self._caches(target), strict=True):
            theirs[:, start:length] = ours[:, start:length]

    def _caches(self, slot: int) -> list[Tensor]:
        """Keys and values of each cache in turn, made when a slot is first used."""
        if slot not in self._slots:
            self._slots[slot] = [
                torch.zeros(cache.kv_heads, self.max_len, dim)
                for cache in self.program.caches
                for dim in (cache.k_dim, cache.v_dim)
            ]
        return self._slots[slot]


def _frozen(folder: Artifact) -> Any:
    """The module with its weights made constants, which dequantizes them once and for all."""
    file = folder.path / MODULE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls all of TorchScript deprecated
            return torch.jit.freeze(torch.jit.load(str(file)).eval())
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise GristmillError(
            f"torch {torch.__version__} cannot load {file}: {reason}; export again"
        ) from error
