"""rms_norm and layer_norm of rows, with an optional residual.

One program holds one row in registers, so a row is read once and its sum is added in an order that depends on
its width alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .overlap import let_next_begin, options, wait_for_inputs
from .quantize import Quantized, store_quantized

MOST_COLUMNS = 1 << 15  # of a row: 32 floats in each of a program's 1,024 threads


@triton.jit
def _norm_kernel(
    x, weight, bias, residual, out, q, scale,
    x_stride, residual_stride, out_stride,
    eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    wait_for_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    value = tl.load(x + row * x_stride + columns, inside, 0.0).to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value, 0) / WIDTH, 0.0)
    value = value * (1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / WIDTH + eps))
    if weight is not None:
        value = value * tl.load(weight + columns, inside, 0.0).to(tl.float32)
    if bias is not None:
        value = value + tl.load(bias + columns, inside, 0.0).to(tl.float32)
    if residual is not None:
        value = value + tl.load(residual + row * residual_stride + columns, inside, 0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, value.to(out.dtype.element_ty), inside)
    if GROUP:
        store_quantized(tl.where(inside, value, 0.0), 0, q, scale, row, WIDTH, GROUP)


def rms_norm(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, out: Tensor,
    quantized: Quantized | None = None,
) -> None:  # fmt: skip
    """out = x / sqrt(mean(x^2) + eps) * weight + residual (arXiv 1910.07467, eq. 4).

    x, residual, out: [T, W], any float types, rows any stride apart; weight: [W]. ``out`` may be ``residual``
    or ``x``. quantized: what else gets the result, as int8.
    """
    _launch(x, weight, None, residual, eps, out, quantized, centred=False)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float, out: Tensor,
    quantized: Quantized | None = None,
) -> None:  # fmt: skip
    """out = (x - mean) / sqrt(var + eps) * weight + bias + residual (arXiv 1607.06450).

    Shapes and types as in rms_norm; bias: [W].
    """
    _launch(x, weight, bias, residual, eps, out, quantized, centred=True)


def _launch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float, out: Tensor,
    quantized: Quantized | None, centred: bool,
) -> None:  # fmt: skip
    rows, width = x.shape
    assert out.shape == x.shape and (residual is None or residual.shape == x.shape), "rows of other shapes"
    assert width <= MOST_COLUMNS, f"rows of {width} columns, {MOST_COLUMNS} fit into a program"
    block = triton.next_power_of_2(width)
    group, q, scale = 0, None, None
    if quantized is not None:
        block, group, q, scale = max(block, 128), quantized.group, quantized.q, quantized.scale
    _norm_kernel[(rows,)](
        x, weight, bias, residual, out, q, scale,
        x.stride(0), residual.stride(0) if residual is not None else 0, out.stride(0),
        eps,
        WIDTH=width, BLOCK=block, CENTRED=centred, GROUP=group,
        num_warps=max(1, min(32, block // 512)), **options(),
    )  # fmt: skip
