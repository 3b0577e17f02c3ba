"""A safetensors file as Hugging Face libraries write it: no paddings, tensors one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.quant import pack

Array = NDArray[Any]
DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int32": "I32", "int64": "I64", "uint8": "U8"}
ENTRY_BYTES = 160  # of a header's entry, without its name


class TensorFile:
    """Writes tensors as they come; `names` are at least those that will, so that the header has its room."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self._room = -(-(64 + sum(ENTRY_BYTES + len(name.encode()) for name in names)) // 64) * 64
        self._entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offset = 0
        self._file = path.open("wb")
        self._file.write(bytes(8 + self._room))

    def write(self, name: str, array: Array) -> None:
        """A tensor; bf16 comes as its bits in uint16."""
        assert name not in self._entries, f"two tensors are called {name}"
        end = self._offset + array.nbytes
        self._entries[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [self._offset, end],
        }
        self._file.write(np.ascontiguousarray(array).data)
        self._offset = end

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        assert len(header) <= self._room, "the header's room was counted too small"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()


def smallest_float(values: Array) -> Array:
    """f32 values in the smallest of f16, bf16 (bits) and f32 that holds them exactly."""
    for name in ("f16", "bf16"):
        stored = pack.encode_float(values, name)
        if np.array_equal(pack.decode_float(stored), values):
            return stored
    return np.ascontiguousarray(values, np.float32)
