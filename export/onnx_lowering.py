"""Instructions of a Program as ONNX nodes: one method an instruction, over values [batch, rows, width].

`Lowering` is what both flavours have alike and, by itself, the plain one: standard operators alone. The
operators of ONNX Runtime are in onnx_runtime_ops.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto

from gristmill.export import onnx_weights
from gristmill.export.onnx_attention import PlainAttention
from gristmill.export.onnx_graph import Graph
from gristmill.export.stored import Stored
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import LOGITS, Instruction, Program, Segment, View

POINTWISE = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min", "neg": "Neg",
    "exp": "Exp", "tanh": "Tanh", "sigmoid": "Sigmoid", "relu": "Relu", "sqrt": "Sqrt", "abs": "Abs",
    "reciprocal": "Reciprocal",
}  # fmt: skip
Sum = tuple[str, str]  # a residual addition that nothing has read yet
Pieces = dict[tuple[int, int], str]  # what was written to columns of a value, by first column and width


class Lowering:
    """Writes `program` into `graph`.

    all_rows: logits of the rows that an input `rows` names, and hidden states; else of the last row.
    """

    opset = 21  # the first whose DequantizeLinear has blocks

    def __init__(self, program: Program, stored: Stored, graph: Graph, max_len: int, all_rows: bool) -> None:
        self.program, self.stored, self.graph = program, stored, graph
        self.max_len, self.all_rows = max_len, all_rows
        self.values: dict[int, str | Sum | Pieces] = {}
        self._inputs: dict[str, str] = {}
        self.ids = graph.input("input_ids", TensorProto.INT64, ["batch", "sequence"])
        self.mask = graph.input("attention_mask", TensorProto.INT64, ["batch", "total"])
        self.attention = self.make_attention()

    def make_attention(self) -> Any:
        return PlainAttention(self)

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        """progress: called with the share of the instructions that are written."""
        for number, instruction in enumerate(self.program.instructions, start=1):
            self.write(instruction.out, getattr(self, f"_{instruction.op}")(instruction))
            if progress is not None:
                progress(number / len(self.program.instructions))
        rows: int | str = "rows" if self.all_rows else 1
        whole = View(LOGITS, 0, self.program.vocabulary)
        self._name(self.read(whole), "logits", rows, whole.width)
        if self.all_rows and self.program.hidden is not None:
            hidden = self.program.hidden
            self._name(self.read(hidden), "hidden_states", rows, hidden.width)

    def _name(self, value: str, name: str, rows: int | str, width: int) -> None:
        self.graph.op("Identity", value, outputs=[name])
        self.graph.output(name, TensorProto.FLOAT, ["batch", rows, width])

    def positions(self) -> str:
        """The input position_ids [batch, sequence], which not every model reads."""
        return self._input("position_ids", ["batch", "sequence"])

    def _input(self, name: str, shape: list[int | str]) -> str:
        if name not in self._inputs:
            self._inputs[name] = self.graph.input(name, TensorProto.INT64, shape)
        return self._inputs[name]

    # ---- values

    def read(self, view: View) -> str:
        found, g = self.values[view.value], self.graph
        if isinstance(found, dict):
            if (piece := found.get((view.column, view.width))) is not None:
                return piece
            found = self.values[view.value] = self._whole(found, self.width(view))
        if isinstance(found, tuple):
            found = self.values[view.value] = g.op("Add", *found)
        if view.width == self.width(view):
            return found
        ends = (g.integers(view.column), g.integers(view.column + view.width), g.integers(-1))
        sliced: str = g.op("Slice", found, *ends)
        return sliced

    def write(self, view: View, result: str | Sum) -> None:
        if view.width == self.width(view):
            self.values[view.value] = result
            return
        pieces = self.values.setdefault(view.value, {})
        if not isinstance(pieces, dict):
            raise GristmillError(f"value {view.value} is overwritten in part, which ONNX has no operator for")
        piece = self.graph.op("Add", *result) if isinstance(result, tuple) else result
        pieces[view.column, view.width] = piece

    def _whole(self, pieces: Pieces, width: int) -> str:
        """Pieces side by side; each begins where another ends."""
        ordered = sorted(pieces.items())
        ends = [column + count for (column, count), _ in ordered]
        assert [column for (column, _), _ in ordered] == [0, *ends[:-1]] and ends[-1] == width, "a hole"
        found: str = self.graph.op("Concat", *(piece for _, piece in ordered), axis=-1)
        return found

    def width(self, view: View) -> int:
        return self.program.vocabulary if view.value == LOGITS else self.program.values[view.value].width

    def given(self, i: Instruction, name: str) -> str:
        view = i.views[name]
        assert isinstance(view, View), f"{i.op}: {name} is one view"
        return self.read(view)

    def vector(self, i: Instruction, name: str) -> str | None:
        """A vector of the weights, f32 (column orders int64)."""
        return self.named_vector(i.vectors[name]) if name in i.vectors else None

    def named_vector(self, name: str) -> str:
        array = self.stored.tensor(name).reshape(-1)
        integers = np.issubdtype(array.dtype, np.signedinteger)
        values = array.astype(np.int64) if integers else onnx_weights.float_values(array)
        return self.graph.weight(name, values)

    def with_residual(self, i: Instruction, y: str) -> str | Sum:
        return (self.given(i, "residual"), y) if "residual" in i.views else y

    # ---- instructions

    def _embedding(self, i: Instruction) -> str | Sum:
        ids = self._ids(i)
        y = self._rows_of(self._segments(i), ids)
        if i.attribute("scale") != 1:
            y = self.graph.op("Mul", y, self.graph.constant(i.attribute("scale")))
        return self.with_residual(i, y)

    def _rows_of(self, segments: list[Segment], ids: str) -> str:
        """Rows of matrices that lie below each other: of each that begins at or before an id, the last's."""
        g, begin = self.graph, segments[0].n
        first = self._clipped(ids, 0, begin) if segments[1:] else ids
        y = onnx_weights.embedded(g, self.stored, segments[0], first)
        for segment in segments[1:]:
            rows = onnx_weights.embedded(g, self.stored, segment, self._clipped(ids, begin, segment.n))
            behind = g.op("GreaterOrEqual", ids, g.constant(begin, np.int64))
            y = g.op("Where", g.op("Unsqueeze", behind, g.integers(-1)), rows, y)
            begin += segment.n
        return y

    def _clipped(self, ids: str, begin: int, count: int) -> str:
        """ids - begin, held to 0 ... count - 1."""
        g = self.graph
        moved = g.op("Sub", ids, g.constant(begin, np.int64)) if begin else ids
        found: str = g.op("Clip", moved, g.constant(0, np.int64), g.constant(count - 1, np.int64))
        return found

    def _ids(self, i: Instruction) -> str:
        name, offset = i.attribute("ids"), i.attribute("offset")
        if name not in ("tokens", "positions"):
            raise GristmillError(f"an embedding by {name} is not for ONNX, which has tokens and positions")
        ids = self.ids if name == "tokens" else self.positions()
        return self.graph.op("Add", ids, self.graph.constant(offset, np.int64)) if offset else ids

    def _rms_norm(self, i: Instruction) -> str | Sum:
        y = self.rms_norm(self.given(i, "in"), self.vector(i, "weight"), i.attribute("eps"), self._width(i))
        return self.with_residual(i, y)

    def rms_norm(self, x: str, weight: str | None, eps: float, width: int) -> str:
        """Over the last axis, of `width`."""
        g = self.graph
        square = g.op("ReduceMean", g.op("Mul", x, x), g.integers(-1), keepdims=1)
        y = g.op("Div", x, g.op("Sqrt", g.op("Add", square, g.constant(eps))))
        return y if weight is None else g.op("Mul", y, weight)

    def _layer_norm(self, i: Instruction) -> str | Sum:
        weight, bias = self.vector(i, "weight"), self.vector(i, "bias")
        weight = weight or self.graph.constant(np.ones(self._width(i)))
        inputs = [self.given(i, "in"), weight, *([bias] if bias else [])]
        y = self.graph.op("LayerNormalization", *inputs, axis=-1, epsilon=i.attribute("eps"))
        return self.with_residual(i, y)

    def _width(self, i: Instruction) -> int:
        view = i.views["in"]
        assert isinstance(view, View)
        return view.width

    def _linear(self, i: Instruction) -> str | Sum:
        g, x, order = self.graph, self.given(i, "in"), self.vector(i, "order")
        if order is not None:
            x = g.op("Gather", x, order, axis=-1)
        if i.attribute("glu"):
            gate, up = self._gate_and_up(i, x)
            y = self.gated(gate, up, i.attribute("activation"))
        else:
            y = self._products(i, x, self._segments(i))
            y = y if (bias := self.vector(i, "bias")) is None else g.op("Add", y, bias)
            y = self.activation(y, i.attribute("activation"))
        y = y if i.attribute("scale") == 1 else g.op("Mul", y, g.constant(i.attribute("scale")))
        if cap := i.attribute("softcap"):
            y = g.op("Mul", g.op("Tanh", g.op("Div", y, g.constant(cap))), g.constant(cap))
        return self.with_residual(i, y)

    def _products(self, i: Instruction, x: str, segments: list[Segment]) -> str:
        rounds = bool(i.attribute("act_group"))
        parts = [self.product(x, run, rounds) for run in onnx_weights.runs(segments)]
        found: str = parts[0] if len(parts) == 1 else self.graph.op("Concat", *parts, axis=-1)
        return found

    def _gate_and_up(self, i: Instruction, x: str) -> list[str]:
        """The two halves of a gated pair, by products of their own where a segment ends in the middle: what
        one product gives would be copied apart."""
        g, segments, bias = self.graph, self._segments(i), self.vector(i, "bias")
        half = sum(s.n for s in segments) // 2
        ends = list(itertools.accumulate(s.n for s in segments))
        if bias is None and half in ends:
            middle = ends.index(half) + 1
            return [self._products(i, x, part) for part in (segments[:middle], segments[middle:])]
        y = self._products(i, x, segments)
        y = y if bias is None else g.op("Add", y, bias)
        return list(g.op("Split", y, outputs=2, axis=-1, num_outputs=2))

    def gated(self, gate: str, up: str, activation: str) -> str:
        found: str = self.graph.op("Mul", self.activation(gate, activation), up)
        return found

    def product(self, x: str, segments: list[Segment], rounds: bool) -> str:
        """x W^T of segments of one kind. rounds: the artifact's x is int8, which standard operators are
        not."""
        found: str = self.graph.op("MatMul", x, onnx_weights.columns(self.graph, self.stored, segments))
        return found

    def activation(self, x: str, name: str) -> str:
        return x if name == "none" else ACTIVATIONS[name](self.graph, x)

    def _segments(self, i: Instruction) -> list[Segment]:
        assert i.weight is not None
        return self.program.weights[i.weight]

    def _attention(self, i: Instruction) -> str:
        found: str = self.attention.lower(i)
        return found

    def _gather_rows(self, i: Instruction) -> str:
        g, x = self.graph, self.given(i, "in")
        found: str
        if self.all_rows:
            found = g.op("Gather", x, self._input("rows", ["rows"]), axis=1)
        else:
            end = np.iinfo(np.int64).max
            found = g.op("Slice", x, g.integers(-1), g.integers(end), g.integers(1))
        return found

    def _pointwise(self, i: Instruction) -> str:
        views, steps = i.views["in"], i.attribute("steps")
        assert isinstance(views, list), "pointwise takes a list of inputs"
        registers = [self.read(view) for view in views]
        for name, *operands in json.loads(steps) if isinstance(steps, str) else steps:
            values = [
                self.graph.constant(o["const"]) if isinstance(o, dict) else registers[o] for o in operands
            ]
            registers.append(self._step(name, values))
        return registers[-1]

    def _step(self, name: str, values: list[str]) -> str:
        g = self.graph
        if name in ACTIVATIONS:
            return ACTIVATIONS[name](g, values[0])
        found: str
        if name == "square":
            found = g.op("Mul", values[0], values[0])
        elif name == "rsqrt":
            found = g.op("Reciprocal", g.op("Sqrt", values[0]))
        else:
            found = g.op(POINTWISE[name], *values)
        return found


def _silu(g: Graph, x: str) -> str:
    found: str = g.op("Mul", x, g.op("Sigmoid", x))
    return found


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "silu": _silu,
    "gelu": lambda g, x: g.op("Gelu", x),
    "gelu_tanh": lambda g, x: g.op("Gelu", x, approximate="tanh"),
    "relu": lambda g, x: g.op("Relu", x),
}
