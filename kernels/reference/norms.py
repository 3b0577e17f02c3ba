"""Norms over the last dimension, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight + residual (arXiv 1910.07467, eq. 4).

    x, residual [..., W]; weight [W].
    """
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if residual is None else residual + y


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias + residual (arXiv 1607.06450).

    x, residual [..., W]; weight, bias [W].
    """
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y if residual is None else residual + y
