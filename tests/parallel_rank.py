"""One rank of many programs, for tests: a process of its own that saves the logits it has of each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.parallel.exchange import Group, file_store
from gristmill.runtime.parallel.rank import Rank, Share
from gristmill.runtime.program import Program

BAND = 5  # rows; the first batch of 16 has a short last band
BATCHES = [  # (tokens, first position, slot) of the sequences of a forward
    [(11, 0, 0), (5, 0, 1)],
    [(1, 11, 0), (1, 5, 1)],
    [(9, 12, 0)],
    [(1, 6, 1)],
]


def forwards(executor, vocabulary: int) -> np.ndarray:
    """Logits of all rows of BATCHES: prefill of two slots, a batched decode, a chunk, a single token."""
    random = np.random.default_rng(5)
    found = []
    for batch in BATCHES:
        count = sum(n for n, _, _ in batch)
        tokens = random.integers(0, vocabulary, count).astype(np.int32)
        positions = np.concatenate([np.arange(at, at + n) for n, at, _ in batch]).astype(np.int32)
        slots = np.concatenate([np.full(n, slot) for n, _, slot in batch]).astype(np.int32)
        found.append(executor.forward(tokens, positions, slots, np.arange(count, dtype=np.int32)))
    return np.concatenate(found)


def main(rank: int, world: int, folder: Path) -> None:
    """folder: store; cases.json: name -> [program.json, weights, gather_pays]; NAME.RANK.npy is written, or
    NAME.RANK.txt with the words of a refusal."""
    torch.set_num_threads(1)
    group = Group(file_store(str(folder / f"store{world}"), world), rank, world, local=True)
    for name, (program_file, weights, gather_pays) in json.loads((folder / "cases.json").read_text()).items():
        program = Program.from_json(json.loads(Path(program_file).read_bytes()))
        share = Share(rank, world, 1, 64, 3, gather_pays=gather_pays, band=BAND if gather_pays == 0 else 0)
        try:
            made = Rank(program, Path(weights), share)
        except GristmillError as error:
            (folder / f"{name}.{world}.{rank}.txt").write_text(str(error))
            continue
        made.connect(group)
        np.save(folder / f"{name}.{world}.{rank}.npy", forwards(made, program.vocabulary))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
