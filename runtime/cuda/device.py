"""Whether there is a GPU that will do, and whether a program fits into its memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gristmill.kernels.triton.cache import layer_bytes
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.footprint import kv_rows
from gristmill.runtime.program import Program

CAPABILITY = (8, 0)  # Ampere: the first with bf16 on tensor cores
RESERVE_BYTES = 512 << 20  # for kernels, graphs and what products and attention keep in between


def open_device() -> torch.device:
    """The current CUDA device. Raises GristmillError where there is none that can run the kernels."""
    if not torch.cuda.is_available():
        raise GristmillError(
            "device 'cuda': torch finds no CUDA device, expected an NVIDIA GPU, its driver and a torch built "
            "for CUDA; load with device 'cpu'"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise GristmillError(
            f"device 'cuda' ({torch.cuda.get_device_name(device)}) has compute capability "
            f"{found[0]}.{found[1]}, expected {CAPABILITY[0]}.{CAPABILITY[1]} or more; load with device 'cpu'"
        )
    return device


def kv_bytes(program: Program, max_len: int, slots: int) -> int:
    """Bytes of the caches of ``slots`` slots."""
    return sum(
        layer_bytes(
            c.k_dtype, c.v_dtype, c.k_dim, c.v_dim, c.kv_heads, slots,
            kv_rows(c, max_len, program.limits.max_tokens),
        )
        for c in program.caches
    )  # fmt: skip


def refuse_too_large(program: Program, max_len: int, max_slots: int, weight_bytes: int, free: int) -> None:
    """Raises GristmillError where weights, caches and buffers need more than ``free`` bytes.

    One slot more than max_slots is counted, which takes the rows that fill up a bucket.
    """
    fixed = weight_bytes + program.arena_bytes + RESERVE_BYTES
    fixed += 4 * program.limits.max_tokens * program.vocabulary
    needed = fixed + kv_bytes(program, max_len, max_slots + 1)
    if needed <= free:
        return
    said = f"device 'cuda': needed {_gib(needed)} GiB with {max_slots} slots of {max_len}, free {_gib(free)}"
    fitting = [
        f"{name}={most}"
        for name, most in (
            ("max_len", _most(max_len, lambda n: fixed + kv_bytes(program, n, max_slots + 1) <= free)),
            ("max_slots", _most(max_slots, lambda n: fixed + kv_bytes(program, max_len, n + 1) <= free)),
        )
        if most
    ]
    if fitting:
        raise GristmillError(f"{said}; load with {' or '.join(fitting)}, which fits")
    raise GristmillError(f"{said}, and no max_len or max_slots alone fits; use a GPU with more memory")


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to ``limit`` that fits, 0 where none does; what is less than it fits too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
