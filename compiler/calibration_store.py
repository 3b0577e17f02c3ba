"""What a calibration has finished so far, in a directory beside the artifact to be.

A killed run goes on from here with --resume and ends with the same bytes. Quantized matrices are written one
file each as they are made, which also keeps them out of memory; the point that was reached, with the
values alive there, is one file that replaces its predecessor, so that there is always a whole one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..quant.scheme import parse
from ..quant.tensor import QuantizedTensor, StoredTensor
from ..runtime.errors import GristmillError

IDENTITY = "calibration.json"
POINT = "point.safetensors"


class StoreFull(GristmillError):
    """The disk refused; what was written before can be resumed."""


class NotResumable(GristmillError):
    """There is no calibration to go on with, or one of something else."""


def store_path(out: Path) -> Path:
    """The directory in which the calibration of an artifact waits."""
    out = out.resolve()
    return out.parent / f".{out.name}.calibration"


@dataclass
class Point:
    """phase: what is walked for; at: nodes done; values: alive there; factors, records: results so far."""

    phase: str
    at: int
    values: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)


class CalibrationStore:
    """The directory of one calibration; ``identity`` is everything that its results depend on."""

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.path = store_path(out)
        self.identity = json.loads(json.dumps(identity))

    def open(self, resume: bool) -> Point | None:
        """The point to go on from, None to begin. Raises NotResumable where a resume does not fit."""
        if resume:
            return self._resumed()
        self.clear()
        self.path.mkdir(parents=True)
        (self.path / IDENTITY).write_text(json.dumps(self.identity, indent=1))
        return None

    def clear(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _resumed(self) -> Point | None:
        try:
            found = json.loads((self.path / IDENTITY).read_text())
        except (OSError, ValueError):
            raise NotResumable(
                f"there is no calibration to resume in {self.path}; leave out --resume to begin one"
            ) from None
        for key in sorted({*found, *self.identity}):
            if found.get(key) != self.identity.get(key):
                raise NotResumable(
                    f"the calibration to resume was made with {key} {found.get(key)!r}, "
                    f"now it is {self.identity.get(key)!r}; leave out --resume to begin again"
                )
        return self._read_point() if (self.path / POINT).exists() else None

    def save(self, point: Point) -> None:
        """Replace the point reached before."""
        tensors = {f"values.{k}": v for k, v in point.values.items()}
        tensors |= {f"factors.{k}": v for k, v in point.factors.items()}
        facts = {"phase": point.phase, "at": point.at, "records": point.records}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._write(POINT, contiguous, {"point": json.dumps(facts)})

    def _read_point(self) -> Point:
        with safe_open(self.path / POINT, "pt") as file:
            facts = json.loads(file.metadata()["point"])
            names = list(file.keys())
            groups: dict[str, dict[str, Tensor]] = {"values": {}, "factors": {}}
            for name in names:
                group, _, rest = name.partition(".")
                groups[group][rest] = file.get_tensor(name)
        return Point(facts["phase"], facts["at"], groups["values"], groups["factors"], facts["records"])

    def save_matrix(self, tensor: QuantizedTensor, version: str = "") -> None:
        """Keep a matrix until the artifact is written; another version of it stands beside the first."""
        arrays = {suffix: torch.from_numpy(array) for suffix, array in tensor.arrays.items()}
        facts = {"scheme": str(tensor.scheme), "k": tensor.k, "relative_error": tensor.relative_error}
        self._write(_file_name(tensor.name + version), arrays, {"matrix": json.dumps(facts)})

    def matrix(self, name: str, version: str = "") -> QuantizedTensor:
        """A matrix as it was saved."""
        path = self.path / _file_name(name + version)
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["matrix"])
        arrays = load_file(path)
        tensors = tuple(StoredTensor(f"{name}.{s}", np.ascontiguousarray(arrays[s].numpy())) for s in
                        ("weight", "scale", "zero") if s in arrays)  # fmt: skip
        return QuantizedTensor(
            name, parse(facts["scheme"]), len(arrays["weight"]), facts["k"], tensors, facts["relative_error"]
        )

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        temporary = self.path / f"{name}.tmp"
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, self.path / name)
        except Exception as error:
            temporary.unlink(missing_ok=True)
            if "space" in str(error).lower() or isinstance(error, OSError):
                raise StoreFull(
                    f"{self.path} cannot be written ({error}); make room on the disk and use --resume"
                ) from error
            raise


def _file_name(matrix: str) -> str:
    """A matrix name as a file name: readable, and different for different matrices."""
    readable = "".join(c if c.isalnum() or c in ".-_+" else "_" for c in matrix)[-80:]
    return f"{readable}-{hashlib.sha256(matrix.encode()).hexdigest()[:12]}.safetensors"
