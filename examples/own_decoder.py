"""A decoder of one's own, trained for a moment, compiled to int4 and run: no transformers, no directory.

    python examples/own_decoder.py --steps 300 --out own.grist

The module is ordinary torch. What it owes the compiler is a forward from token ids to logits, and attention
by gristmill.attention.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

import gristmill

WIDTH, LAYERS, HEADS, KV_HEADS, LONGEST = 128, 3, 4, 2, 256
HEAD = WIDTH // HEADS


def byte_tokenizer() -> Tokenizer:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, T, HEAD] by tables [T, HEAD / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Block(nn.Module):
    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, HEAD)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        y = gristmill.attention(rotate(q, cos, sin), rotate(k, cos, sin), v, window=self.window)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """forward(tokens [B, T] int64) -> logits [B, T, vocabulary]; every second layer has a window."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.blocks = nn.ModuleList(Block(64 * (n % 2)) for n in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, vocabulary, bias=False)
        angles = torch.outer(torch.arange(LONGEST), 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        cos, sin = self.get_buffer("cos")[: tokens.shape[1]], self.get_buffer("sin")[: tokens.shape[1]]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def train(model: Decoder, ids: Tensor, steps: int) -> None:
    """Next-token prediction on random pieces of ``ids``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        starts = torch.randint(0, len(ids) - 65, (16,), generator=generator)
        batch = torch.stack([ids[s : s + 65] for s in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", default="own_decoder.grist")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text("utf-8")
    model = Decoder(tokenizer.get_vocab_size())
    train(model, torch.tensor(tokenizer.encode(text).ids), arguments.steps)
    result = gristmill.compile(
        model, arguments.out, tokenizer=tokenizer, weights="int4", group_size=32, gate_tokens=1000, force=True
    )
    print("\n".join(result.summary["gate"]))
    print(
        gristmill.load(arguments.out).generate("    def ", max_new_tokens=120, temperature=0.5, seed=1).text
    )


if __name__ == "__main__":
    main()
