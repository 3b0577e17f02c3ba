"""fp8 (e4m3) checkpoints: one scale for a tensor, for each output row, or for each block of 128 x 128.

A layer X of k inputs and n outputs has X.weight [n, k] F8_E4M3 and its scale: X.weight_scale [], [1] or
[n, 1], or X.weight_scale_inv [n / 128, k / 128] (DeepSeek; a last block may be short), and w = f32(fp8) *
scale. All of them are a scale per row and group of columns: a tensor's scale is every row's, a block's is
that of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gristmill.quant.formats.weight import (
    QuantizedWeight,
    Tensors,
    plan_columns,
    refuse_bad_scales,
    require_shape,
    require_tensors,
    stored_scale,
)
from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import FORMATS, Scheme
from gristmill.runtime.errors import GristmillError

Array = NDArray[Any]
FORMAT = "fp8"
MARKERS = ("weight_scale_inv", "weight_scale")
PARTS = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale")
VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()  # of every code


@dataclass(frozen=True)
class Fp8Config:
    """block: rows and columns that share a scale; None: a tensor or a row does."""

    block: tuple[int, int] | None


def read_config(config: Mapping[str, Any]) -> Fp8Config:
    """Check quantization_config of methods `fp8` and `fbgemm_fp8`."""
    number = config.get("fmt", "e4m3")
    if number not in ("e4m3", "float8_e4m3fn"):
        raise GristmillError(f"fp8 of type {number!r} is not supported; expected e4m3")
    block = config.get("weight_block_size")
    if block is None:
        return Fp8Config(None)
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        raise GristmillError(f"weight_block_size is {block!r}, expected two positive integers")
    return Fp8Config((block[0], block[1]))


def read_weight(config: Fp8Config, tensors: Tensors, module: str) -> QuantizedWeight:
    """Layer `module` of an fp8 checkpoint."""
    require_tensors(tensors, module, ("weight",))
    marker = next(m for m in MARKERS if f"{module}.{m}" in tensors)
    return read_scaled(tensors, module, marker, config.block)


def read_scaled(
    tensors: Tensors, module: str, marker: str, block: tuple[int, int] | None, group_size: int = 0
) -> QuantizedWeight:
    """The weight of a layer whose scales are the tensor `marker`: by blocks, or by groups of columns."""
    shape = tensors.shape(f"{module}.weight")
    if len(shape) != 2:
        raise GristmillError(f"tensor '{module}.weight' has shape {list(shape)}, expected two dimensions")
    n, k = shape
    name = f"{module}.{marker}"
    scale = tensors.read(name).numpy().astype(np.float32)
    refuse_bad_scales(module, scale)
    if block:
        require_shape(tensors, name, (-(-n // block[0]), -(-k // block[1])))
        scale, group_size = np.repeat(scale, block[0], axis=0)[:n], block[1]
    elif scale.size == 1:
        scale = np.full((n, 1), scale.reshape(()))
    elif scale.shape != (n, -(-k // (group_size or k))):
        require_shape(tensors, name, (n, -(-k // (group_size or k))))
    columns = plan_columns(module, k, scale.shape[1], group_size)
    stored = stored_scale(scale[:, columns.source])

    def read() -> Quantized:
        values = tensors.read(f"{module}.weight")
        codes: Array = values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if np.isnan(VALUES[codes]).any():
            raise GristmillError(f"{module} holds NaN weights: the checkpoint is damaged, fetch it again")
        return Quantized(codes, stored, None)

    scheme = Scheme(FORMAT, columns.group) if FORMAT in FORMATS else None
    return QuantizedWeight(
        module, n, k, columns.group, scheme, stored.dtype.name, read, codes=VALUES, order=columns.order
    )
