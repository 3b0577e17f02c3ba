"""An executor over an AOTInductor package: a call for each slot, over its caches, written in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.runtime.artifact import WEIGHTS, Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program
from gristmill.runtime.pt2.constants import constants
from gristmill.runtime.pt2.package import DECODE, PACKAGE, PREFILL, opened_package, this_machine
from gristmill.runtime.slotwise import Array, SlotwiseExecutor

LEAST_LENGTH = 2  # of caches, rows and tokens: packages are not compiled for lengths of 1
CONTAINS = {"AVX512": ("AVX2", "AVX512"), "AVX512_VNNI": ("AVX2", "AVX512", "AVX512_VNNI")}


class Pt2Executor(SlotwiseExecutor):
    """See SlotwiseExecutor. The number of threads is torch's, for the whole process."""

    def __init__(
        self, folder: Artifact, program: Program, threads: int, max_len: int, max_slots: int
    ) -> None:
        _refuse_other_machine(folder)
        super().__init__(program, folder.files[WEIGHTS].size, threads, max_len, max_slots)
        torch.set_num_threads(threads)
        self._weights = constants(folder.path / WEIGHTS, program)  # what runners use, so it must live
        self._runners = _runners(folder, self._weights)
        self._slots: dict[int, list[Tensor]] = {}

    def run(self, slot: int, tokens: Array, positions: Array, rows: Array, hidden: bool) -> list[Array]:
        end = max(int(positions[-1]) + 1, LEAST_LENGTH)  # positions behind it are not read
        caches = [cache[:end] for cache in self._caches(slot)]
        ids = [torch.from_numpy(array.astype(np.int64)) for array in (tokens, positions)]
        if len(tokens) == 1:
            found = self._runners[DECODE](*ids, caches)
        else:
            asked = np.resize(rows, max(len(rows), LEAST_LENGTH)).astype(np.int64)
            found = self._runners[PREFILL](*ids, torch.from_numpy(asked), caches)
            rows = np.arange(len(rows))
        return [part.numpy()[rows] for part in found[: 1 + hidden]]

    def copy(self, source: int, target: int, length: int, start: int) -> None:
        for ours, theirs in zip(self._caches(source), self._caches(target), strict=True):
            theirs[start:length] = ours[start:length]

    def _caches(self, slot: int) -> list[Tensor]:
        """Keys and values of each cache in turn, made when a slot is first used."""
        if slot not in self._slots:
            self._slots[slot] = [
                torch.zeros(max(self.max_len, LEAST_LENGTH), cache.kv_heads, dim)
                for cache in self.program.caches
                for dim in (cache.k_dim, cache.v_dim)
            ]
        return self._slots[slot]


def _runners(folder: Artifact, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Both entry points, with their weights."""
    folder.read(PACKAGE)  # its hash: this is machine code
    file = folder.path / PACKAGE
    try:
        runners = opened_package(file)
        for runner in runners.values():
            used = {name: weights[name] for name in runner.get_constant_fqns()}
            runner.load_constants(used, check_full_update=True, user_managed=True)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise GristmillError(
            f"torch {torch.__version__} cannot load {file}: {reason}; export again"
        ) from error
    return runners


def _refuse_other_machine(folder: Artifact) -> None:
    settings = folder.manifest["settings"]
    for name, ours in this_machine().items():
        theirs = settings.get(name)
        known = CONTAINS.get(ours, (ours,)) if name == "instructions" else (ours,)
        if theirs not in known:
            raise GristmillError(
                f"{folder.path} was compiled for {name} {theirs}, here is {ours}; export the artifact again "
                "here"
            )
