"""A Program read back as what it computes: a Llama-shaped decoder, or not one and why.

Not the model's name but its instructions decide: rms norm, q, k, v, rotary attention, output and residual,
rms norm, gated silu, down and residual, again and again. Whatever family compiles to this goes out as it;
anything else is refused at the instruction that differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import LOGITS, Instruction, Program, RopeSpec, Segment, View

SCALE_TOLERANCE = 1e-6  # attention scales are stored as their decimal digits


@dataclass(frozen=True)
class Vector:
    """Entries [start, start + count) of a stored vector."""

    name: str
    start: int
    count: int


@dataclass(frozen=True)
class Rows:
    """Rows [start, start + count) of a stored matrix; order: name of the column order of its inputs."""

    segment: Segment
    start: int
    count: int
    order: str | None = None
    bias: Vector | None = None


@dataclass(frozen=True)
class Layer:
    """One decoder block. attn_norm, ffn_norm: names of their weights, None: ones (a rotated model). q_norm,
    k_norm: names of norms over each head, before rotation."""

    attn_norm: str | None
    q: Rows
    k: Rows
    v: Rows
    output: Rows
    ffn_norm: str | None
    gate: Rows
    up: Rows
    down: Rows
    q_norm: str | None = None
    k_norm: str | None = None


@dataclass(frozen=True)
class LlamaShape:
    """The decoder and its sizes. window: positions that attention sees, 0: all before. head None: tied."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope: RopeSpec
    window: int
    embedding: Rows
    layers: tuple[Layer, ...]
    norm: str | None
    head: Rows | None


def llama_shape(program: Program) -> LlamaShape:
    """Read the program. Raises GristmillError with the first instruction that a Llama does not have."""
    return _Reader(program).run()


