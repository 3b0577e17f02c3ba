"""Rotary embeddings and attention over rows of mixed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from .norms import rms_norm


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, style: str, scale: float) -> Tensor:
    """Rotate the first 2 * len(inv_freq) columns of each head (arXiv 2104.09864, eq. 34).

    x [1, H, T, D]; positions [1, T].
    """
    angles = positions[..., None].float() * inv_freq
    cos, sin = (angles.cos() * scale)[:, None], (angles.sin() * scale)[:, None]
    dims = 2 * inv_freq.shape[0]
    turned, rest = x[..., :dims], x[..., dims:]
    if style == "half":
        a, b = turned.chunk(2, -1)
        out = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        out = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([out, rest], -1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Causal attention of one whole sequence. q [H, T, D]; k, v [KV, T, D]; result [H, T, V]."""
    return attend_at(q, k, v, torch.arange(q.shape[1]), scale, window, softcap, sinks)


def attend_at(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int, softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention of rows at `positions` [T] to the positions 0, 1, 2 ... of one sequence that they may see.

    q [H, T, D]; k, v [KV, L, D]; result [H, T, V].
    """
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    t = torch.arange(k.shape[1])
    hidden = t[None, :] > positions[:, None]
    if window:
        hidden = hidden | (t[None, :] <= positions[:, None] - window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, q.shape[1], 1)], -1)
    weights = scores.softmax(-1)
    return (weights if sinks is None else weights[..., :-1]) @ v


def attention_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """The traced form, of whole sequences. q [B, H, T, D]; k, v [B, KV, T, D]; result [B, T, H, V]."""
    del layer
    parts = [attend(*rows, scale, window, softcap, sinks) for rows in zip(q, k, v, strict=True)]
    return torch.stack(parts).transpose(1, 2).contiguous()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slots: Tensor,
    inv_freq: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    sinks: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    softcap: float,
    rope_style: str,
    rope_scale: float,
    norm_eps: float,
) -> Tensor:
    """Attention of whole sequences told apart by ``slots``; a slot's rows are positions 0, 1, 2 ...

    q [1, T, heads * D]; k, v [1, T, kv_heads * D]; positions, slots [1, T]; result [1, T, heads * V].
    """
    split = [
        x.view(1, x.shape[1], n, -1).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))
    ]
    q, k, v = split
    q = q if q_norm is None else rms_norm(q, q_norm, None, norm_eps)
    k = k if k_norm is None else rms_norm(k, k_norm, None, norm_eps)
    if inv_freq is not None:
        q, k = (rope(x, positions, inv_freq, rope_style, rope_scale) for x in (q, k))
    out = torch.empty(1, q.shape[2], heads, v.shape[3])
    for slot in slots[0].unique():
        rows = (slots[0] == slot).nonzero()[:, 0]
        part = attend(q[0][:, rows], k[0][:, rows], v[0][:, rows], scale, window, softcap, sinks)
        out[0, rows] = part.transpose(0, 1)
    return out.flatten(2)
