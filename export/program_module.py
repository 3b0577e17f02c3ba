"""A Program as a torch module: the reference kernels in the order of its instructions.

It is what exporters trace, and the second opinion on the executors: slow, and written with the definitions
alone. Its state dict has the names and, with `packed`, the very arrays of weights.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gristmill.export.stored import Stored, segments_of, vectors_of
from gristmill.kernels.reference import linear as linears
from gristmill.kernels.reference.attention import attend_at, rope
from gristmill.kernels.reference.cache import hadamard, rounded
from gristmill.kernels.reference.dequantize import dequantize
from gristmill.kernels.reference.norms import layer_norm, rms_norm
from gristmill.kernels.reference.pointwise import pointwise
from gristmill.runtime.artifact import PROGRAM, open_artifact
from gristmill.runtime.program import CacheSpec, Instruction, Program, Segment, View


def module_of(artifact: str | Path, packed: bool = False, exact: bool = False) -> ProgramModule:
    """The module of the artifact in that directory, see ProgramModule."""
    opened = open_artifact(artifact)
    program = Program.from_json(opened.json(PROGRAM))
    return ProgramModule(program, Stored(opened.weights_path), packed, exact)


class Matrix(nn.Module):
    """A stored matrix; called, its values [n, k] f32."""

    weight: Tensor
    scale: Tensor | None
    zero: Tensor | None

    def __init__(self, segment: Segment, stored: Stored, packed: bool) -> None:
        super().__init__()
        self.segment = segment
        parts = stored.parts(segment) if packed else {"weight": stored.values(segment)}
        for name in ("weight", "scale", "zero"):
            self.register_buffer(name, _tensor(parts[name]) if name in parts else None)

    def forward(self) -> Tensor:
        s = self.segment
        return dequantize(self.weight, self.scale, self.zero, s.format, s.group, s.k)


class Named(nn.Module):
    """What holds the weights of a program under their dotted names."""

    def __init__(self, program: Program, exact: bool = False) -> None:
        super().__init__()
        self.program, self.exact = program, exact

    def vector(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def place(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds what has this dotted name, and the last part of it."""
        *path, last = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module, last


