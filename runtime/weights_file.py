"""The weights file: standard safetensors, laid out so that it can be mapped and used in place.

    8 bytes   little-endian length of the header header    JSON: name -> dtype, shape, data_offsets; padded
    with spaces to 64 bytes data      every tensor begins 64-byte aligned; the gaps are tensors too
    (`__pad_N`, U8), for the format allows no holes;
              a last pad of at least 64 bytes lets a kernel read one vector past the end of the last tensor

The names, types and shapes are declared before any data exists, so the file is written in one pass and never
held in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gristmill.runtime.errors import GristmillError

ALIGNMENT = 64
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before its data: `dtype` is a safetensors name such as "F16" or "U8"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


def padding_bytes(offset: int) -> int:
    return -offset % ALIGNMENT


def layout(specs: Iterable[TensorSpec]) -> list[tuple[TensorSpec, int]]:
    """Every tensor with its offset in the data section, padding included; ends with a pad."""
    placed: list[tuple[TensorSpec, int]] = []
    offset = pads = 0

    def pad(size: int) -> None:
        nonlocal offset, pads
        placed.append((TensorSpec(f"__pad_{pads}", "U8", (size,)), offset))
        offset, pads = offset + size, pads + 1

    for spec in specs:
        if gap := padding_bytes(offset):
            pad(gap)
        placed.append((spec, offset))
        offset += spec.size_bytes
    pad(ALIGNMENT + padding_bytes(offset))
    return placed


def encode_header(placed: list[tuple[TensorSpec, int]], metadata: dict[str, str]) -> bytes:
    """Length and JSON of the header, padded so that the data section begins aligned."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for spec, offset in placed:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.size_bytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * padding_bytes(8 + len(text))
    return len(text).to_bytes(8, "little") + text


class WeightsWriter:
    """Streams declared tensors, in the declared order, into `file`; the hash is taken on the way."""

    def __init__(self, file: BinaryIO, specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None):
        specs = list(specs)
        assert len({spec.name for spec in specs}) == len(specs), "two weights have one name"
        assert not any(spec.name.startswith("__") for spec in specs), "names with __ belong to the format"
        assert all(spec.size_bytes > 0 for spec in specs), "a weight without elements"
        placed = layout(specs)
        self._file = file
        self._hash = hashlib.sha256()
        self._pending = [spec for spec, _ in placed]
        self._next = 0  # index in _pending of the tensor being written
        self._left = 0  # bytes of it that are missing
        header = encode_header(placed, metadata or {})
        self.header_sha256 = hashlib.sha256(header).hexdigest()
        self.size_bytes = 0
        self._put(header)
        self._advance()

    def write(self, name: str, data: Any) -> None:
        """Appends `data` (contiguous, any buffer) to tensor `name`; one tensor may come in several calls."""
        block = memoryview(data).cast("B")
        spec = self._pending[self._next] if self._next < len(self._pending) else None
        assert spec is not None and spec.name == name, f"got weight {name}, expected {spec and spec.name}"
        assert block.nbytes <= self._left, (
            f"{name} takes {spec.size_bytes} bytes, got {block.nbytes - self._left} more"
        )
        self._put(block)
        self._left -= block.nbytes
        if self._left == 0:
            self._next += 1
            self._advance()

    def close(self) -> str:
        """The sha256 of the whole file; every declared tensor must have come."""
        assert self._next == len(self._pending), f"weight {self._pending[self._next].name} was never written"
        return self._hash.hexdigest()

    def _advance(self) -> None:
        """Writes the padding that comes next and stands before the next real tensor."""
        while self._next < len(self._pending) and self._pending[self._next].name.startswith("__pad_"):
            self._put(bytes(self._pending[self._next].size_bytes))
            self._next += 1
        self._left = self._pending[self._next].size_bytes if self._next < len(self._pending) else 0

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)


def read_header_bytes(path: Path) -> bytes:
    """Length and JSON of the header as they stand in the file."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > path.stat().st_size:
            raise GristmillError(
                f"{path.name} is not a safetensors file or is cut short; compile the model again"
            )
        return prefix + file.read(length)


def read_tensors(path: Path) -> dict[str, TensorSpec]:
    """The tensors of a weights file by name, without the padding."""
    return {name: spec for name, (spec, _) in read_tensor_offsets(path).items()}


def read_tensor_offsets(path: Path) -> dict[str, tuple[TensorSpec, int]]:
    """The tensors by name, without the padding, each with its offset in the data section."""
    try:
        entries = json.loads(read_header_bytes(path)[8:])
        found = {
            name: (
                TensorSpec(name, entry["dtype"], tuple(int(n) for n in entry["shape"])),
                int(entry["data_offsets"][0]),
            )
            for name, entry in entries.items()
            if not name.startswith("__")
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, GristmillError):
            raise
        raise GristmillError(f"the header of {path.name} is damaged; compile the model again") from error
    unknown = [spec for spec, _ in found.values() if spec.dtype not in DTYPE_BYTES]
    if unknown:
        raise GristmillError(
            f"{path.name}: tensor {unknown[0].name} has an unknown type {unknown[0].dtype!r}"
        )
    return found
