"""The tensors of an artifact as a Hugging Face checkpoint names them: rows put back, merged biases apart."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.quant import pack, rtn
from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import Scheme
from gristmill.runtime.artifact import PROGRAM, Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import LOGITS, Program, Segment
from gristmill.runtime.weights_file import read_header_bytes

Array = NDArray[Any]
DTYPES = {"F32": "f4", "F16": "f2", "BF16": "u2", "I32": "i4", "I8": "i1", "U8": "u1"}


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


class StoredWeights:
    """The tensors of an artifact by their own names, mapped and not copied."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.program = Program.from_json(artifact.json(PROGRAM))
        with artifact.weights_path.open("rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
        self._map = np.frombuffer(self._pages, np.uint8)
        self._header, self._begin = _header(artifact)

    def tensor(self, name: str) -> Array:
        """A tensor of the weights file; bf16 as its bits."""
        if name not in self._header:
            raise GristmillError(f"{self.artifact.path} has no tensor {name!r}; compile the model again")
        entry = self._header[name]
        begin, end = (self._begin + at for at in entry["data_offsets"])
        return self._map[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def give_back(self) -> None:
        """Let go of the pages that were read: they come from the file again where they are asked for."""
        self._pages.madvise(mmap.MADV_DONTNEED)

    def quantized(self, segment: Segment, rows: Any = slice(None)) -> Quantized:
        """Integers, scales and zero points of a matrix with scales, or of some of its rows."""
        suffixes = ("weight", "scale") if segment.symmetric else ("weight", "scale", "zero")
        arrays = {suffix: self.tensor(f"{segment.name}.{suffix}")[rows] for suffix in suffixes}
        return pack.unpack(arrays, scheme_of(segment), segment.k)

    def values(self, segment: Segment, rows: Any = slice(None)) -> Array:
        """The weights f32 of a matrix, or of some of its rows, with columns as stored."""
        if scheme_of(segment).numbers.scaled:
            return rtn.dequantize(self.quantized(segment, rows), scheme_of(segment))
        return pack.decode_float(self.tensor(f"{segment.name}.weight")[rows])


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
        self.segments = {s.name: s for parts in self.program.weights.values() for s in parts}
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


def scheme_of(segment: Segment) -> Scheme:
    return Scheme(segment.format, segment.group, segment.symmetric)


def _header(artifact: Artifact) -> tuple[dict[str, Any], int]:
    """The weights' entries, and where their data begin."""
    data = read_header_bytes(artifact.weights_path)
    return json.loads(data[8:]), len(data)


def _put_back(rows: Array, order: Array) -> Array:
    """out[order[i]] = rows[i]."""
    if len(order) != len(rows) or not np.array_equal(np.sort(order), np.arange(len(rows))):
        raise GristmillError("the artifact has only a part of a tensor's rows, the others cannot be written")
    out = np.empty_like(rows)
    out[order] = rows
    return out
