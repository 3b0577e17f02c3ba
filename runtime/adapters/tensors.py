"""The tensors of a safetensors file that others wrote, mapped, by name."""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.weights_file import MAX_HEADER_BYTES

FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Stored:
    """A tensor as it stands in the file: dtype by safetensors' name, bf16 as its bits."""

    dtype: str
    bits: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def floats(self) -> np.ndarray:
        """A copy in float32."""
        if self.dtype == "BF16":
            return (self.bits.astype(np.uint32) << 16).view(np.float32)
        return self.bits.astype(np.float32)


def map_tensors(file: Path) -> dict[str, Stored]:
    """Every tensor of the file. Raises GristmillError for a damaged one, and for types that are no floats."""
    try:
        with file.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise GristmillError(f"{file} cannot be read: {reason}") from error
    length = int.from_bytes(mapped[:8], "little")
    if len(mapped) < 8 or length > min(MAX_HEADER_BYTES, len(mapped) - 8):
        raise GristmillError(f"{file}: truncated or not a safetensors file; download or copy it again")
    try:
        header = json.loads(mapped[8 : 8 + length])
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _tensor(file, mapped, 8 + length, name, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        if isinstance(error, GristmillError):
            raise
        raise GristmillError(f"{file}: damaged safetensors header; download or copy it again") from error


def _tensor(file: Path, mapped: mmap.mmap, start: int, name: str, entry: dict[str, object]) -> Stored:
    kind, given, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in FLOATS:
        raise GristmillError(f"{file}: tensor {name} is {kind}, expected one of {', '.join(FLOATS)}")
    shape = tuple(int(n) for n in given)  # type: ignore[attr-defined]
    begin, end = (int(n) + start for n in offsets)  # type: ignore[attr-defined]
    dtype, count = np.dtype(FLOATS[str(kind)]), math.prod(shape)
    if min(shape, default=0) < 0 or not start <= begin <= end <= len(mapped):
        raise GristmillError(f"{file}: tensor {name} does not fit the file; download or copy it again")
    if end - begin != count * dtype.itemsize:
        raise GristmillError(f"{file}: tensor {name} has {end - begin} bytes, its shape needs others")
    return Stored(str(kind), np.frombuffer(mapped, dtype, count, begin).reshape(shape))
