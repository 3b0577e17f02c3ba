"""Weights on disk, read one tensor at a time.

Safetensors files are mapped and a tensor's pages are given back after it was read, so that peak memory does
not grow with the model. Legacy ``.bin`` pickles are read only when torch's ``weights_only`` loader accepts
them.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runtime.errors import GristmillError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
WEIGHT_NAMES = (  # in the order in which transformers looks for them
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
MAX_HEADER = 100 << 20
PIECE = 1 << 20


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file, dtype, shape, bytes [begin, end) of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Checkpoint:
    """The tensors of a Hugging Face directory by name. ``read`` returns a copy; nothing is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = weight_files(directory)
        self._maps: dict[Path, mmap.mmap] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            if file.suffix == ".safetensors":
                self.entries.update(_safetensors_entries(file))
            else:
                self._pickled.update(_load_pickle(file))

    def __contains__(self, name: str) -> bool:
        return name in self.entries or name in self._pickled

    def __iter__(self) -> Iterator[str]:
        yield from self.entries
        yield from self._pickled

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape if name in self.entries else tuple(self._pickled[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.entries[name].dtype if name in self.entries else self._pickled[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor in float32 (integers as they are), shape as stored."""
        if name in self._pickled:
            stored = self._pickled[name]
            return stored.float() if stored.is_floating_point() else stored.clone()
        entry = self.entries[name]
        mapped = self._map(entry.file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the buffer is read-only; it is copied before anything writes
            count = (entry.end - entry.begin) // entry.dtype.itemsize
            flat = (
                torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.begin)
                if count
                else torch.empty(0)
            )
            tensor = flat.to(torch.float32, copy=True) if entry.dtype.is_floating_point else flat.clone()
        del flat
        page = mmap.PAGESIZE
        start = entry.begin // page * page
        if entry.end > start:
            mapped.madvise(mmap.MADV_DONTNEED, start, entry.end - start)
        return tensor.reshape(entry.shape)

    def same(self, first: str, second: str) -> bool:
        """Whether two stored tensors have the same bytes."""
        if first in self._pickled:
            return torch.equal(self._pickled[first], self._pickled[second])
        a, b = self.entries[first], self.entries[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        one, other = self._map(a.file), self._map(b.file)
        steps = range(0, a.end - a.begin, PIECE)
        return all(
            one[a.begin + i : min(a.begin + i + PIECE, a.end)]
            == other[b.begin + i : min(b.begin + i + PIECE, b.end)]
            for i in steps
        )

    def hashes(self) -> dict[str, str]:
        """sha256 of every weight file, by name."""
        return {file.name: file_hash(file) for file in self.files}

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with open(file, "rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
        return self._maps[file]


def file_hash(file: Path) -> str:
    """sha256 of a file, read in pieces that do not stay in memory."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as handle:
        while piece := handle.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """The shards of the directory, in name order.

    Raises GristmillError when there are none or one is missing.
    """
    for name in WEIGHT_NAMES:
        path = directory / name
        if path.is_file() and path.suffix == ".json":
            return [_inside(directory, shard, name) for shard in sorted(set(_weight_map(path).values()))]
        if path.is_file():
            return [path]
    raise GristmillError(f"{directory}: no weights found; expected {', '.join(WEIGHT_NAMES)}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        table = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise GristmillError(
            f"{index}: not a shard index ({error}); expected a JSON object with weight_map"
        ) from None
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise GristmillError(
            f"{index}: weight_map must map tensor names to file names; download the model again"
        )
    return table


def _inside(directory: Path, shard: str, index: str) -> Path:
    if not shard or os.path.basename(shard) != shard or shard in (".", ".."):
        raise GristmillError(
            f"{directory / index}: shard {shard!r} leaves the directory; expected a plain file name"
        )
    path = directory / shard
    if not path.is_file():
        raise GristmillError(
            f"{directory}: shard {shard} is missing (named in {index}); download the model again"
        )
    return path


def _safetensors_entries(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with open(file, "rb") as handle:
        head = handle.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(MAX_HEADER, size - 8):
            raise GristmillError(
                f"{file}: truncated or not a safetensors file ({size} bytes); download it again"
            )
        raw = handle.read(length)
    try:
        header = json.loads(raw)
        entries = {k: _entry(file, v, 8 + length, size) for k, v in header.items() if k != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, GristmillError):
            raise
        raise GristmillError(f"{file}: damaged safetensors header ({error}); download it again") from None
    return entries


def _entry(file: Path, info: dict[str, Any], start: int, size: int) -> Entry:
    if info["dtype"] not in DTYPES:
        raise GristmillError(
            f"{file}: dtype {info['dtype']} is not supported; expected one of {', '.join(DTYPES)}"
        )
    dtype, shape = DTYPES[info["dtype"]], tuple(int(x) for x in info["shape"])
    begin, end = (int(x) + start for x in info["data_offsets"])
    count = 1
    for extent in shape:
        count *= extent
    if (
        min(shape, default=0) < 0
        or not start <= begin <= end <= size
        or end - begin != count * dtype.itemsize
    ):
        raise GristmillError(
            f"{file}: a tensor of shape {list(shape)} does not fit the file; truncated? download it again"
        )
    return Entry(file, dtype, shape, begin, end)


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    mapped = zipfile.is_zipfile(file)  # files from before torch 1.6 cannot be mapped
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many kinds; all mean the same to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise GristmillError(
            f"{file}: refused, torch's weights_only loader does not accept it ({reason}); "
            "convert it to safetensors"
        ) from None
    if not isinstance(loaded, dict):
        raise GristmillError(
            f"{file}: expected a state dict, got {type(loaded).__name__}; convert it to safetensors"
        )
    return {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
