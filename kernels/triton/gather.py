"""gather_rows: the rows whose logits are asked for."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a program


@triton.jit
def _gather_kernel(x, rows, out, x_stride, out_stride, width, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(rows + r).to(tl.int64)
    value = tl.load(x + source * x_stride + columns, columns < width)
    tl.store(out + r * out_stride + columns, value.to(out.dtype.element_ty), columns < width)


def gather_rows(x: Tensor, rows: Tensor, out: Tensor) -> None:
    """out[r] = x[rows[r]]. x: [T, W]; rows: [R] i32; out: [R, W]; any float types, rows any stride apart."""
    count, width = out.shape
    assert x.shape[1] == width and len(rows) == count, "a row for each of out's, of the same width"
    grid = (count, triton.cdiv(width, BLOCK))
    _gather_kernel[grid](x, rows, out, x.stride(0), out.stride(0), width, BLOCK=BLOCK, num_warps=4)
