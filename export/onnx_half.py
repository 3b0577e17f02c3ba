"""The flavour for CUDA, whose attention operator takes 16 bits: products and attention in f16, all between
them in f32 (norms, residual sums, logits), so that no sum of a residual stream leaves f16's range."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from gristmill.export import onnx_weights
from gristmill.export.onnx_graph import Graph
from gristmill.export.onnx_lowering import Lowering
from gristmill.export.onnx_runtime_ops import RuntimeLowering
from gristmill.export.stored import Stored
from gristmill.runtime.program import Program, Segment

CUDA_BITS = (4, 8)  # of MatMulNBits on CUDA; others are dequantized


def takes_half(kind: onnx_weights.Kind) -> bool:
    """Whether there is a product in f16 with these weights as they are (scales that f16 holds)."""
    return kind.format == "f16" or (kind.integer and kind.bits in CUDA_BITS)


class HalfLowering(RuntimeLowering):
    """See Lowering. Weights that f16 does not hold as they are (f32, bf16, scales beyond f16) are multiplied
    in f32."""

    attention_type = np.float16

    def __init__(self, program: Program, stored: Stored, graph: Graph, max_len: int, all_rows: bool) -> None:
        self._halves: dict[str, str] = {}  # of values in f32
        super().__init__(program, stored, graph, max_len, all_rows)

    def narrow(self, x: str) -> str:
        if x not in self._halves:
            self._halves[x] = self.graph.op("Cast", x, to=TensorProto.FLOAT16)
        return self._halves[x]

    def wide(self, x: str) -> str:
        """A cast that goes when nothing reads it: what narrows it again gets x."""
        found: str = self.graph.op("Cast", x, to=TensorProto.FLOAT)
        self._halves[found] = x
        return found

    def product(self, x: str, segments: list[Segment], rounds: bool) -> str:
        g, kind = self.graph, onnx_weights.Kind.of(segments[0])
        if not takes_half(kind):
            return Lowering.product(self, x, segments, rounds)
        if kind.format == "f16":
            weight = onnx_weights.float_columns(g, self.stored, segments)
            return self.wide(g.op("MatMul", self.narrow(x), weight))
        if any(self.stored.tensor(f"{s.name}.scale").dtype != np.float16 for s in segments):
            return super().product(x, segments, rounds=False)
        matrix = onnx_weights.blocks(g, self.stored, segments, half=True)
        y = g.microsoft(
            "MatMulNBits", self.narrow(x), matrix.data, matrix.scale, *([matrix.zero] if matrix.zero else []),
            K=kind.k, N=matrix.n, bits=kind.bits, block_size=kind.block,
        )  # fmt: skip
        return self.wide(y)

    def gated(self, gate: str, up: str, activation: str) -> str:
        """In f16 where both are: what follows rounds the product to f16 in any case."""
        if activation != "silu" or not {gate, up} <= self._halves.keys():
            return super().gated(gate, up, activation)
        g, halves = self.graph, [self._halves[x] for x in (gate, up)]
        return self.wide(g.op("Mul", g.microsoft("QuickGelu", halves[0], alpha=1.0), halves[1]))
