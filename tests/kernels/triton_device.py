"""Where the kernels of the tests run: in Triton's interpreter on CPU tensors, or with TRITON_INTERPRET=0 on a
device. What a test hands to a kernel is made there, what it compares is brought back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

if INTERPRETED:
    import triton_interpreter  # noqa: F401  (puts it right)

ahead_of_time = pytest.mark.skipif(not INTERPRETED, reason="compiled ahead of time where nothing can run")


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """In a module that imports this, tensors are made on the device unless they say where."""
    if INTERPRETED:
        yield
        return
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


def generator(seed: int) -> torch.Generator:
    """Of the device's random numbers."""
    return torch.Generator(DEVICE).manual_seed(seed)
