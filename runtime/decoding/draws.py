"""How a batch of next tokens is drawn, as plain arrays: what an executor takes that draws on its device.

The choice itself is that of sampling.py; here are only its inputs, one entry for each row of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from gristmill.runtime.decoding.options import GenerationOptions


@dataclass(frozen=True)
class Draws:
    """Of each of R rows: temperature [R] f32, 0 is greedy; top_k [R] i32, 0 is off; top_p [R] f32, 1 is off;
    seed, sequence [R] u64 and position [R] i32, the key and the counter of the draw; penalty [R] f32 of the
    tokens that the row's slot holds up to its position, 1 is off.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    seed: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    penalty: np.ndarray

    @staticmethod
    def of(
        options: Sequence[GenerationOptions], seeds: Sequence[int], positions: Sequence[int],
        sequences: Sequence[int] | None = None,
    ) -> Draws:  # fmt: skip
        """Rows under their options, of sequence 0 unless given; a row's seed counts where its temperature is
        not 0."""
        return Draws(
            np.array([o.temperature for o in options], np.float32),
            np.array([o.top_k for o in options], np.int32),
            np.array([o.top_p for o in options], np.float32),
            np.array(seeds, np.uint64),
            np.array([0] * len(options) if sequences is None else sequences, np.uint64),
            np.array(positions, np.int32),
            np.array([o.repetition_penalty for o in options], np.float32),
        )

    @staticmethod
    def greedy(rows: int) -> Draws:
        """The most likely token of each row."""
        return Draws.of([GenerationOptions()] * rows, [0] * rows, [0] * rows)

    def __len__(self) -> int:
        return len(self.temperature)

    def __getitem__(self, rows: slice) -> Draws:
        return Draws(*(getattr(self, field.name)[rows] for field in fields(self)))

    @property
    def all_greedy(self) -> bool:
        """Whether every row takes its largest logit as it is."""
        return not self.temperature.any() and bool((self.penalty == 1.0).all())
