"""A rank's slices of the weights, in a file of their own that no directory holds: memory, in the layout of
weights.safetensors, for the executor to map. What a rank multiplies whole stays in the artifact's file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.parallel.layout import Span
from gristmill.runtime.parallel.split import PACKED, MatrixSlice, RankProgram
from gristmill.runtime.program import BLOCK_BYTES, FLOAT_BYTES, Segment
from gristmill.runtime.weights_file import (
    DTYPE_BYTES,
    TensorSpec,
    WeightsWriter,
    read_header_bytes,
    read_tensor_offsets,
)

Bytes = NDArray[np.uint8]
FLOAT_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


class Tensors:
    """The tensors of a weights file as bytes [rows, bytes of a row], mapped."""

    def __init__(self, path: Path) -> None:
        self.specs = read_tensor_offsets(path)
        self._begin = len(read_header_bytes(path))
        with path.open("rb") as file:
            self._memory = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)

    def rows(self, name: str) -> Bytes:
        spec, offset = self.specs[name]
        data = self._memory[self._begin + offset : self._begin + offset + spec.size_bytes]
        return data.reshape(spec.shape[0], -1)

    def dtype(self, name: str) -> str:
        return self.specs[name][0].dtype


@contextmanager
def sliced_weights(path: Path, share: RankProgram) -> Iterator[str]:
    """The path of a file with the slices of ``share``, of the artifact's weights at ``path``; it lives as
    long as something has it open or mapped."""
    descriptor = os.memfd_create("gristmill weights")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            pieces = _pieces(path, share)
            writer = WeightsWriter(file, [spec for spec, _ in pieces])
            for spec, data in pieces:
                writer.write(spec.name, np.ascontiguousarray(data))
            writer.close()
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _pieces(path: Path, share: RankProgram) -> list[tuple[TensorSpec, Bytes]]:
    """Every tensor to be written; most are views of the mapped file."""
    tensors = Tensors(path)
    try:
        found = [piece for s in share.matrices for piece in _matrix_pieces(tensors, s)]
        for v in share.vectors:
            parts = [tensors.rows(v.source)[a:b] for a, b in v.spans]
            spec = TensorSpec(v.made, tensors.dtype(v.source), (sum(map(len, parts)),))
            found.append((spec, np.concatenate(parts)))
    except (KeyError, IndexError, ValueError) as error:
        raise GristmillError(
            f"{path.name} does not hold what program.json asks for ({error}); compile the model again"
        ) from error
    return found


def _matrix_pieces(tensors: Tensors, piece: MatrixSlice) -> Iterator[tuple[TensorSpec, Bytes]]:
    """The tensors of a slice: weight, and where the format has them scale and zero."""
    source, made = piece.source, piece.made
    rows = slice(*piece.rows)
    weight = f"{source.name}.weight"
    data = _columns(tensors.rows(weight)[rows], source, piece.columns)
    dtype = tensors.dtype(weight)
    yield TensorSpec(f"{made.name}.weight", dtype, (made.n, data.shape[1] // DTYPE_BYTES[dtype])), data
    if source.format in FLOAT_BYTES:
        return
    groups = _groups(source, piece.columns)
    scale = f"{source.name}.scale"
    size = DTYPE_BYTES[tensors.dtype(scale)]
    data = tensors.rows(scale)[rows, groups[0] * size : groups[1] * size]
    yield TensorSpec(f"{made.name}.scale", tensors.dtype(scale), (made.n, groups[1] - groups[0])), data
    if source.symmetric:
        return
    zero = f"{source.name}.zero"
    data = _zeros(tensors.rows(zero)[rows], source, groups)
    yield TensorSpec(f"{made.name}.zero", tensors.dtype(zero), (made.n, data.shape[1])), data


def _columns(stored: Bytes, source: Segment, columns: Span) -> Bytes:
    """Bytes of the columns, in whole blocks where the format has blocks: what fills the last one up counts
    for nothing."""
    start, stop = columns
    if source.format in FLOAT_BYTES:
        size = FLOAT_BYTES[source.format]
        return stored[:, start * size : stop * size]
    block = BLOCK_BYTES[source.format]
    if block == PACKED:  # a byte for each column
        if (stop - start) % PACKED == 0:
            return stored[:, start:stop]
        return np.pad(stored[:, start:stop], ((0, 0), (0, (start - stop) % PACKED)))
    assert start % PACKED == 0 and (stop % PACKED == 0 or stop == source.k), "cut inside of a packed block"
    return stored[:, start // PACKED * block : -(-stop // PACKED) * block]


def _groups(source: Segment, columns: Span) -> Span:
    if not source.group:
        return (0, 1)
    start, stop = columns
    assert start % source.group == 0 and (stop % source.group == 0 or stop == source.k), (
        "cut inside of a group"
    )
    return start // source.group, -(-stop // source.group)


def _zeros(stored: Bytes, source: Segment, groups: Span) -> Bytes:
    """Zero points of the groups: bytes of int8, else two in a byte, the even group low."""
    if source.format == "int8":
        return stored[:, groups[0] : groups[1]]
    pairs = np.stack([stored & 15, stored >> 4], axis=2).reshape(len(stored), -1)[:, groups[0] : groups[1]]
    pairs = np.pad(pairs, ((0, 0), (0, pairs.shape[1] % 2)))
    return np.asarray(pairs[:, ::2] | pairs[:, 1::2] << 4, np.uint8)
