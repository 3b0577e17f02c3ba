"""The weights of an exported program as torch tensors over the mapped file: what its package is compiled for,
and what each of its entry points is handed when it is loaded.

Packed weights come as 32-bit words, a vector of which holds the same bits of eight neighbours: generated code
takes them apart with shifts. Zero points come one a byte. All else is as stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import FLOAT_BYTES, Program, Segment


def constants(weights: Path, program: Program) -> dict[str, Tensor]:
    """By name: NAME.weight [n, k] floats or [n, words] int32, NAME.scale [n, G], NAME.zero [n, G] uint8 or
    int8 of each matrix, and the vectors, f32 or int32. Raises GristmillError for what the file lacks."""
    try:
        with safe_open(weights, framework="pt") as file:
            found = {name: file.get_tensor(name).flatten() for name in sorted(vector_names(program))}
            for segments in program.weights.values():
                for segment in segments:
                    found |= _matrix(file, segment)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise GristmillError(f"{weights}: {reason}; export again") from error
    return found


def vector_names(program: Program) -> set[str]:
    """Norm weights, biases, frequencies, column orders."""
    names = {rope.inv_freq for rope in program.ropes}
    return names.union(*(i.vectors.values() for i in program.instructions))


def _matrix(file: Any, segment: Segment) -> dict[str, Tensor]:
    name, data = segment.name, file.get_tensor(f"{segment.name}.weight")
    if segment.format in FLOAT_BYTES:
        return {f"{name}.weight": data}
    found = {f"{name}.weight": data.view(torch.int32), f"{name}.scale": file.get_tensor(f"{name}.scale")}
    if not segment.symmetric:
        zero = file.get_tensor(f"{name}.zero")
        found[f"{name}.zero"] = zero if segment.format == "int8" else _unpacked(zero, segment.groups)
    return found


def _unpacked(pairs: Tensor, groups: int) -> Tensor:
    """[n, ceil(G / 2)] of two zero points a byte, the even one low, to [n, G]."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)[:, :groups].contiguous()
