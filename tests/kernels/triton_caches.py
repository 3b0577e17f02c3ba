"""What tests of the device's KV cache share: a cache read back, and contexts of random rows in it."""

from __future__ import annotations

import torch
from torch import Tensor

from gristmill.kernels.triton.cache import CacheRows


def stored(rows: CacheRows) -> Tensor:
    """All rows as the layout in kernels/triton/cache.py describes them: [slots, kv_heads, ring, dim] f64."""
    if rows.scales is None:
        return rows.data.double()
    scales = rows.scales.double().transpose(2, 3)  # [slots, kv_heads, ring, planes]
    if rows.dtype == "int8":
        return scales[..., :1] * rows.data.double() + scales[..., 1:]
    if rows.dtype == "fp8":
        return scales * rows.data.view(torch.float8_e4m3fn).double()
    blocks = rows.data.unflatten(3, (-1, 32))
    q = torch.stack([blocks & 15, blocks >> 4], 4).flatten(3)[..., : rows.dim]
    group = torch.arange(rows.dim) // 32
    return scales[..., 2 * group] * q.double() + scales[..., 2 * group + 1]
