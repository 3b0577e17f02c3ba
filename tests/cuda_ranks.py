"""Ranks of a tensor-parallel session on the CUDA executor where there are no GPUs: CPU tensors, Triton's
interpreter and gloo. A worker imports this before it starts; so does the test, which puts things back."""

from __future__ import annotations

import dataclasses
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import triton_interpreter  # noqa: F401  (puts it right)

from gristmill.kernels.triton import linear_configs
from gristmill.runtime.cuda import device as cuda_device
from gristmill.runtime.cuda import executor as cuda_executor

START = (
    "import sys; sys.path[:] = {path!r}; import cuda_ranks; cuda_ranks.pretend(); "
    "from gristmill.runtime.parallel.worker import main; main()"
)


def pretend() -> None:
    """Every device is the CPU, one small processor; for a process of its own."""
    cuda_device.open_device = lambda index=None: torch.device("cpu")
    linear_configs.MULTIPROCESSORS = 1
    cuda_executor.PROCESSORS_OF_CPU = 1
    for table in linear_configs.TABLE.values():
        for rows in [rows for rows in table if rows <= linear_configs.DECODE_TOKENS]:
            table[rows] = dataclasses.replace(table[rows], rows=64, chunks=4)
    for tokens, config in linear_configs.INTEGER_TABLE.items():
        linear_configs.INTEGER_TABLE[tokens] = dataclasses.replace(config, rows=64, chunks=8)
