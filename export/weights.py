"""The tensors of an artifact as a Hugging Face checkpoint names them: rows put back, merged biases apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.export.stored import StoredWeights, scheme_of, segments_of
from gristmill.quant.scheme import Scheme
from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import LOGITS, Segment

Array = NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """A quantized linear as the artifact has it: w = scale * (q - zero), all unsigned.

    name: of the module. transposed: transformers keeps this weight as [inputs, outputs].
    """

    name: str
    segment: Segment
    order: str | None
    transposed: bool

    @property
    def scheme(self) -> Scheme:
        return scheme_of(self.segment)


class Contents(StoredWeights):
    """What an artifact's weights are in its source's terms.

    layers: the quantized linears. floats: names of all other matrices. Embedding and head are among these:
    servers read them as floats. Raises GristmillError where a tensor cannot be brought back.
    """

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        origins = artifact.manifest.get("origins")
        if not isinstance(origins, dict):
            raise GristmillError(
                f"{artifact.path} does not say where its tensors come from; compile it again"
            )
        self.origins: dict[str, list[list[Any]]] = origins
        self.segments = segments_of(self.program)
        self._refuse_computed()
        self.layers = self._layers()
        taken = {layer.segment.name for layer in self.layers}
        self.floats = [name for name in self.segments if name not in taken]

    def layer(self, layer: Layer) -> tuple[Array, Array, Array, Array]:
        """q [n, k] and zero [n, G] unsigned, scale [n, G], g_idx [k], columns in the layer's own order."""
        quantized, numbers = self.quantized(layer.segment), layer.scheme.numbers
        middle = np.full(quantized.scale.shape, numbers.zero_point, np.int16)
        zero = middle if quantized.zero is None else quantized.zero.astype(np.int16)
        q = quantized.q.astype(np.int16) - numbers.low
        k = layer.segment.k
        g_idx = np.arange(k) // (layer.segment.group or k)
        if layer.order is not None:
            order = self.tensor(layer.order)
            q, g_idx = _put_back(q.T, order).T, _put_back(g_idx, order)
        back = [self._rows_back(layer.segment.name, a) for a in (q, quantized.scale, zero - numbers.low)]
        return back[0].astype(np.uint8), back[1], back[2].astype(np.uint8), g_idx

    def float_matrix(self, name: str) -> tuple[str, Array]:
        """The tensor's name and its values f32, as transformers keeps it."""
        (tensor, _, origin), *_ = self.origins[name]
        w = self._rows_back(name, self.values(self.segments[name]))
        return tensor, np.ascontiguousarray(w.T) if origin == "transposed" else w

    def vectors(self) -> Iterator[tuple[str, Array]]:
        """Norm weights and biases by the checkpoint's names, f32."""
        for name, parts in self.origins.items():
            if name in self.segments or all(origin == "constant" for _, _, origin in parts):
                continue
            whole, start = self.tensor(name), 0
            for tensor, count, origin in parts:
                part = whole[start : start + count]
                if origin == "rows":
                    part = _put_back(part, self.tensor(f"{name}.rows")[start : start + count])
                if tensor is not None:
                    yield tensor, part
                start += count

    def _rows_back(self, name: str, rows: Array) -> Array:
        (_, _, origin), *_ = self.origins[name]
        return _put_back(rows, self.tensor(f"{name}.rows")) if origin == "rows" else rows

    def _layers(self) -> list[Layer]:
        """Matrices with scales that only linears inside the model read."""
        used = [i for i in self.program.instructions if i.weight is not None]
        ends = [i for i in used if i.op != "linear" or i.out.value == LOGITS]
        outer = {s.name for i in ends for s in self.program.weights[str(i.weight)]}
        found: dict[str, Layer] = {}
        for instruction in used:
            for segment in self.program.weights[str(instruction.weight)]:
                if segment.name not in outer and Scheme(segment.format).numbers.scaled:
                    tensor, _, origin = self.origins[segment.name][0]
                    order = instruction.vectors.get("order")
                    module = tensor.removesuffix(".weight")
                    found[segment.name] = Layer(module, segment, order, origin == "transposed")
        return list(found.values())

    def _refuse_computed(self) -> None:
        for name in self.segments:
            if name not in self.origins:
                raise GristmillError(f"{self.artifact.path} does not say where {name!r} comes from")
        for name, parts in self.origins.items():
            for tensor, _, origin in parts:
                if origin == "computed" or (origin == "constant" and name in self.segments):
                    raise GristmillError(
                        f"{tensor!r} was computed from several tensors while compiling and cannot be put "
                        "back; models of this family cannot be exported"
                    )


def _put_back(rows: Array, order: Array) -> Array:
    """out[order[i]] = rows[i]."""
    if len(order) != len(rows) or not np.array_equal(np.sort(order), np.arange(len(rows))):
        raise GristmillError("the artifact has only a part of a tensor's rows, the others cannot be written")
    out = np.empty_like(rows)
    out[order] = rows
    return out