class ProgramModule(Named):
    """`program` over one sequence.

    packed: weights stay as stored and are dequantized in every call, else once. exact: activations and cache
    rows are not rounded as the program's formats say, which is what the program approximates.
    """

    def __init__(self, program: Program, stored: Stored, packed: bool = False, exact: bool = False) -> None:
        super().__init__(program, exact)
        for segment in segments_of(program).values():
            parent, name = self.place(segment.name)
            parent.add_module(name, Matrix(segment, stored, packed))
        for vector in vectors_of(program):
            parent, name = self.place(vector)
            parent.register_buffer(name, _tensor(stored.tensor(vector).reshape(-1)))

    def empty_caches(self, max_len: int | None = None) -> list[Tensor]:
        """Keys and values of each cache in turn, [kv_heads, max_len, dim] f32 zeros."""
        length = max_len or self.program.limits.max_len
        return [
            torch.zeros(cache.kv_heads, length, dim)
            for cache in self.program.caches
            for dim in (cache.k_dim, cache.v_dim)
        ]

    def forward(self, tokens: Tensor, positions: Tensor, rows: Tensor, caches: Sequence[Tensor]) -> Tensor:
        """Logits [R, vocabulary] f32 of the rows named by `rows` [R].

        tokens, positions: [T] int64, the tokens of one sequence and where they stand. caches: see
        `empty_caches`; the rows at these positions are overwritten in place, those behind them never read.
        """
        return self.with_hidden(tokens, positions, rows, caches)[0]

    def with_hidden(
        self, tokens: Tensor, positions: Tensor, rows: Tensor, caches: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and the hidden states [R, hidden] f32, none where the program has none to give."""
        call = Call(self, {"tokens": tokens, "positions": positions, "rows": rows}, caches)
        return call.results()


class Call:
    """One run through the instructions: values by number, each [rows, width]. A subclass may have its own
    embeddings, products and attention."""

    def __init__(self, module: Named, ids: dict[str, Tensor], caches: Sequence[Tensor]) -> None:
        self.module, self.program, self.ids, self.caches = module, module.program, ids, caches
        self.values: dict[int, Tensor] = {}

    def run(self) -> Tensor:
        for instruction in self.program.instructions:
            self.write(instruction.out, getattr(self, f"_{instruction.op}")(instruction))
        return self.values[-1]

    def results(self) -> tuple[Tensor, Tensor]:
        """Logits, and hidden states of the same rows, an empty tensor where the program has none to give."""
        logits, view = self.run(), self.program.hidden
        return logits, logits.new_zeros(0) if view is None else self.read(view)

    def read(self, view: View) -> Tensor:
        return self.values[view.value][:, view.column : view.column + view.width]

    def write(self, view: View, result: Tensor) -> None:
        """A value may be written piece by piece; what is left of it is kept."""
        width = self.program.vocabulary if view.value < 0 else self.program.values[view.value].width
        if view.width == width:
            self.values[view.value] = result
            return
        old = self.values.get(view.value)
        old = result.new_zeros(result.shape[0], width) if old is None else old
        parts = [old[:, : view.column], result, old[:, view.column + view.width :]]
        self.values[view.value] = torch.cat(parts, 1)

    def given(self, i: Instruction, name: str) -> Tensor:
        view = i.views[name]
        assert isinstance(view, View), f"{i.op}: {name} is one view"
        return self.read(view)

    def maybe(self, i: Instruction, name: str) -> Tensor | None:
        return self.given(i, name) if name in i.views else None

    def matrices(self, key: str) -> list[Tensor]:
        """The segments of a weight, [n_i, k] f32."""
        return [self.module.get_submodule(s.name)() for s in self.program.weights[key]]

    def vector(self, i: Instruction, name: str) -> Tensor | None:
        return self.module.vector(i.vectors[name]) if name in i.vectors else None

    def _embedding(self, i: Instruction) -> Tensor:
        assert i.weight is not None
        return linears.embedding(
            self.ids[i.attribute("ids")], torch.cat(self.matrices(i.weight)),
            self.maybe(i, "residual"), i.attribute("scale"), i.attribute("offset"),
        )  # fmt: skip

    def _rms_norm(self, i: Instruction) -> Tensor:
        return rms_norm(
            self.given(i, "in"), self.vector(i, "weight"), self.maybe(i, "residual"), i.attribute("eps")
        )

    def _layer_norm(self, i: Instruction) -> Tensor:
        return layer_norm(
            self.given(i, "in"), self.vector(i, "weight"), self.vector(i, "bias"),
            self.maybe(i, "residual"), i.attribute("eps"),
        )  # fmt: skip

    def _linear(self, i: Instruction) -> Tensor:
        assert i.weight is not None
        x, order, bias = self.given(i, "in"), self.vector(i, "order"), self.vector(i, "bias")
        x = x if order is None else x[:, order.long()]
        if i.attribute("act_group") and not self.module.exact:
            x = linears.round_activations(x, i.attribute("act_group"))
        weights = self.matrices(i.weight)
        biases: Sequence[Tensor | None] = [None] * len(weights)
        if bias is not None:
            biases = bias.split([len(w) for w in weights])
        return linears.linear(
            x, weights, biases, self.maybe(i, "residual"), i.attribute("activation"), i.attribute("glu"),
            i.attribute("scale"), i.attribute("softcap"),
        )  # fmt: skip

    def _attention(self, i: Instruction) -> Tensor:
        number = i.attribute("cache")
        spec: CacheSpec = self.program.caches[number]
        q, k = self._heads(i, "q", i.attribute("heads")), self._heads(i, "k", spec.kv_heads)
        v = split_heads(self.given(i, "v"), spec.kv_heads)
        keys, values = self.caches[2 * number], self.caches[2 * number + 1]
        positions = self.ids["positions"]
        if not self.module.exact:
            k, v = rounded(k, spec.k_dtype), rounded(v, spec.v_dtype)
        keys.index_copy_(1, positions, k)
        values.index_copy_(1, positions, v)
        out = attend_at(
            q, keys, values, positions, i.attribute("scale"), spec.window, i.attribute("softcap"),
            self.vector(i, "sinks"),
        )  # fmt: skip
        return out.transpose(0, 1).flatten(1)

    def _heads(self, i: Instruction, name: str, heads: int) -> Tensor:
        """Queries or keys [heads, T, dim] as they are multiplied."""
        x, norm = split_heads(self.given(i, name), heads), self.vector(i, f"{name}_norm")
        x = x if norm is None else rms_norm(x, norm, None, i.attribute("norm_eps"))
        if i.attribute("rope") >= 0:
            spec = self.program.ropes[i.attribute("rope")]
            frequencies = self.module.vector(spec.inv_freq)
            x = rope(x[None], self.ids["positions"][None], frequencies, spec.style, spec.scale)[0]
        return hadamard(x, i.attribute("hadamard")) if i.attribute("hadamard") else x

    def _gather_rows(self, i: Instruction) -> Tensor:
        return self.given(i, "in")[self.ids["rows"]]

    def _pointwise(self, i: Instruction) -> Tensor:
        views = i.views["in"]
        assert isinstance(views, list), "pointwise takes a list of inputs"
        return pointwise([self.read(view) for view in views], json.dumps(i.attribute("steps")))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[T, heads * D] to [heads, T, D]."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def _tensor(array: np.ndarray) -> Tensor:
    """A copy that owns its memory; bf16 comes as its bits in uint16."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
