"""The tensors of a program's weights file, read one at a time."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.quant import pack, rtn
from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import Scheme
from gristmill.runtime.artifact import PROGRAM, Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program, Segment
from gristmill.runtime.weights_file import read_header_bytes

Array = NDArray[Any]
DTYPES = {"F32": "f4", "F16": "f2", "BF16": "u2", "I32": "i4", "I8": "i1", "U8": "u1"}


class Stored:
    """Arrays by name; nothing is held but the file's header. Raises GristmillError for names it lacks."""

    def __init__(self, weights: Path) -> None:
        self._path = weights
        data = read_header_bytes(weights)
        self._header, self._begin = json.loads(data[8:]), len(data)

    def tensor(self, name: str) -> Array:
        """A copy of a tensor of the file; bf16 as its bits in uint16. (Pages of a mapped file would stay with
        the process and count as its memory.)"""
        dtype, begin, end, shape = self._place(name)
        count = (end - begin) // dtype.itemsize
        return np.fromfile(self._path, dtype, count, offset=begin).reshape(shape)

    def _place(self, name: str) -> tuple[np.dtype[Any], int, int, list[int]]:
        """Type, first byte, end and shape of a tensor in the file."""
        if name not in self._header:
            raise GristmillError(f"{self._path} has no tensor {name!r}; compile the model again")
        entry = self._header[name]
        begin, end = (self._begin + at for at in entry["data_offsets"])
        return np.dtype(DTYPES[entry["dtype"]]), begin, end, entry["shape"]

    def parts(self, segment: Segment) -> dict[str, Array]:
        """A matrix as it is stored: weight, and scale and zero where its format has them."""
        suffixes = ["weight"]
        if scheme_of(segment).has_scales:
            suffixes += ["scale"] if segment.symmetric else ["scale", "zero"]
        return {suffix: self.tensor(f"{segment.name}.{suffix}") for suffix in suffixes}

    def quantized(self, segment: Segment, rows: Any = slice(None)) -> Quantized:
        """Integers (fp8: bits), scales and zero points of a matrix with scales, or of some of its rows."""
        parts = {suffix: part[rows] for suffix, part in self.parts(segment).items()}
        return pack.unpack(parts, scheme_of(segment), segment.k)

    def values(self, segment: Segment, rows: Any = slice(None)) -> NDArray[np.float32]:
        """The matrix [n, k] as the kernels see it, or some of its rows."""
        scheme = scheme_of(segment)
        if scheme.has_scales:
            return rtn.dequantize(self.quantized(segment, rows), scheme)
        return pack.decode_float(self.tensor(f"{segment.name}.weight")[rows])


class StoredWeights(Stored):
    """The same of an artifact, mapped and not copied, for those who read matrices in pieces."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact.weights_path)
        self.artifact = artifact
        self.program = Program.from_json(artifact.json(PROGRAM))
        with artifact.weights_path.open("rb") as file:
            self._pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
        self._map = np.frombuffer(self._pages, np.uint8)

    def tensor(self, name: str) -> Array:
        """A view of a tensor of the file; bf16 as its bits in uint16."""
        dtype, begin, end, shape = self._place(name)
        return self._map[begin:end].view(dtype).reshape(shape)

    def give_back(self) -> None:
        """Let go of the pages that were read: they come from the file again where they are asked for."""
        self._pages.madvise(mmap.MADV_DONTNEED)


def scheme_of(segment: Segment) -> Scheme:
    return Scheme(segment.format, segment.group, segment.symmetric)


def segments_of(program: Program) -> dict[str, Segment]:
    """Every matrix of a program once, by name; instructions may share one."""
    return {s.name: s for segments in program.weights.values() for s in segments}


def vectors_of(program: Program) -> list[str]:
    """Names of all norm weights, biases, frequencies and column orders."""
    names = {rope.inv_freq for rope in program.ropes}
    return sorted(names.union(*(i.vectors.values() for i in program.instructions)))
