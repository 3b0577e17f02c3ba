"""A plain numpy interpreter of programs, to hold the executors to.

It follows the definition of program.json with no thought of speed: float64 inside, activations and caches
rounded where the format says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from programs import Array, Program, View

ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    "none": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}
FUNCTIONS: dict[str, Callable[..., Array]] = {
    **ACTIVATIONS,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "square": np.square,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "abs": np.abs,
    "reciprocal": np.reciprocal,
}


def quantize_rows(x: Array, group: int) -> Array:
    """int8 per row and group of columns, and back."""
    out = x.astype(np.float64).copy()
    for at in range(0, x.shape[1], group):
        part = x[:, at : at + group]
        amax = np.abs(part).max(1, keepdims=True)
        out[:, at : at + group] = np.rint(part * (127 / np.where(amax > 0, amax, 1))) * (amax / 127)
    return out


def quantize_group(x: Array, levels: int, narrowest: float, stored: type) -> Array:
    """The best of 16 grids step * (0..levels) + offset, both kept as `stored`, and back. x [D] f32."""
    middle, range_ = np.float32(0.5) * x.max() + np.float32(0.5) * x.min(), x.max() - x.min()
    best, least = np.full(len(x), np.float32(stored(middle)), np.float64), np.inf
    for i in range(16):
        step = np.float32(stored(np.float32(narrowest + i / 32) * (range_ / np.float32(levels))))
        if step <= 1e-35:
            continue
        offset = np.float32(stored(middle - np.float64(levels) / 2 * step))
        q = np.clip(np.rint((x - offset) * (np.float32(1) / step)), 0, levels)
        values = q.astype(np.float64) * step + offset
        if (error := np.square(values - x).sum()) < least:
            best, least = values, error
    return best


def round_fp8(x: Array) -> Array:
    """To the nearest e4m3 value, ties to even; |x| <= 448."""
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-30))), -6) - 3)
    return np.rint(x / step) * step


def quantize_cache(x: Array, dtype: str) -> Array:
    """A key or value as the cache gives it back. x [D]."""
    x = x.astype(np.float32)
    if dtype == "int8":
        return quantize_group(x, 255, 1.0, np.float32)
    if dtype == "int4":
        groups = [x[at : at + 32] for at in range(0, len(x), 32)]
        return np.concatenate([quantize_group(group, 15, 0.75, np.float16) for group in groups])
    if dtype == "fp8":
        amax = np.abs(x).max()
        return round_fp8(x * (np.float32(448) / amax)).astype(np.float64) * (amax / np.float32(448))
    return x.astype({"f32": np.float32, "f16": np.float16}[dtype]).astype(np.float64)


def hadamard(x: Array, block: int) -> Array:
    """Each `block` columns times the orthonormal Walsh-Hadamard matrix. x [..., D]."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (x.reshape(*x.shape[:-1], -1, block) @ (matrix / math.sqrt(block))).reshape(x.shape)


