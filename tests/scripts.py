"""A decoder that torch.jit.script takes: every type is said, every number is an attribute."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gristmill.kernels.hook import attention

VOCABULARY, WIDTH, HEADS, HEAD = 258, 32, 4, 8


class Scripted(nn.Module):
    """Rotations by a formula, two heads of k and v, a tied head; ``hook``: by our attention and a window."""

    def __init__(self, hook: bool) -> None:
        super().__init__()
        self.hook, self.heads, self.head = hook, HEADS, HEAD
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.kv = nn.Linear(WIDTH, HEADS * HEAD), nn.Linear(WIDTH, 2 * 2 * HEAD)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, HEAD, 2).float() / HEAD))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., : self.head // 2], x[..., self.head // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.size(1)
        x = self.embed(tokens)
        angle = torch.arange(rows)[:, None] * self.inv_freq  # type: ignore[operator]
        y = self.norm(x)
        q = self.q(y).view(1, rows, self.heads, self.head).transpose(1, 2)
        k, v = self.kv(y).view(1, rows, 4, self.head).transpose(1, 2).chunk(2, 1)
        q, k = self.rotate(q, angle.cos(), angle.sin()), self.rotate(k, angle.cos(), angle.sin())
        if self.hook:
            y = attention(q, k, v, None, 6)
        else:
            k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(1, rows, -1))
        return F.linear(x, self.embed.weight)
