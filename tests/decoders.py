"""Small decoders written by hand, in styles that differ: what a frontend has to take in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gristmill

VOCABULARY, WIDTH, HEADS, HEAD, BLOCK = 258, 64, 4, 16, 96


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that make logits differ from row to row; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15, generator=generator)
        else:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


class GptBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, WIDTH), nn.Dropout(0.1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, width = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).split(WIDTH, dim=2)
        q, k, v = (t.view(batch, rows, HEADS, width // HEADS).transpose(1, 2) for t in (q, k, v))
        y = self.attend(q, k, v).transpose(1, 2).contiguous().view(batch, rows, width)
        x = x + self.c_proj(y)
        return x + self.mlp(self.ln_2(x))


class SpelledBlock(GptBlock):
    """Attention as a softmax over a buffer's mask."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(BLOCK, BLOCK)).view(1, 1, BLOCK, BLOCK))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q.shape[2]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        bias = self.bias
        assert isinstance(bias, Tensor)
        scores = scores.masked_fill(bias[:, :, :rows, :rows] == 0, float("-inf"))
        return F.dropout(F.softmax(scores, dim=-1), 0.1, self.training) @ v


class Gpt(nn.Module):
    """Learned positions that it counts itself, a tied head, no attention of ours."""

    def __init__(self, block: type[GptBlock] = GptBlock, layers: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.h = nn.ModuleList(block() for _ in range(layers))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        rows = idx.size(1)
        assert rows <= BLOCK, "longer than the table"
        x = self.wte(idx) + self.wpe(torch.arange(0, rows, dtype=torch.long, device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x)), None


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5).type_as(x) * self.weight


def angles(rows: int, base: float = 10000.0) -> Tensor:
    return torch.outer(torch.arange(rows).float(), base ** (-torch.arange(0, HEAD, 2).float() / HEAD))


def rotate_complex(x: Tensor, table: Tensor) -> Tensor:
    """x: [B, T, H, D]; pairs of columns as complex numbers, as Llama's own code has it."""
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * table[None, :, None, :]
    return torch.view_as_real(turned).flatten(3).type_as(x)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class LlamaBlock(nn.Module):
    def __init__(self, kv_heads: int, window: int) -> None:
        super().__init__()
        self.kv_heads, self.window = kv_heads, window
        self.attention_norm, self.ffn_norm = Norm(), Norm()
        self.wq = nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        self.wk = nn.Linear(WIDTH, kv_heads * HEAD, bias=False)
        self.wv = nn.Linear(WIDTH, kv_heads * HEAD, bias=False)
        self.wo = nn.Linear(HEADS * HEAD, WIDTH, bias=False)
        self.w1, self.w3 = nn.Linear(WIDTH, 96, bias=False), nn.Linear(WIDTH, 96, bias=False)
        self.w2 = nn.Linear(96, WIDTH, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        batch, rows, _ = x.shape
        y = self.attention_norm(x)
        q = rotate_complex(self.wq(y).view(batch, rows, HEADS, HEAD), table)
        k = rotate_complex(self.wk(y).view(batch, rows, self.kv_heads, HEAD), table)
        v = self.wv(y).view(batch, rows, self.kv_heads, HEAD)
        y = gristmill.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window=self.window)
        x = x + self.wo(y.transpose(1, 2).reshape(batch, rows, -1))
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Llama(nn.Module):
    """Rotary tables in a complex buffer, fewer heads of k and v, every second layer with a window."""

    def __init__(self, layers: int = 2, window: int = 7, rows: int = 128) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(LlamaBlock(2, window * (n % 2)) for n in range(layers))
        self.norm, self.output = Norm(), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer(
            "freqs_cis", torch.polar(torch.ones(rows, HEAD // 2), angles(rows)), persistent=False
        )

    def forward(self, tokens: Tensor) -> Tensor:
        table = self.freqs_cis
        assert isinstance(table, Tensor)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, table[: tokens.shape[1]])
        return self.output(self.norm(x)).float()


class Repeated(nn.Module):
    """Positions given, rotations backwards by a formula, norms after them, repeated heads, a mask."""

    def __init__(self, window: int = 0) -> None:
        super().__init__()
        self.window = window
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2) * HEAD, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2).float() / HEAD)
        self.register_buffer("inv_freq", frequencies)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        assert isinstance(self.inv_freq, Tensor)
        x = self.embed(tokens)
        angle = positions[..., None].float() * self.inv_freq
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        q, k, v = (
            self.qkv(self.norm(x)).unflatten(-1, (HEADS + 2, HEAD)).transpose(1, 2).split([HEADS, 1, 1], 1)
        )
        q, k = rotate_halves(q, cos, -sin), rotate_halves(k, cos, -sin)
        q, k = F.rms_norm(q, (HEAD,), eps=1e-6), F.rms_norm(k, (HEAD,), eps=1e-6)
        k, v = (t[:, :, None].expand(-1, -1, HEADS, -1, -1).flatten(1, 2) for t in (k, v))
        seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
        if self.window:
            seen = seen.triu(1 - self.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return 15 * torch.tanh(x @ self.embed.weight.T / 15)
