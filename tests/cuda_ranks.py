"""Ranks of a tensor-parallel session on the CUDA executor where there are no GPUs: CPU tensors, Triton's
interpreter and gloo. A worker imports this before it starts."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from cuda_cases import shrink
from triton_device import DEVICE

from gristmill.runtime.cuda import device as cuda_device

START = (
    "import sys; sys.path[:] = {path!r}; import cuda_ranks; cuda_ranks.pretend(); "
    "from gristmill.runtime.parallel.worker import main; main()"
)


def pretend() -> None:
    """Every device is the CPU, one small processor; for a process of its own, where nothing is put back."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cuda_device, "open_device", lambda index=None: DEVICE)
    shrink(patch)
