"""The KV cache on a device: what is stored where, how large it is, and copies of a slot.

The number formats are those of the CPU's cache (kernels/cpu/cache.inc); the layout is one for wide loads:
data and scales are tensors of their own, and neighbours along the context lie beside each other in both.

    data    [slots, kv_heads, ring, D]    f32, f16, int8, or uint8 with the bits of e4m3 numbers;
            [slots, kv_heads, ring, 32 P] uint8 for int4, P = ceil(D / 64): byte i of each 32 has column i of
                                          its 64 in the low half and column i + 32 in the high half
    scales  [slots, kv_heads, planes, ring]; int8: f32 scale, offset; fp8: f32 scale; int4: f16 scale of
            columns 0 to 31, their offset, scale of columns 32 to 63, their offset, ...

Position p of a sequence lies in row p % ring of its slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32  # columns of int4 that share a scale and an offset
DATA_TYPES = {
    "f32": torch.float32, "f16": torch.float16, "int8": torch.int8, "fp8": torch.uint8, "int4": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class CacheRows:
    """The keys or the values of one layer, of ``dim`` columns each; see the module docstring."""

    dtype: str
    dim: int
    data: Tensor
    scales: Tensor | None


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values; window 0 = the whole context, of which ``ring`` rows are kept."""

    k: CacheRows
    v: CacheRows
    window: int = 0

    @property
    def kv_heads(self) -> int:
        return self.k.data.shape[1]

    @property
    def ring(self) -> int:
        return self.k.data.shape[2]


def data_columns(dtype: str, dim: int) -> int:
    """Elements of a stored row."""
    return -(-dim // (2 * GROUP)) * GROUP if dtype == "int4" else dim


def scale_planes(dtype: str, dim: int) -> int:
    """Numbers that a stored row is scaled by."""
    return {"int8": 2, "fp8": 1, "int4": 2 * -(-dim // GROUP)}.get(dtype, 0)


def scale_type(dtype: str) -> torch.dtype:
    return torch.float16 if dtype == "int4" else torch.float32


def row_bytes(dtype: str, dim: int) -> int:
    """Bytes that one key or value of one head takes, scales included."""
    data = data_columns(dtype, dim) * DATA_TYPES[dtype].itemsize
    return data + scale_planes(dtype, dim) * scale_type(dtype).itemsize


def layer_bytes(
    k_dtype: str, v_dtype: str, k_dim: int, v_dim: int, kv_heads: int, slots: int, ring: int
) -> int:
    """Bytes that `allocate` takes."""
    return slots * kv_heads * ring * (row_bytes(k_dtype, k_dim) + row_bytes(v_dtype, v_dim))


def allocate(
    k_dtype: str, v_dtype: str, k_dim: int, v_dim: int, kv_heads: int, slots: int, ring: int,
    window: int = 0, device: torch.device | str = "cuda",
) -> LayerCache:  # fmt: skip
    """An empty cache of one layer. Its types are "f32", "f16", "int8", "fp8" or "int4"."""

    def rows(dtype: str, dim: int) -> CacheRows:
        shape, planes = (slots, kv_heads, ring, data_columns(dtype, dim)), scale_planes(dtype, dim)
        data = torch.zeros(shape, dtype=DATA_TYPES[dtype], device=device)
        if not planes:
            return CacheRows(dtype, dim, data, None)
        scales = torch.zeros((slots, kv_heads, planes, ring), dtype=scale_type(dtype), device=device)
        return CacheRows(dtype, dim, data, scales)

    return LayerCache(rows(k_dtype, k_dim), rows(v_dtype, v_dim), window)


def cache_constants(cache: LayerCache) -> dict[str, int | str]:
    """What kernels are compiled for; BLOCK: columns of a tile that holds a row, a power of two."""
    found: dict[str, int | str] = {}
    for name, rows in (("K", cache.k), ("V", cache.v)):
        found[f"{name}_DIM"] = rows.dim
        least = 2 * GROUP if rows.dtype == "int4" else 16
        found[f"{name}_BLOCK"] = max(least, 1 << (rows.dim - 1).bit_length())
        found[f"{name}_TYPE"] = rows.dtype
        found[f"{name}_BYTES"] = data_columns(rows.dtype, rows.dim)
        found[f"{name}_PLANES"] = scale_planes(rows.dtype, rows.dim)
    return found


def copy_slot(
    layers: Sequence[LayerCache], source: int, target: int, length: int, start: int = 0
) -> None:
    """Gives slot ``target`` positions ``start`` to ``length`` of slot ``source``: a prefix is computed once.

    Of a sliding window's ring that is what it still holds: all rows, once the range is as long as the ring.
    """
    for layer in layers:
        for rows in ring_slices(start, length, layer.ring):
            for part in (layer.k, layer.v):
                part.data[target, :, rows].copy_(part.data[source, :, rows])
                if part.scales is not None:
                    part.scales[target, :, :, rows].copy_(part.scales[source, :, :, rows])


def ring_slices(start: int, length: int, ring: int) -> list[slice]:
    """The rows of a ring that hold positions ``start`` to ``length``: one slice, or two around its end."""
    if length - start >= ring:
        return [slice(0, ring)]
    first, end = start % ring, start % ring + length - start
    return [slice(first, min(end, ring)), slice(0, max(end - ring, 0))]
