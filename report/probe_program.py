"""Programs that are made to be timed: products and attention of chosen shapes, with weights without meaning.

Every instruction reads the embedding's row and writes a value that nobody reads, so that shapes may be chosen
freely; the executor runs them as it runs a model's. Weights are constants in the artifact's own layout, in a
file that is mapped as an artifact's is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.quant.scheme import Scheme, activation_group
from gristmill.quant.tensor import stored_shapes
from gristmill.runtime.program import CacheSpec, Instruction, Limits, Program, Segment, Value, View
from gristmill.runtime.session import native
from gristmill.runtime.weights_file import DTYPE_BYTES, TensorSpec, encode_header, layout

VOCABULARY = 4096
DIM = 64  # columns of a head
INPUT, OUTPUT, LAST = 0, 1, 2  # values: what all read, what all write, the row that the logits are of
PATTERNS = {  # what a tensor is filled with: 0.01 of each float type, bytes that are numbers of all others
    "F32": np.float32(0.01).tobytes(), "F16": np.float16(0.01).tobytes(), "BF16": b"\x24\x3c",
    "I8": b"\x25", "U8": b"\x25",
}  # fmt: skip
PIECE = 1 << 20


@dataclass
class ProbeProgram:
    """A program in the making. width: columns of the row that all instructions read."""

    width: int
    max_tokens: int
    max_len: int
    program: Program = field(init=False)

    def __post_init__(self) -> None:
        self.program = Program(VOCABULARY, Limits(self.max_tokens, 1, self.max_len, self.max_len))
        self.program.weights["embed"] = [Segment("embed", "f16", VOCABULARY, self.width)]
        embedding = Instruction(
            "embedding", View(INPUT, 0, self.width), attributes={"ids": "tokens"}, weight="embed"
        )
        self.program.instructions.append(embedding)
        self.outputs = 1

    def norm(self) -> int:
        """An rms_norm of the whole row; its index."""
        self.outputs = max(self.outputs, self.width)
        return self._add(
            Instruction("rms_norm", View(OUTPUT, 0, self.width), {"in": self._input(0, self.width)},
                        {}, {"eps": 1e-5})
        )  # fmt: skip

    def linear(self, scheme: Scheme, n: int, k: int, gated: bool = False) -> int:
        """A product with weights [n, k], of which half are gates where ``gated``; its index."""
        scheme, name = scheme.normalize(k), f"w{len(self.program.instructions)}"
        self.program.weights[name] = [Segment(name, scheme.format, n, k, scheme.group_size)]
        self.outputs = max(self.outputs, n)
        attributes: dict[str, Any] = {"act_group": activation_group([scheme], k)}
        attributes |= {"activation": "silu", "glu": True} if gated else {}
        views: dict[str, Any] = {"in": self._input(0, k)}
        out = View(OUTPUT, 0, n // 2 if gated else n)
        return self._add(Instruction("linear", out, views, {}, attributes, name))

    def attention(self, dtype: str, heads: int, kv_heads: int) -> int:
        """Attention over a cache of its own; its index."""
        self.program.caches.append(CacheSpec(kv_heads, DIM, DIM, dtype, dtype))
        self.outputs = max(self.outputs, heads * DIM)
        q, kv = heads * DIM, kv_heads * DIM
        views: dict[str, Any] = {
            "q": self._input(0, q), "k": self._input(q, kv), "v": self._input(q + kv, kv),
        }  # fmt: skip
        cache = len(self.program.caches) - 1
        attributes = {"cache": cache, "heads": heads, "scale": DIM**-0.5}
        return self._add(Instruction("attention", View(OUTPUT, 0, q), views, {}, attributes))

    def executor(self, folder: Path, threads: int) -> Any:
        """An executor of it; its weights stay in ``folder``. Nothing can be added any more."""
        self.program.instructions += [
            Instruction("gather_rows", View(LAST, 0, DIM), {"in": self._input(0, DIM)}),
            Instruction(
                "linear", View(-1, 0, VOCABULARY), {"in": View(LAST, 0, DIM)}, {}, {"act_group": 0}, "head"
            ),
        ]
        self.program.weights["head"] = [Segment("head", "f16", VOCABULARY, DIM)]
        widths = ((INPUT, "T", self.width), (OUTPUT, "T", self.outputs), (LAST, "R", DIM))
        offset = 0
        for _, rows, width in widths:
            self.program.values.append(Value(rows, width, offset))
            offset += -(-4 * width * self.max_tokens // 64) * 64
        self.program.arena_bytes = offset
        path = folder / f"probe-{id(self)}.safetensors"
        _write(path, self.program)
        return native().Executor(
            self.program.to_bytes(), str(path), threads=threads, max_len=self.max_len, max_slots=1
        )

    def _input(self, column: int, width: int) -> View:
        assert column + width <= self.width, "an instruction reads more than there is"
        return View(INPUT, column, width)

    def _add(self, instruction: Instruction) -> int:
        self.program.instructions.append(instruction)
        return len(self.program.instructions) - 1


def _write(path: Path, program: Program) -> None:
    """The weights file of a program; see `gristmill.runtime.weights_file`, whose hash nobody needs here."""
    specs: list[TensorSpec] = []
    for s in (segment for group in program.weights.values() for segment in group):
        stored = stored_shapes(s.name, s.n, s.k, Scheme(s.format, s.group), np.float16)
        specs += [TensorSpec(*tensor) for tensor in stored]
    placed = layout(specs)
    with path.open("wb") as file:
        file.write(encode_header(placed, {}))
        for spec, _ in placed:
            pattern = PATTERNS[spec.dtype] * (PIECE // DTYPE_BYTES[spec.dtype])
            left = spec.size_bytes
            while left:
                left -= file.write(pattern[: min(left, PIECE)])
