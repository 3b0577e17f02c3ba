"""Reading memory as fast as it goes: the roof that products and caches are held to."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # entries of a step, 64 bytes for each of 256 threads


@triton.jit
def _read_kernel(x, out, count, STEP: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0) * BLOCK, count, STEP):
        at = start + tl.arange(0, BLOCK)
        total ^= tl.load(x + at, at < count, 0, eviction_policy="evict_first")
    tl.store(out + tl.program_id(0), tl.xor_sum(total, 0))


def read(x: Tensor, out: Tensor) -> None:
    """Reads x [N] i32, N < 2^31, by as many programs as out [P] i32 has entries; each leaves the exclusive or
    of what it read."""
    programs = len(out)
    _read_kernel[(programs,)](x, out, len(x), STEP=programs * BLOCK, BLOCK=BLOCK, num_warps=8)
