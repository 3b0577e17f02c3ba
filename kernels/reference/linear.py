"""Products with a weight matrix and what follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    residual: Tensor | None = None,
    activation: str = "none",
    glu: bool = False,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """softcap(scale * act(x W^T + b) [* up half]) + residual, W and b the segments one below the other.

    x [..., K]; weights [n_i, K]; biases [n_i] or None; residual and result [..., N], or N / 2 with ``glu``,
    whose first half of rows is the gate and whose second half is the up projection (arXiv 2002.05202).
    """
    y = torch.cat([functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1)
    return finish(y, residual, activation, glu, scale, softcap)


def finish(
    y: Tensor, residual: Tensor | None, activation: str, glu: bool, scale: float, softcap: float
) -> Tensor:
    """What follows the products [..., N] of `linear`."""
    if glu:
        gate, up = y.chunk(2, -1)
        y = ACTIVATIONS[activation](gate) * up
    else:
        y = ACTIVATIONS[activation](y)
    y = y * scale if scale != 1 else y
    y = softcap * torch.tanh(y / softcap) if softcap else y
    return y if residual is None else residual + y


def embedding(
    ids: Tensor, weight: Tensor, residual: Tensor | None = None, scale: float = 1.0, offset: int = 0
) -> Tensor:
    """scale * W[ids + offset] + residual. ids [...] integers; weight [V, W]."""
    y = functional.embedding(ids + offset, weight)
    y = y * scale if scale != 1 else y
    return y if residual is None else residual + y


def round_activations(x: Tensor, group: int) -> Tensor:
    """x [..., K] as integer products see it: int8 per row and `group` columns, symmetric, and back."""
    k = x.shape[-1]
    groups = functional.pad(x, (0, -k % group)).unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    q = (groups * (127 / torch.where(largest > 0, largest, 1.0))).round()
    return (q * (largest / 127)).flatten(-2)[..., :k]
