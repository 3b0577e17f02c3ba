"""The entry points of a Program for AOTInductor: decode of one token, and prefill of several.

Both are the instructions of the Program over one sequence, with its weights as runtime.pt2.constants gives
them: packed, under their names. Activations are not rounded: generated code multiplies floats. Rows of a
cache are, as the program says. A cache is [positions, kv_heads, dim] f32, so that its first positions, which
are all a call is handed, lie together; they are written in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gristmill.export.packed_matrix import PackedMatrix
from gristmill.export.program_module import Call, Named, split_heads
from gristmill.kernels.reference.cache import rounded
from gristmill.kernels.reference.linear import finish
from gristmill.runtime.program import Instruction, Program


class EntryPoint(Named):
    """one_row: decode, whose only row is the one asked for."""

    def __init__(self, program: Program, constants: Mapping[str, Tensor], one_row: bool) -> None:
        super().__init__(program)
        self.one_row = one_row
        matrices = {s.name: s for segments in program.weights.values() for s in segments}
        parts = {f"{name}.{part}" for name in matrices for part in ("weight", "scale", "zero")}
        for name, segment in matrices.items():
            parent, last = self.place(name)
            weight, scale, zero = (constants.get(f"{name}.{part}") for part in ("weight", "scale", "zero"))
            assert weight is not None, f"constants lack {name}"
            parent.add_module(last, PackedMatrix(segment, weight, scale, zero))
        for name in constants.keys() - parts:
            parent, last = self.place(name)
            parent.register_buffer(last, constants[name])

    def matrix(self, name: str) -> PackedMatrix:
        found = self.get_submodule(name)
        assert isinstance(found, PackedMatrix), name
        return found

    def run(
        self, tokens: Tensor, positions: Tensor, rows: Tensor, caches: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits [R, vocabulary] and hidden states [R, hidden], or an empty tensor, of the `rows` [R]."""
        ids = {"tokens": tokens, "positions": positions, "rows": rows}
        return _PackedCall(self, ids, caches).results()


class Prefill(EntryPoint):
    """tokens, positions: [T] int64; rows [R] int64; caches: keys and values of each cache in turn."""

    def __init__(self, program: Program, constants: Mapping[str, Tensor]) -> None:
        super().__init__(program, constants, one_row=False)

    def forward(
        self, tokens: Tensor, positions: Tensor, rows: Tensor, caches: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        return self.run(tokens, positions, rows, caches)


class Decode(EntryPoint):
    """tokens, positions: [1] int64; caches as in Prefill."""

    def __init__(self, program: Program, constants: Mapping[str, Tensor]) -> None:
        super().__init__(program, constants, one_row=True)

    def forward(self, tokens: Tensor, positions: Tensor, caches: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.run(tokens, positions, tokens, caches)


class _PackedCall(Call):
    """Instructions over packed matrices and caches by position."""

    module: EntryPoint

    def _embedding(self, i: Instruction) -> Tensor:
        assert i.weight is not None
        ids = self.ids[i.attribute("ids")] + i.attribute("offset")
        y = self._rows_of(i.weight, ids) * i.attribute("scale")
        residual = self.maybe(i, "residual")
        return y if residual is None else residual + y

    def _rows_of(self, key: str, ids: Tensor) -> Tensor:
        """Rows of the segments of a weight, one below the other."""
        segments = self.program.weights[key]
        found, start = self.module.matrix(segments[0].name).rows(ids.clamp(0, segments[0].n - 1)), 0
        for before, segment in zip(segments, segments[1:]):
            start += before.n
            more = self.module.matrix(segment.name).rows((ids - start).clamp(0, segment.n - 1))
            found = torch.where((ids >= start)[:, None], more, found)
        return found

    def _linear(self, i: Instruction) -> Tensor:
        assert i.weight is not None
        x, order, bias = self.given(i, "in"), self.vector(i, "order"), self.vector(i, "bias")
        x = x if order is None else x[:, order.long()]
        segments = self.program.weights[i.weight]
        y = torch.cat([self.module.matrix(s.name).product(x, self.module.one_row) for s in segments], -1)
        return finish(
            y if bias is None else y + bias, self.maybe(i, "residual"), i.attribute("activation"),
            i.attribute("glu"), i.attribute("scale"), i.attribute("softcap"),
        )  # fmt: skip

    def _attention(self, i: Instruction) -> Tensor:
        number = i.attribute("cache")
        spec = self.program.caches[number]
        q, k = self._heads(i, "q", i.attribute("heads")), self._heads(i, "k", spec.kv_heads)
        v = split_heads(self.given(i, "v"), spec.kv_heads)
        keys, values = self.caches[2 * number], self.caches[2 * number + 1]
        positions = self.ids["positions"]
        keys.index_put_((positions,), rounded(k, spec.k_dtype).transpose(0, 1))
        values.index_put_((positions,), rounded(v, spec.v_dtype).transpose(0, 1))
        out = _attend(
            q, keys, values, positions, i.attribute("scale"), spec.window, i.attribute("softcap"),
            self.vector(i, "sinks"),
        )  # fmt: skip
        return out.transpose(0, 1).flatten(1)

    def _gather_rows(self, i: Instruction) -> Tensor:
        return self.given(i, "in") if self.module.one_row else super()._gather_rows(i)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int, softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The reference's attend_at without copies of keys for each head of a group, nor of whole caches.

    q [H, T, D]; keys [S, KV, D], values [S, KV, V] of positions 0, 1, 2 ...; result [H, T, V].
    """
    kv, groups, rows = keys.shape[1], q.shape[0] // keys.shape[1], q.shape[1]
    scores = q.reshape(kv, groups * rows, q.shape[2]) @ keys.permute(1, 2, 0)
    scores = scores.unflatten(1, (groups, rows)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    s = torch.arange(keys.shape[0])
    hidden = s[None, :] > positions[:, None]
    if window:
        hidden = hidden | (s[None, :] <= positions[:, None] - window)
    weights = _softmax(scores.masked_fill(hidden, float("-inf")), sinks)
    out = weights.flatten(1, 2) @ values.transpose(0, 1)
    return out.unflatten(1, (groups, rows)).flatten(0, 1)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last dimension of [KV, G, T, S]; a sink of each head takes its share of the sum."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.view(*scores.shape[:2], 1, 1)
    largest = torch.maximum(scores.amax(-1, keepdim=True), sink)
    shares = torch.exp(scores - largest)
    return shares / (shares.sum(-1, keepdim=True) + torch.exp(sink - largest))
