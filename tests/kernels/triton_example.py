"""The smallest kernel with a launch function: what the set-up of the Triton tests is tried on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from compile_sm90 import Launch
from torch import Tensor


@triton.jit
def shares_kernel(x, out, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    at = tl.program_id(0) * width + columns
    values = tl.load(x + at, columns < width, 0.0)
    tl.store(out + at, values / tl.sum(values, 0), columns < width)


def shares(x: Tensor, out: Tensor, block: int = 64) -> None:
    """out[t] = x[t] / sum(x[t]); x and out [T, width] f32 with width <= block, which one warp holds."""
    shares_kernel[(len(x),)](x, out, x.shape[1], BLOCK=block, num_warps=1)


def launches() -> Iterator[Launch]:
    x, out = torch.empty(5, 48, device="meta"), torch.empty(5, 48, device="meta")
    yield "small", lambda: shares(x, out)
    yield "again", lambda: shares(x, out)
    yield "spilling", lambda: shares(x, out, block=16384)  # 512 values in a thread of 255 registers
