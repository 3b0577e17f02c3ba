"""The tensors of a GGUF file under transformers' names, as a checkpoint whose weights are read one at a time.

Matrices that a format of ours holds exactly appear as `X.blocks`, which a Reader gives as a QuantizedWeight;
all others as `X.weight`, which reads as the values that its blocks mean.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from ..quant.formats import Reader
from ..quant.formats import gguf as matrices
from ..quant.formats.gguf_blocks import BLOCKS
from ..quant.formats.weight import QuantizedWeight, Tensors
from ..runtime.errors import GristmillError
from .checkpoint import file_hash

Array = NDArray[Any]
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MARKER = "blocks"
MOST_ENTRIES = 1 << 24  # of an array in the metadata: vocabularies have less, damaged files may say more
CHUNK_ROWS = 1024  # dequantized at a time


@dataclass(frozen=True)
class Entry:
    """A tensor in the file: type by GGUF's name, shape [n, k] or [n], bytes [begin, end).

    order: our row i is its row order[i]; None: as they are.
    """

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int
    order: Array | None = None

    @property
    def is_float(self) -> bool:
        return self.kind in FLOATS


class _Reader(gguf.GGUFReader):
    """gguf's reader, which would read on beyond the end of a damaged file."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it ends early")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > MOST_ENTRIES:
            raise ValueError("an array of its metadata is too long")
        return super()._get_field_parts(orig_offs, raw_type)


@dataclass(frozen=True)
class GgufHeader:
    """metadata: values by key. tensors: by GGUF's names, order not yet known."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]


def read_header(path: Path) -> GgufHeader:
    """Metadata and places of the tensors. Raises GristmillError for a file that is not a whole GGUF."""
    try:
        reader = _Reader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: _entry(tensor) for tensor in reader.tensors}
    except OSError as error:
        raise GristmillError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # the reader raises whatever damaged bytes lead it to
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise GristmillError(
            f"{path}: damaged, truncated or not a GGUF file ({reason}); download it again"
        ) from None
    if reader.byte_order != "I":
        raise GristmillError(f"{path}: its bytes are in the other order; download the little-endian file")
    return GgufHeader(path, metadata, tensors)


def _entry(tensor: Any) -> Entry:
    shape = tuple(int(extent) for extent in reversed(tensor.shape))
    begin = int(tensor.data_offset)
    if not shape or min(shape) < 1 or len(shape) > 2:
        raise ValueError(f"{tensor.name} has shape {list(shape)}")
    return Entry(tensor.tensor_type.name, shape, begin, begin + int(tensor.n_bytes))


class GgufTensors:
    """The tensors by transformers' names. `read` returns a copy; nothing is kept."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self.directory = path, path.parent
        with open(path, "rb") as handle:
            self._map = mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
        self._entries = dict(entries)
        self.kept: dict[str, QuantizedWeight] = {}
        for name, entry in entries.items():
            found = self._exact(name, entry)
            if found is not None:
                module = name.removesuffix(".weight")
                self.kept[module] = found
                self._entries[f"{module}.{MARKER}"] = self._entries.pop(name)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        yield from self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is kept as: f16 for blocks that are read as values."""
        return FLOATS.get(self._entries[name].kind, torch.float16)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in float32."""
        return self.read_entry(name, self._entries[name])

    def read_entry(self, name: str, entry: Entry) -> torch.Tensor:
        """Any tensor of the file in float32; name: for messages."""
        data = np.frombuffer(self._map, np.uint8, entry.end - entry.begin, entry.begin)
        rows = data.reshape(entry.shape[0], -1)
        out = np.empty((len(rows), entry.shape[1] if len(entry.shape) > 1 else 1), np.float32)
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = slice(start, start + CHUNK_ROWS)
            out[chunk] = self._values(name, rows[chunk], entry.kind)
        self._give_back(entry)
        return torch.from_numpy(out if entry.order is None else out[entry.order]).reshape(entry.shape)

    def blocks(self, entry: Entry) -> Array:
        """A matrix as packed rows [n, bytes] in our order, a copy."""
        data = np.frombuffer(self._map, np.uint8, entry.end - entry.begin, entry.begin)
        rows = data.reshape(entry.shape[0], -1)
        copy = rows.copy() if entry.order is None else rows[entry.order]
        self._give_back(entry)
        return copy

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors have the same values."""
        return torch.equal(self.read(first), self.read(second))

    def hashes(self) -> dict[str, str]:
        """sha256 of the file, by its name."""
        return {self.path.name: file_hash(self.path)}

    @property
    def dequantized(self) -> Counter[str]:
        """How many matrices are read as values for want of a format that holds their blocks, by type."""
        blocks = {name: e.kind.lower() for name, e in self._entries.items() if not e.is_float}
        return Counter(kind for name, kind in blocks.items() if not name.endswith(f".{MARKER}"))

    def _exact(self, name: str, entry: Entry) -> QuantizedWeight | None:
        kind = entry.kind.lower()
        if kind not in BLOCKS or len(entry.shape) != 2:
            return None
        return matrices.read_weight(kind, name, entry.shape[1], partial(self.blocks, entry))

    def _values(self, name: str, rows: Array, kind: str) -> Array:
        try:
            values: Array = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
        except NotImplementedError:
            raise GristmillError(
                f"{self.path}: {name} has GGUF type {kind}, which is not read; give a file of another type"
            ) from None
        if not np.isfinite(values).all():
            raise GristmillError(f"{self.path}: {name} holds NaN or infinite weights; download it again")
        return values

    def _give_back(self, entry: Entry) -> None:
        start = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
        if entry.end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, entry.end - start)


def gguf_reader(tensors: GgufTensors) -> Reader:
    """How QuantizedCheckpoint reads what these tensors hold exactly."""

    def weight(stored: Tensors, module: str) -> QuantizedWeight:
        return tensors.kept[module]

    return Reader("gguf", (MARKER,), (MARKER,), weight, whole=True, dequantized=tensors.dequantized)
