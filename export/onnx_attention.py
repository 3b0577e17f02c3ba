"""Attention in standard ONNX operators: past keys and values in, the same with the new rows behind out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from gristmill.export import onnx_cache
from gristmill.export.stored import Stored
from gristmill.runtime.program import CacheSpec, Instruction, RopeSpec

if TYPE_CHECKING:
    from gristmill.export.onnx_lowering import Lowering

HIDDEN = -3.4e38  # a score that no probability is left of; -inf makes NaN of a row that sees nothing


def rope_tables(stored: Stored, spec: RopeSpec, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [max_len, dims / 2] f32 of every position, times the rope's scale; angles are f32."""
    angles = np.arange(max_len, dtype=np.float32)[:, None] * stored.tensor(spec.inv_freq).reshape(-1)
    wide = angles.astype(np.float32).astype(np.float64)
    return (np.cos(wide) * spec.scale).astype(np.float32), (np.sin(wide) * spec.scale).astype(np.float32)


class PlainAttention:
    """Masks and tables are made once and shared by all layers."""

    def __init__(self, lowering: Lowering) -> None:
        self.lowering, self.graph = lowering, lowering.graph
        self._hidden: dict[int, str] = {}
        self._tables: dict[int, tuple[str, str]] = {}

    def lower(self, i: Instruction) -> str:
        """Takes past_key_values.N.key and .value [batch, kv_heads, past, dim], gives present.N; of int8
        caches their steps and offsets as well."""
        g, number = self.graph, i.attribute("cache")
        spec = self.lowering.program.caches[number]
        q, k = self._heads(i, "q", i.attribute("heads"), spec), self._heads(i, "k", spec.kv_heads, spec)
        v = self._split(self.lowering.given(i, "v"), spec.kv_heads, spec.v_dim)
        keys, values = (self._append(number, name, spec, new) for name, new in (("key", k), ("value", v)))
        heads, groups = i.attribute("heads"), i.attribute("heads") // spec.kv_heads
        q = g.op("Reshape", q, g.integers(0, spec.kv_heads, groups, -1, spec.k_dim))
        turned = g.op("Transpose", g.op("Unsqueeze", keys, g.integers(2)), perm=[0, 1, 2, 4, 3])
        scores = g.op("Mul", g.op("MatMul", q, turned), g.constant(i.attribute("scale")))
        if cap := i.attribute("softcap"):
            scores = g.op("Mul", g.op("Tanh", g.op("Div", scores, g.constant(cap))), g.constant(cap))
        weights = self._softmax(i, g.op("Add", scores, self._mask(spec.window)), spec.kv_heads, groups)
        out = g.op("MatMul", weights, g.op("Unsqueeze", values, g.integers(2)))
        out = g.op("Transpose", out, perm=[0, 3, 1, 2, 4])
        found: str = g.op("Reshape", out, g.integers(0, 0, heads * spec.v_dim))
        return found

    def _append(self, number: int, name: str, spec: CacheSpec, new: str) -> str:
        """All keys or values [batch, kv_heads, total, dim] f32 as they are multiplied, the new rows last."""
        rounds = onnx_cache.dtype_of(spec, name) == "int8"
        rows = onnx_cache.rounded(self.graph, new) if rounds else [new]
        parts = [
            self.graph.op("Concat", past, row, axis=2, outputs=[present])
            for past, row, present in zip(
                self.past(number, name, spec), rows, self.present(number, name, spec), strict=True
            )
        ]
        return onnx_cache.values(self.graph, *parts) if rounds else parts[0]

    def past(self, number: int, name: str, spec: CacheSpec) -> list[str]:
        """Inputs of the keys or values of a cache: themselves, of int8 also steps and offsets."""
        return [
            self.graph.input(f"past_key_values.{number}.{part.name}", part.kind, part.shape("past"))
            for part in onnx_cache.parts(spec, name)
        ]

    def present(self, number: int, name: str, spec: CacheSpec) -> list[str]:
        return [
            self.graph.output(f"present.{number}.{part.name}", part.kind, part.shape("total"))
            for part in onnx_cache.parts(spec, name)
        ]

    def _heads(self, i: Instruction, name: str, heads: int, spec: CacheSpec) -> str:
        """Queries or keys [batch, heads, sequence, dim] as they are multiplied. A Hadamard transform of both
        changes no score of keys that are not rounded, and is left out."""
        x = self._split(self.lowering.given(i, name), heads, spec.k_dim)
        norm = self.lowering.vector(i, f"{name}_norm")
        if norm is not None:
            x = self.lowering.rms_norm(x, norm, i.attribute("norm_eps"), spec.k_dim)
        x = x if i.attribute("rope") < 0 else self._turn(x, i.attribute("rope"), spec.k_dim)
        block = i.attribute("hadamard")
        return onnx_cache.hadamard(self.graph, x, block) if block and spec.k_dtype == "int8" else x

    def _split(self, x: str, heads: int, dim: int) -> str:
        g = self.graph
        split = g.op("Reshape", x, g.integers(0, 0, heads, dim))
        found: str = g.op("Transpose", split, perm=[0, 2, 1, 3])
        return found

    def _turn(self, x: str, number: int, dim: int) -> str:
        """Rope of the first columns of x [batch, heads, sequence, dim]."""
        g, spec = self.graph, self.lowering.program.ropes[number]
        cos, sin = self._angles(number)
        rest = ""
        if spec.dims < dim:
            x, rest = g.op("Split", x, g.integers(spec.dims, dim - spec.dims), outputs=2, axis=-1)
        half = spec.dims // 2
        if spec.style == "half":
            a, b = g.op("Split", x, outputs=2, axis=-1, num_outputs=2)
        else:
            pairs = g.op("Reshape", x, g.integers(0, 0, 0, half, 2))
            a, b = (g.op("Gather", pairs, g.constant(at, np.int64), axis=-1) for at in (0, 1))
        first = g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin))
        second = g.op("Add", g.op("Mul", b, cos), g.op("Mul", a, sin))
        if spec.style == "half":
            turned = g.op("Concat", first, second, axis=-1)
        else:
            both = [g.op("Unsqueeze", part, g.integers(-1)) for part in (first, second)]
            turned = g.op("Reshape", g.op("Concat", *both, axis=-1), g.integers(0, 0, 0, spec.dims))
        return g.op("Concat", turned, rest, axis=-1) if rest else turned

    def _angles(self, number: int) -> tuple[str, str]:
        """cos and sin of the batch's positions, [batch, 1, sequence, dims / 2]."""
        if number not in self._tables:
            g, low = self.graph, self.lowering
            tables = rope_tables(low.stored, low.program.ropes[number], low.max_len)
            names = [g.weight(f"rope.{number}.{name}", table) for name, table in zip(("cos", "sin"), tables)]
            rows = [g.op("Gather", name, low.positions(), axis=0) for name in names]
            cos, sin = (g.op("Unsqueeze", row, g.integers(1)) for row in rows)
            self._tables[number] = cos, sin
        return self._tables[number]

    def _mask(self, window: int) -> str:
        """What is added to scores, [batch, 1, 1, sequence, total]: by columns, so that padding on the left
        shifts nothing."""
        if window not in self._hidden:
            g, low = self.graph, self.lowering
            total = g.op("Shape", low.mask, start=1, end=2)
            past = g.op("Sub", total, g.op("Shape", low.ids, start=1, end=2))
            zero, one = g.constant(0, np.int64), g.constant(1, np.int64)
            end = g.op("Squeeze", total)
            row = g.op("Unsqueeze", g.op("Range", g.op("Squeeze", past), end, one), g.integers(-1))
            column = g.op("Unsqueeze", g.op("Range", zero, end, one), g.integers(0))
            sees = g.op("LessOrEqual", column, row)
            if window:
                near = g.op("Less", g.op("Sub", row, column), g.constant(window, np.int64))
                sees = g.op("And", sees, near)
            kept = g.op("Unsqueeze", g.op("Cast", low.mask, to=TensorProto.BOOL), g.integers(1, 2, 3))
            sees = g.op("And", kept, sees)
            self._hidden[window] = g.op("Where", sees, g.constant(0.0), g.constant(HIDDEN))
        return self._hidden[window]

    def _softmax(self, i: Instruction, scores: str, kv_heads: int, groups: int) -> str:
        """With sinks, each head has a score more, of a column that has no value."""
        g, sinks = self.graph, self.lowering.vector(i, "sinks")
        found: str
        if sinks is None:
            found = g.op("Softmax", scores, axis=-1)
            return found
        shape = g.op("Shape", scores)
        lead = g.op("Slice", shape, g.integers(0), g.integers(4))
        shape = g.op("Concat", lead, g.integers(1), axis=0)
        column = g.op("Expand", g.op("Reshape", sinks, g.integers(1, kv_heads, groups, 1, 1)), shape)
        weights = g.op("Softmax", g.op("Concat", scores, column, axis=-1), axis=-1)
        found = g.op("Slice", weights, g.integers(0), g.integers(-1), g.integers(-1))
        return found