class _Reader:
    """Walks the instructions in order; `made` says which linear computed which columns of a value."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.at = 0
        self.made: dict[int, list[tuple[View, Instruction]]] = {}
        self.eps: set[float] = set()
        self.attentions: list[Instruction] = []

    def run(self) -> LlamaShape:
        first = self.take("embedding")
        self.require(not first.views and first.attribute("scale") == 1 and not first.attribute("offset"),
                     "scales or shifts its embeddings")  # fmt: skip
        embedding = self.whole(first)
        x, layers = first.out, []
        while self.peek() != "gather_rows":
            layer, x = self.layer(x)
            layers.append(layer)
        x = self.follow(self.take("gather_rows"), x)
        last = self.take("rms_norm")
        x = self.follow(last, x)
        head = self.plain(self.take("linear"), x)
        self.require(head.out.value == LOGITS and self.at == len(self.program.instructions),
                     "does more after its head")  # fmt: skip
        return self.shape(embedding, layers, last.vectors.get("weight"), self.whole(head))

    def layer(self, x: View) -> tuple[Layer, View]:
        norm = self.norm(x)
        while self.peek() == "linear":
            self.plain(self.take("linear"), norm.out)
        attention = self.take("attention")
        q, k, v = (self.rows(self.view(attention, name)) for name in "qkv")
        self.require("sinks" not in attention.vectors and not attention.attribute("softcap"),
                     "has attention sinks or caps its scores")  # fmt: skip
        self.attentions.append(attention)
        output = self.plain(self.take("linear"), attention.out, residual=x)
        second = self.norm(output.out)
        glu = self.take("linear")
        self.follow(glu, second.out)
        self.require(glu.attribute("glu") and glu.attribute("activation") == "silu" and self.unscaled(glu),
                     "has no silu gate")  # fmt: skip
        gate, up = self.halves(glu)
        down = self.plain(self.take("linear"), glu.out, residual=output.out)
        names = attention.vectors
        layer = Layer(
            norm.vectors.get("weight"), q, k, v, self.whole(output), second.vectors.get("weight"), gate, up,
            self.whole(down), names.get("q_norm"), names.get("k_norm"),
        )  # fmt: skip
        return layer, down.out

    def shape(self, embedding: Rows, layers: list[Layer], norm: str | None, head: Rows) -> LlamaShape:
        """The sizes, which all layers must share."""
        self.require(bool(layers), "has no layers")
        caches = {self.cache(a) for a in self.attentions}
        self.require(len(caches) == 1, "has layers of different attention")
        self.require(len(self.eps) == 1, "has norms of different epsilons")
        heads, kv_heads, k_dim, v_dim, window, rope, scale = caches.pop()
        spec = self.program.ropes[rope] if rope >= 0 else None
        if spec is None or spec.dims != k_dim or k_dim != v_dim:
            self.refuse("does not rotate whole heads, with values as wide as keys")
        self.require(abs(scale * k_dim**0.5 - 1) < SCALE_TOLERANCE, f"scales its attention by {scale:g}")
        tied = head.segment == embedding.segment and head.bias is None
        self.require(head.bias is None and head.order is None, "has a bias at its head")
        return LlamaShape(
            embedding.segment.k, layers[0].gate.count, heads, kv_heads, k_dim, self.eps.pop(), spec, window,
            embedding, tuple(layers), norm, None if tied else head,
        )  # fmt: skip

    def cache(self, attention: Instruction) -> tuple[int, int, int, int, int, int, float]:
        spec = self.program.caches[attention.attribute("cache")]
        return (
            attention.attribute("heads"), spec.kv_heads, spec.k_dim, spec.v_dim, spec.window,
            attention.attribute("rope"), attention.attribute("scale"),
        )  # fmt: skip

    def norm(self, x: View) -> Instruction:
        found = self.take("rms_norm")
        self.follow(found, x)
        return found

    def plain(self, found: Instruction, x: View, residual: View | None = None) -> Instruction:
        """A linear of x alone, plus the residual."""
        self.follow(found, x, residual)
        self.require(not found.attribute("glu") and found.attribute("activation") == "none"
                     and self.unscaled(found), "has a linear with an activation or a scale")  # fmt: skip
        self.made.setdefault(found.out.value, []).append((found.out, found))
        return found

    def unscaled(self, linear: Instruction) -> bool:
        return bool(linear.attribute("scale") == 1 and not linear.attribute("softcap"))

    def follow(self, found: Instruction, x: View, residual: View | None = None) -> View:
        """Check that an instruction reads x, and adds this residual; returns what it makes."""
        self.require(found.views.get("in") == x and found.views.get("residual") == residual,
                     "has another order of norms and residuals")  # fmt: skip
        if found.op == "rms_norm":
            self.eps.add(float(found.attribute("eps")))
        return found.out

    def view(self, attention: Instruction, name: str) -> View:
        found = attention.views[name]
        assert isinstance(found, View), "q, k and v are one view each"
        return found

    def rows(self, view: View) -> Rows:
        """The rows of one matrix that compute a view."""
        for out, linear in self.made.get(view.value, []):
            start = view.column - out.column
            if start >= 0 and start + view.width <= out.width:
                return self.cut(linear, start, view.width)
        self.refuse("reads q, k or v from more than one linear")

    def cut(self, linear: Instruction, start: int, count: int) -> Rows:
        """Rows [start, start + count) of all that a linear multiplies by, which one matrix must hold."""
        before = 0
        for segment in self.program.weights[str(linear.weight)]:
            if before <= start and start + count <= before + segment.n:
                bias = linear.vectors.get("bias")
                part = None if bias is None else Vector(bias, start, count)
                return Rows(segment, start - before, count, linear.vectors.get("order"), part)
            before += segment.n
        self.refuse("reads q, k or v from more than one matrix")

    def whole(self, found: Instruction) -> Rows:
        segments = self.program.weights[str(found.weight)]
        return self.cut(found, 0, sum(s.n for s in segments))

    def halves(self, glu: Instruction) -> tuple[Rows, Rows]:
        return self.cut(glu, 0, glu.out.width), self.cut(glu, glu.out.width, glu.out.width)

    def peek(self) -> str:
        rest = self.program.instructions[self.at : self.at + 1]
        return rest[0].op if rest else "the end"

    def take(self, op: str) -> Instruction:
        if self.peek() != op:
            self.refuse(f"has {self.peek()} where a Llama has {op}")
        self.at += 1
        return self.program.instructions[self.at - 1]

    def require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.refuse(otherwise)

    def refuse(self, reason: str) -> NoReturn:
        raise GristmillError(
            f"only Llama-shaped models can be written as GGUF; this one {reason} (instruction {self.at - 1}; "
            "`gristmill inspect --program` shows it)"
        )
