"""The same instructions with the operators of ONNX Runtime: products with packed integers, norms with the
residual sum before them, and attention over one buffer for past and present."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from gristmill.export import onnx_weights
from gristmill.export.onnx_attention import PlainAttention, rope_tables
from gristmill.export.onnx_lowering import ACTIVATIONS, Lowering
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import CacheSpec, Instruction, Segment, View

TURNED = 16  # what divides heads that the attention operator itself turns, and all columns of them
FLOAT_ACTIVATIONS, INT8_ACTIVATIONS = 1, 4  # MatMulNBits' accuracy levels


class RuntimeLowering(Lowering):
    """See Lowering."""

    opset = 23  # the first with RMSNormalization
    attention_type: type[np.floating[Any]] = np.float32  # of what the attention operator takes and gives

    def make_attention(self) -> GroupQueryAttention:
        return GroupQueryAttention(self)

    def narrow(self, x: str) -> str:
        """A value as attention takes it."""
        return x

    def wide(self, x: str) -> str:
        """What attention gives as others take it, f32."""
        return x

    def product(self, x: str, segments: list[Segment], rounds: bool) -> str:
        kind = onnx_weights.Kind.of(segments[0])
        if not kind.integer:
            return super().product(x, segments, rounds)
        matrix = onnx_weights.blocks(self.graph, self.stored, segments)
        found: str = self.graph.microsoft(
            "MatMulNBits", x, matrix.data, matrix.scale, *([matrix.zero] if matrix.zero else []),
            K=kind.k, N=matrix.n, bits=kind.bits, block_size=kind.block,
            accuracy_level=INT8_ACTIVATIONS if rounds else FLOAT_ACTIVATIONS,
        )  # fmt: skip
        return found

    def activation(self, x: str, name: str) -> str:
        if name == "silu":
            found: str = self.graph.microsoft("QuickGelu", x, alpha=1.0)
            return found
        return x if name == "none" else ACTIVATIONS[name](self.graph, x)

    def _rms_norm(self, i: Instruction) -> str | tuple[str, str]:
        """A residual sum that nothing has read yet is made by the norm itself."""
        view = i.views["in"]
        assert isinstance(view, View)
        pending, weight = self.values[view.value], self.vector(i, "weight")
        if not isinstance(pending, tuple) or weight is None or view.width != self.width(view):
            return super()._rms_norm(i)
        y, *_, total = self.graph.microsoft(
            "SkipSimplifiedLayerNormalization", *pending, weight, outputs=4, epsilon=i.attribute("eps")
        )
        self.values[view.value] = total
        return self.with_residual(i, y)

    def rms_norm(self, x: str, weight: str | None, eps: float, width: int) -> str:
        weight = weight or self.graph.constant([1.0] * width)
        found: str = self.graph.op("RMSNormalization", x, weight, axis=-1, epsilon=eps)
        return found


class GroupQueryAttention(PlainAttention):
    """One node a layer: rope, append and attention; keys and values are [batch, kv_heads, max_len, dim]."""

    def __init__(self, lowering: RuntimeLowering) -> None:
        super().__init__(lowering)
        self._runtime = lowering
        self._lengths: tuple[str, str] | None = None

    def lower(self, i: Instruction) -> str:
        g, number, narrow = self.graph, i.attribute("cache"), self._runtime.narrow
        spec = self.lowering.program.caches[number]
        refuse_shapes(spec, i)
        queries, rope, turns = self._queries(i, spec)
        queries = [narrow(x) if x else "" for x in queries]
        tables = list(self._rope_weights(rope, self._runtime.attention_type)) if turns else ["", ""]
        sinks = self.lowering.vector(i, "sinks")
        past = [x for name in ("key", "value") for x in self.past(number, name, spec)]
        inputs = [*queries, *past, *self._seen(), *tables, *(["", "", narrow(sinks)] if sinks else [])]
        while not inputs[-1]:
            inputs.pop()
        present = [x for name in ("key", "value") for x in self.present(number, name, spec)]
        outputs = [f"attention_{number}", *present]
        spec_of_rope = self.lowering.program.ropes[rope] if turns else None
        g.microsoft(
            "GroupQueryAttention", *inputs, outputs=outputs, num_heads=i.attribute("heads"),
            kv_num_heads=spec.kv_heads, scale=i.attribute("scale"), softcap=i.attribute("softcap"),
            local_window_size=spec.window or -1, do_rotary=int(turns),
            rotary_interleaved=int(spec_of_rope is not None and spec_of_rope.style == "interleaved"),
        )  # fmt: skip
        return self._runtime.wide(outputs[0])

    def _queries(self, i: Instruction, spec: CacheSpec) -> tuple[list[str], int, bool]:
        """Queries, keys and values, packed where they lie behind each other; the rope, and whether the node
        is to turn them."""
        low, rope = self.lowering, i.attribute("rope")
        turns = rope >= 0 and low.program.ropes[rope].dims == spec.k_dim and spec.k_dim % TURNED == 0
        views = [i.views[name] for name in "qkv"]
        if "q_norm" not in i.vectors and "k_norm" not in i.vectors and (turns or rope < 0):
            if packed := _whole(views, low):
                return [low.read(packed), "", ""], rope, turns
            return [low.given(i, name) for name in "qkv"], rope, turns
        q, k = (
            self._prepared(i, name, heads, spec, not turns)
            for name, heads in (("q", i.attribute("heads")), ("k", spec.kv_heads))
        )
        return [q, k, low.given(i, "v")], rope, turns

    def _prepared(self, i: Instruction, name: str, heads: int, spec: CacheSpec, turn: bool) -> str:
        """Normalized, and turned where only some columns of a head are: [batch, sequence, heads * dim]."""
        g, x, norm = self.graph, self.lowering.given(i, name), self.lowering.vector(i, f"{name}_norm")
        if norm is not None:
            split = g.op("Reshape", x, g.integers(0, 0, heads, spec.k_dim))
            normed = self.lowering.rms_norm(split, norm, i.attribute("norm_eps"), spec.k_dim)
            x = g.op("Reshape", normed, g.integers(0, 0, heads * spec.k_dim))
        if turn and i.attribute("rope") >= 0:
            rope = self.lowering.program.ropes[i.attribute("rope")]
            cos, sin = self._rope_weights(i.attribute("rope"), np.float32)
            x = g.microsoft(
                "RotaryEmbedding", x, self.lowering.positions(), cos, sin, num_heads=heads,
                rotary_embedding_dim=rope.dims, interleaved=int(rope.style == "interleaved"),
            )  # fmt: skip
        return x

    def _rope_weights(self, number: int, dtype: type[np.floating[Any]]) -> tuple[str, str]:
        low, g = self.lowering, self.graph
        tables = rope_tables(low.stored, low.program.ropes[number], low.max_len)
        suffix = "" if dtype is np.float32 else f".{dtype.__name__}"
        names = [f"rope.{number}.{name}{suffix}" for name in ("cos", "sin")]
        cos, sin = (g.weight(name, table.astype(dtype)) for name, table in zip(names, tables))
        return cos, sin

    def _seen(self) -> tuple[str, str]:
        """Each sequence's last position [batch] int32, and the longest's length, int32."""
        if self._lengths is None:
            g, mask = self.graph, self.lowering.mask
            count = g.op("ReduceSum", mask, g.integers(1), keepdims=0)
            last = g.op("Cast", g.op("Sub", count, g.integers(1)), to=TensorProto.INT32)
            total = g.op("Squeeze", g.op("Shape", mask, start=1, end=2))
            self._lengths = last, g.op("Cast", total, to=TensorProto.INT32)
        return self._lengths


def refuse_shapes(spec: CacheSpec, i: Instruction) -> None:
    """Raises GristmillError for heads that the operator does not take."""
    if spec.k_dim != spec.v_dim or spec.k_dim % 8:
        raise GristmillError(
            f"heads of {spec.k_dim} key and {spec.v_dim} value columns are not for ONNX Runtime's "
            "GroupQueryAttention, which takes equal multiples of 8; export with --plain"
        )


def _whole(views: list[View | list[View]], low: Lowering) -> View | None:
    """The view that q, k and v fill, one behind the other."""
    q, k, v = views
    assert isinstance(q, View) and isinstance(k, View) and isinstance(v, View)
    follow = q.column + q.width == k.column and k.column + k.width == v.column
    together = follow and q.value == k.value == v.value
    return View(q.value, q.column, q.width + k.width + v.width) if together else None
