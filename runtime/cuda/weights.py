"""The weights of an artifact on a device, in the layout in which they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gristmill.kernels.triton.matrix import Matrix, merge
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program, Segment


class Weights:
    """matrices: what Program.weights names, neighbours of one format merged; vectors: by name, f32, but
    orders of columns i32.
    """

    def __init__(self, program: Program, paths: Sequence[Path], device: torch.device) -> None:
        """paths: each tensor is in one of these files."""
        try:
            with _opened(paths) as files:
                self.matrices = _matrices(program, files, device)
                self.vectors = {name: _vector(files, name, device) for name in sorted(_names(program))}
        except (SafetensorError, OSError) as error:
            raise GristmillError(f"{paths[-1].name}: {error}; compile the model again") from error

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        matrices = {id(m): m.bytes for segments in self.matrices.values() for m in segments}
        return sum(matrices.values()) + sum(v.nbytes for v in self.vectors.values())

    def bytes_per_token(self, program: Program) -> int:
        """Bytes that one row reads: of every product all, of an embedding a row."""
        total = 0
        for i in program.instructions:
            segments = self.matrices[i.weight] if i.weight is not None else []
            size = sum(m.bytes for m in segments)
            total += size // sum(m.n for m in segments) if i.op == "embedding" else size
        return total


class _Files:
    """Several weights files as one."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._last = files[-1]
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (not a dict)

    def get_tensor(self, name: str) -> Tensor:
        found: Tensor = self._file_of.get(name, self._last).get_tensor(name)
        return found


@contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[_Files]:
    with ExitStack() as held:
        yield _Files([held.enter_context(safe_open(path, framework="pt")) for path in paths])


def _matrices(program: Program, file: _Files, device: torch.device) -> dict[str, list[Matrix]]:
    """Merged on the host, so that the device never holds a matrix twice; the same segments once."""
    made: dict[tuple[Segment, ...], list[Matrix]] = {}
    for segments in program.weights.values():
        if tuple(segments) not in made:
            whole = merge([_segment(file, segment) for segment in segments])
            made[tuple(segments)] = [_on(matrix, device) for matrix in whole]
    return {key: made[tuple(segments)] for key, segments in program.weights.items()}


def _segment(file: _Files, segment: Segment) -> Matrix:
    name, has_scales = segment.name, segment.format not in ("f32", "f16", "bf16")
    try:
        return Matrix(
            segment.format, segment.n, segment.k, segment.group, segment.symmetric or not has_scales,
            file.get_tensor(f"{name}.weight"),
            file.get_tensor(f"{name}.scale") if has_scales else None,
            file.get_tensor(f"{name}.zero") if has_scales and not segment.symmetric else None,
        )  # fmt: skip
    except AssertionError as error:
        raise GristmillError(f"weights.safetensors: {name}: {error}; compile the model again") from error


def _on(m: Matrix, device: torch.device) -> Matrix:
    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    data = m.data.to(device)
    return Matrix(m.format, m.n, m.k, m.group, m.symmetric, data, move(m.scale), move(m.zero))


def _names(program: Program) -> set[str]:
    found = {rope.inv_freq for rope in program.ropes}
    return found.union(*(i.vectors.values() for i in program.instructions))


def _vector(file: _Files, name: str, device: torch.device) -> Tensor:
    stored = file.get_tensor(name).flatten()
    return stored.to(device, torch.float32 if stored.is_floating_point() else torch.int32)
