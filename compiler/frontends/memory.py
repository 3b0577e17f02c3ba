"""The weights of a module in memory, with the interface of a Checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class MemoryCheckpoint:
    """Tensors by name, as they are when they are read: nothing is copied before."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        yield from self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        """A copy in float32 on the CPU (integers as they are)."""
        stored = self._tensors[name]
        kind = torch.float32 if stored.is_floating_point() else stored.dtype
        return stored.to("cpu", kind, copy=True).contiguous()

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors have the same values."""
        return torch.equal(self._tensors[first], self._tensors[second])

    def hashes(self) -> dict[str, str]:
        """sha256 of every tensor's type, shape and bytes, by name."""
        return {name: _hash(tensor) for name, tensor in self._tensors.items()}


def _hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    flat = tensor.cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