class Reference:
    """Runs a Program row by row in numpy; keeps every position it was ever given."""

    def __init__(self, program: Program) -> None:
        self.p = program
        # (cache, slot, position) -> k, v [kv_heads, dim]
        self.cache: dict[tuple[int, int, int], tuple[Array, Array]] = {}

    def forward(self, tokens: Array, positions: Array, slots: Array, rows: Array) -> Array:
        self.ids = {"tokens": tokens, "positions": positions, "slots": slots, "rows": rows}
        self.values = {
            i: np.full((len(tokens) if v["rows"] == "T" else len(rows), v["width"]), np.nan)
            for i, v in enumerate(self.p.json["values"])
        }
        self.values[-1] = np.full((len(rows), self.p.vocabulary), np.nan)
        for instruction in self.p.json["instructions"]:
            result = getattr(self, instruction["op"])(instruction)
            self.view(instruction["out"])[:] = result
        return self.values[-1].astype(np.float32)

    def forward_hidden(
        self, tokens: Array, positions: Array, slots: Array, rows: Array
    ) -> tuple[Array, Array]:
        """The logits, and what the head multiplied."""
        logits = self.forward(tokens, positions, slots, rows)
        head = next(i for i in self.p.json["instructions"] if i["out"][0] == -1)
        return logits, self.view(head["in"]).astype(np.float32)

    def view(self, view: View) -> Array:
        return self.values[view[0]][:, view[1] : view[1] + view[2]]

    def vector(self, name: str | None, absent: float) -> Array:
        return np.array(absent) if name is None else self.p.tensors[name].astype(np.float64)

    def residual(self, i: dict[str, Any]) -> Array:
        return self.view(i["residual"]) if i.get("residual") else np.array(0.0)

    def embedding(self, i: dict[str, Any]) -> Array:
        rows = self.p.matrices[i["weight"]][self.ids[i["ids"]] + i.get("offset", 0)]
        return i.get("scale", 1.0) * rows + self.residual(i)

    def rms_norm(self, i: dict[str, Any]) -> Array:
        return rms(self.view(i["in"]), i["eps"]) * self.vector(i.get("weight"), 1) + self.residual(i)

    def layer_norm(self, i: dict[str, Any]) -> Array:
        x = self.view(i["in"])
        x = x - x.mean(1, keepdims=True)
        return (
            rms(x, i["eps"]) * self.vector(i.get("weight"), 1)
            + self.vector(i.get("bias"), 0)
            + self.residual(i)
        )

    def linear(self, i: dict[str, Any]) -> Array:
        x = self.view(i["in"])
        if i.get("order"):
            x = x[:, self.p.tensors[i["order"]]]
        if i["act_group"]:
            x = quantize_rows(x, i["act_group"])
        y = x @ self.p.matrices[i["weight"]].T + self.vector(i.get("bias"), 0)
        activation = ACTIVATIONS[i.get("activation", "none")]
        half = y.shape[1] // 2
        out = activation(y[:, :half]) * y[:, half:] if i.get("glu") else activation(y)
        return cap(out * i.get("scale", 1.0), i.get("softcap", 0.0)) + self.residual(i)

    def gather_rows(self, i: dict[str, Any]) -> Array:
        return self.view(i["in"])[self.ids["rows"]]

    def pointwise(self, i: dict[str, Any]) -> Array:
        registers = [self.view(view) for view in i["in"]]
        for name, *arguments in i["steps"]:
            parts = [
                np.array(a["const"]) if isinstance(a, dict) else registers[a]
                for a in arguments
                if a is not None
            ]
            registers.append(FUNCTIONS[name](*parts))
        return registers[-1]

    def attention(self, i: dict[str, Any]) -> Array:
        spec = self.p.json["caches"][i["cache"]]
        for t in range(len(self.ids["tokens"])):
            k = self.heads(i, "k", t, spec["kv_heads"], i.get("k_norm"))
            v = self.view(i["v"])[t].reshape(spec["kv_heads"], -1)
            k = np.stack([quantize_cache(head, spec["k_dtype"]) for head in k])
            v = np.stack([quantize_cache(head, spec["v_dtype"]) for head in v])
            self.cache[i["cache"], int(self.ids["slots"][t]), int(self.ids["positions"][t])] = k, v
        return np.stack([self.attend(i, spec, t) for t in range(len(self.ids["tokens"]))])

    def heads(self, i: dict[str, Any], name: str, t: int, count: int, norm: str | None) -> Array:
        x = self.view(i[name])[t].reshape(count, -1)
        if norm:
            x = rms(x, i["norm_eps"]) * self.vector(norm, 1)
        if i.get("rope", -1) >= 0:
            x = self.rotate(x, self.p.json["ropes"][i["rope"]], int(self.ids["positions"][t]))
        return hadamard(x, i["hadamard"]) if i.get("hadamard") else x

    def rotate(self, x: Array, rope: dict[str, Any], position: int) -> Array:
        angle = (np.float32(position) * self.p.tensors[rope["inv_freq"]]).astype(np.float64)
        cos, sin, half = np.cos(angle) * rope["scale"], np.sin(angle) * rope["scale"], rope["dims"] // 2
        first, second = (
            (slice(0, half), slice(half, 2 * half))
            if rope["style"] == "half"
            else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        )
        out = x.copy()
        out[:, first] = x[:, first] * cos - x[:, second] * sin
        out[:, second] = x[:, second] * cos + x[:, first] * sin
        return out

    def attend(self, i: dict[str, Any], spec: dict[str, Any], t: int) -> Array:
        slot, position = int(self.ids["slots"][t]), int(self.ids["positions"][t])
        first = max(0, position - spec["window"] + 1) if spec["window"] else 0
        seen = [self.cache[i["cache"], slot, p] for p in range(first, position + 1)]
        group = i["heads"] // spec["kv_heads"]
        k, v = (np.repeat(np.stack([s[part] for s in seen]), group, axis=1) for part in (0, 1))
        q = self.heads(i, "q", t, i["heads"], i.get("q_norm"))
        score = cap(np.einsum("hd,shd->hs", q, k) * i["scale"], i.get("softcap", 0.0))
        sink = self.vector(i.get("sinks"), -np.inf) * np.ones(i["heads"])
        most = np.maximum(score.max(1), sink)[:, None]
        weight = np.exp(score - most)
        total = weight.sum(1, keepdims=True) + np.exp(sink[:, None] - most)
        return np.einsum("hs,shd->hd", weight / total, v).reshape(-1)


def rms(x: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def cap(x: Array, limit: float) -> Array:
    return limit * np.tanh(x / limit) if limit else x
