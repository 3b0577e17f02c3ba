"""The attention that a module of one's own calls, so that the compiler knows it from everything else."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import ops as _ops  # noqa: F401  (registers the gristmill ops)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Optional[float] = None,  # noqa: UP045  (torch.jit.script reads this spelling alone)
    window: int = 0,
    softcap: float = 0.0,
    sinks: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """Causal attention of whole sequences, each from its position 0 on: softmax(scale q k^T) v.

    q: [B, heads, T, D]; k: [B, kv_heads, T, D]; v: [B, kv_heads, T, V], where kv_heads divides heads (query
    head h reads head h // (heads // kv_heads)); all three of one floating type. Result [B, heads, T, V], as
    of torch.nn.functional.scaled_dot_product_attention. Rotations and norms of q and k are the caller's.
    scale: D ** -0.5 where None. window: how many positions a row sees, itself included; 0: all before it.
    softcap: scores become softcap * tanh(scores / softcap); 0: none. sinks: [heads], a score per head that
    takes part in the softmax and has no value.

    Run eagerly (gradients included) it computes just that; in a module given to gristmill.compile it is
    traced as one opaque op, which becomes attention over the KV cache. Scriptable.
    """
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        _check(q, k, v)
    factor = q.size(3) ** -0.5 if scale is None else scale
    rows = torch.ops.gristmill.attention_heads(q, k, v, 0, factor, window, softcap, sinks)
    return rows.transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if {q.dim(), k.dim(), v.dim()} != {4}:
        raise ValueError("attention expects q, k and v of four dimensions: [B, heads, T, columns]")
    if q.shape[1] % k.shape[1] != 0 or k.shape[1] != v.shape[1]:
        raise ValueError("attention expects as many heads of k as of v, and a multiple of them of q")
