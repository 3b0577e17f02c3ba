"""Stored matrices as floats, in torch: a traced graph can hold them packed (layouts: docs/artifact.md)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # columns
MIDDLE = {"int8": 0, "int4": 8, "int3": 4, "int2": 2}  # the zero point where none is stored


def dequantize(
    data: Tensor, scale: Tensor | None, zero: Tensor | None, form: str, group: int, k: int
) -> Tensor:
    """A matrix [n, k] f32: scale * (q - zero), or scale * e4m3, or the floats themselves.

    data: as stored; scale [n, G]; zero as stored, None: the format's own; group: columns of a scale, 0: the
    row.
    """
    if scale is None:
        return data.float()
    q = _levels(data, form)[:, :k]
    width = group or k
    groups = torch.nn.functional.pad(q, (0, -k % width)).unflatten(1, (-1, width))
    if form != "fp8":
        groups = groups - _zeros(zero, scale, form)[..., None]
    return (groups * scale.float()[..., None]).flatten(1)[:, :k]


def _levels(data: Tensor, form: str) -> Tensor:
    """[n, kp] f32 of what is packed."""
    if form == "fp8":
        return _e4m3(data)
    if form == "int4":
        data = _nibbles(data.unflatten(1, (-1, BLOCK // 2)))
    elif form == "int2":
        data = _crumbs(data.unflatten(1, (-1, BLOCK // 4))).flatten(1)
    elif form == "int3":
        blocks = data.unflatten(1, (-1, 3 * BLOCK // 8))
        low, high = blocks[..., : BLOCK // 4], blocks[..., BLOCK // 4 :]
        bits = torch.stack([high >> bit & 1 for bit in range(8)], -1).flatten(2)
        data = (_crumbs(low) | bits << 2).flatten(1)
    return data.float()


def _e4m3(bits: Tensor) -> Tensor:
    """By arithmetic: a view as another type is not for TorchScript."""
    exponent, mantissa = bits >> 3 & 15, (bits & 7).float()
    size = torch.where(exponent > 0, torch.ldexp(8 + mantissa, exponent.int() - 10), mantissa * 2.0**-9)
    return torch.where(bits > 127, -size, size)


def _nibbles(blocks: Tensor) -> Tensor:
    return torch.cat([blocks & 15, blocks >> 4], -1).flatten(1)


def _crumbs(blocks: Tensor) -> Tensor:
    return torch.cat([blocks >> shift & 3 for shift in (0, 2, 4, 6)], -1)


def _zeros(zero: Tensor | None, scale: Tensor, form: str) -> Tensor:
    """[n, G] f32, or one number for all."""
    if zero is None:
        return torch.full_like(scale, MIDDLE[form], dtype=torch.float32)
    if form == "int8":
        return zero.float()
    return torch.stack([zero & 15, zero >> 4], -1).flatten(1)[:, : scale.shape[1]].float()
