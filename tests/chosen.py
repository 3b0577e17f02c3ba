"""What the CPU chooses from a row of logits, as tests of other executors compare with it."""

from collections.abc import Iterable

import numpy as np

from gristmill.runtime.decoding.chooser import Chooser
from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.decoding.sampling import Workspace


def choose(
    logits: np.ndarray,
    options: GenerationOptions,
    seen: Iterable[int],
    seed: int,
    sequence: int,
    position: int,
    workspace: Workspace | None = None,
) -> int:
    """The token after `position` where `seen` stand before it."""
    before = [int(token) for token in seen]
    return Chooser(options, before, seed, sequence, (), logits.size, workspace).token(logits, position)
