"""A checkpoint that holds its linears quantized, seen as one of float weights.

Layer X's tensors (`X.qweight`, `X.scales` ...) appear as `X.weight`, which reads as the values that they
mean; the quantized form itself is at hand for who wants to keep it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ..quant.formats import Reader
from ..quant.formats.weight import QuantizedWeight
from .checkpoint import Checkpoint

WEIGHT = "weight"


class QuantizedCheckpoint:
    """A Checkpoint through the eyes of a Reader: the same interface, and ``quantized``."""

    def __init__(self, checkpoint: Checkpoint, reader: Reader) -> None:
        self.checkpoint, self.reader = checkpoint, reader
        split = [name.rpartition(".") for name in checkpoint]
        self.layers = {layer for layer, _, part in split if part in reader.markers}
        self._known: dict[str, QuantizedWeight] = {}

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    def __contains__(self, name: str) -> bool:
        layer, _, part = name.rpartition(".")
        if layer in self.layers and (part == WEIGHT or part in self.reader.parts):
            return part == WEIGHT
        return name in self.checkpoint

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self.checkpoint if name in self and not self._is_quantized(name))
        yield from (f"{layer}.{WEIGHT}" for layer in sorted(self.layers))

    def shape(self, name: str) -> tuple[int, ...]:
        found = self.quantized(name)
        return (found.n, found.k) if found else self.checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if self._is_quantized(name) else self.checkpoint.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in float32; a quantized one dequantized."""
        found = self.quantized(name)
        return torch.from_numpy(found.dequantize()) if found else self.checkpoint.read(name)

    def quantized(self, name: str) -> QuantizedWeight | None:
        """The quantized form of X.weight, None where it is float. Raises GristmillError for a damaged one."""
        if not self._is_quantized(name):
            return None
        if name not in self._known:
            self._known[name] = self.reader.weight(self.checkpoint, name.rpartition(".")[0])
        return self._known[name]

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors have the same values."""
        if self._is_quantized(first) or self._is_quantized(second):
            return torch.equal(self.read(first), self.read(second))
        return self.checkpoint.same(first, second)

    def hashes(self) -> dict[str, str]:
        """sha256 of every weight file, by name."""
        return self.checkpoint.hashes()

    def _is_quantized(self, name: str) -> bool:
        layer, _, part = name.rpartition(".")
        return part == WEIGHT and layer in self.layers
