"""What tests of the device's KV cache share: a cache read back, contexts of random rows in it, and how heads
are prepared before they are multiplied or stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from interpreter import hadamard
from torch import Tensor
from triton_device import DEVICE, generator

from gristmill.kernels.reference.attention import rope
from gristmill.kernels.triton.append import Rotary, rope_tables
from gristmill.kernels.triton.cache import CacheRows, allocate
from gristmill.runtime.footprint import kv_rows
from gristmill.runtime.program import CacheSpec


def ring_rows(window: int, max_len: int, max_tokens: int) -> int:
    """The rows that the executor keeps of a slot."""
    return kv_rows(CacheSpec(1, 16, 16, "f16", "f16", window), max_len, max_tokens)


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


def rotary(
    positions: Tensor, dims: int, scale: float = 1.0, interleaved: bool = False
) -> tuple[Tensor, Rotary]:
    """inv_freq [dims / 2], and the tables of the positions that a kernel makes of it."""
    inv_freq = 10000.0 ** (-torch.arange(0, dims, 2) / dims)
    cos, sin = torch.empty(len(positions), dims // 2), torch.empty(len(positions), dims // 2)
    rope_tables(positions, inv_freq, scale, cos, sin)
    return inv_freq, Rotary(cos, sin, interleaved)


def prepared(
    x: Tensor, heads: int, norm: Tensor | None, eps: float, inv_freq: Tensor | None, positions: Tensor,
    interleaved: bool, scale: float, block: int,
) -> Tensor:  # fmt: skip
    """[T, heads * D] normed, turned and rotated, [T, heads, D] in f64."""
    x = x.double().unflatten(1, (heads, -1))
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    if inv_freq is not None:
        style = "interleaved" if interleaved else "half"
        x = rope(x.transpose(0, 1)[None], positions[None], inv_freq, style, scale)[0].transpose(0, 1)
    return torch.from_numpy(hadamard(x.cpu().numpy(), block)).to(DEVICE) if block else x


@dataclass(frozen=True)
class Case:
    """Heads and cache of an attention; ``ring`` rows are kept of each of three slots."""

    k_dtype: str
    v_dtype: str
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    @property
    def scale(self) -> float:
        return self.k_dim**-0.5


class Context:
    """A cache whose slots are appended to row by row, and the attention over it in float64."""

    def __init__(self, case: Case, max_len: int, max_tokens: int = 40, seed: int = 0) -> None:
        self.case = case
        ring = ring_rows(case.window, max_len, max_tokens)
        sizes = (case.k_dim, case.v_dim, case.kv_heads, 3, ring, case.window)
        self.cache = allocate(case.k_dtype, case.v_dtype, *sizes, device=DEVICE)
        self.random = generator(seed)
        self.sinks = self.normal(case.heads) if case.sinks else None

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def fill(self, slot: int, length: int) -> None:
        """Positions 0 to ``length`` of a slot, of which a ring keeps the last; other rows are no numbers."""
        where = torch.arange(max(0, length - self.cache.ring), length) % self.cache.ring
        for rows, shift in ((self.cache.k, 0.5), (self.cache.v, 0.0)):
            if rows.scales is not None:
                rows.scales[slot] = torch.nan
            else:
                rows.data[slot] = torch.nan
            data, scales = self._random(rows, len(where), shift)
            rows.data[slot, :, where] = data
            if rows.scales is not None and scales is not None:
                rows.scales[slot][:, :, where] = scales

    def _random(self, rows: CacheRows, count: int, shift: float) -> tuple[Tensor, Tensor | None]:
        """Data [kv_heads, count, columns] and scales [kv_heads, planes, count] of about normal numbers."""
        shape = (self.case.kv_heads, count, rows.data.shape[3])
        if rows.scales is None:
            return (self.normal(*shape) + shift).to(rows.data.dtype), None
        scales = (1 + torch.rand((shape[0], rows.scales.shape[2], count), generator=self.random)) / 2
        if rows.dtype == "fp8":
            return (self.normal(*shape) * 100).to(torch.float8_e4m3fn).view(torch.uint8), scales / 100
        data = torch.randint(0, 256, shape, generator=self.random, dtype=torch.uint8)
        if rows.dtype == "int8":
            scales[:, 0] /= 50
        else:
            scales[:, ::2] /= 4
        scales[:, 1::2] = shift - (2 * scales[:, ::2] if rows.dtype == "int4" else 0) + scales[:, 1::2] / 9
        return data.view(rows.data.dtype), scales.to(rows.scales.dtype)

    def expected(self, q: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """q [T, heads * k_dim] → [T, heads * v_dim] f64, over the cache as it is stored."""
        keys, values = stored(self.cache.k), stored(self.cache.v)
        return torch.stack([
            self._row(row, keys[slot], values[slot], position)
            for row, position, slot in zip(q.double(), positions.tolist(), slots.tolist())
        ])  # fmt: skip

    def _row(self, q: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        case, group = self.case, self.case.heads // self.case.kv_heads
        oldest = max(0, position - case.window + 1) if case.window else 0
        where = torch.arange(oldest, position + 1) % self.cache.ring
        k, v = (x[:, where].repeat_interleave(group, 0) for x in (keys, values))
        s = torch.einsum("hd,hsd->hs", q.view(case.heads, -1), k) * case.scale
        s = case.softcap * torch.tanh(s / case.softcap) if case.softcap else s
        if self.sinks is not None:
            s = torch.cat([s, self.sinks.double()[:, None]], 1)
        p = s.softmax(1)[:, : len(where)]
        return torch.einsum("hs,hsd->hd", p, v).flatten()
