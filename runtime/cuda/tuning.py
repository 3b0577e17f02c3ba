"""Configurations of products that were timed on this device, kept in a file of the user's cache directory.

A file is for one device and for the kernels and the Triton that were timed: anything else changes its name.
What it holds is believed only as far as it is among the candidates that would be timed today.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from gristmill.kernels import triton as kernels
from gristmill.kernels.triton.linear import tune
from gristmill.kernels.triton.linear_configs import Config, candidates, choose
from gristmill.kernels.triton.matrix import Matrix
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import LOGITS, Program

FORMAT = 1
Timer = Callable[[Callable[[], None]], float]


def identity(device: torch.device) -> dict[str, Any]:
    """What a timing is good for: the device, Triton, and the kernels' own sources."""
    name, capability = "cpu", [0, 0]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = list(torch.cuda.get_device_capability(device))
    sources = hashlib.sha256()
    for path in sorted(Path(folder) / name for folder in kernels.__path__ for name in os.listdir(folder)):
        if path.suffix == ".py":
            sources.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "format": FORMAT, "device": name, "capability": capability, "triton": triton.__version__,
        "kernels": sources.hexdigest(),
    }  # fmt: skip


def cache_file(of: dict[str, Any]) -> Path:
    """Where the configurations of an identity are kept."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(os.path.expanduser("~"))  # stays "~" for a user without one
    folder = Path(root) if Path(root).is_absolute() else home / ".cache"
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return folder / "gristmill" / f"tuned-{digest[:16]}.json"


def key_of(matrix: Matrix, rows: int, glu: bool, act_group: int) -> str:
    """What a config depends on beside the device."""
    scales = "symmetric" if matrix.symmetric else "asymmetric"
    pair = " pair" if glu else ""
    by = f" by int8 of {act_group}" if act_group else ""
    return f"{matrix.format} {matrix.n}x{matrix.k} group {matrix.group} {scales}{pair}{by}, {rows} rows"


@dataclass
class Tuned:
    """The config of each `key_of`."""

    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def configs(self, segments: Sequence[Matrix], rows: int, glu: bool, act_group: int) -> list[Config]:
        """A config for each segment of a linear, the table's where none was timed."""
        pair = glu and len(segments) == 1
        return [
            self.config(s, rows, pair, act_group) or choose(s, rows, act_group) for s in segments
        ]

    def config(self, matrix: Matrix, rows: int, glu: bool, act_group: int) -> Config | None:
        given = self.found.get(key_of(matrix, rows, glu, act_group))
        found = candidates(matrix, rows, glu, act_group) if given else []
        known = {json.dumps(asdict(c)): c for c in found}
        return known.get(json.dumps(given))

    @staticmethod
    def read(device: torch.device) -> Tuned:
        """What was stored for the device: nothing where there is no file, nor where it is damaged, which a
        warning says."""
        of = identity(device)
        path = cache_file(of)
        try:
            document = json.loads(path.read_bytes())
            if {name: document.get(name) for name in of} != of or not isinstance(document["configs"], dict):
                raise ValueError("it is for something else")
            return Tuned(document["configs"])
        except FileNotFoundError:
            return Tuned()
        except (OSError, ValueError, KeyError, AttributeError) as error:
            text = f"{path} is left out, it cannot be read ({error}); `gristmill tune` writes it anew"
            warnings.warn(" ".join(text.split()), stacklevel=2)
            return Tuned()

    def write(self, device: torch.device) -> Path:
        """Stores all, at once or not at all. Raises GristmillError where that cannot be."""
        of = identity(device)
        path = cache_file(of)
        if not path.is_absolute():
            raise GristmillError("there is no home directory to keep tuned configs in; set XDG_CACHE_HOME")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({**of, "configs": self.found}, file, indent=1, sort_keys=False)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            raise GristmillError(
                f"{path} cannot be written: {error.strerror or error}; set XDG_CACHE_HOME to a directory "
                "that can"
            ) from error
        return path


@dataclass(frozen=True)
class Work:
    """One matrix in one bucket of rows, that a config is wanted for."""

    matrix: Matrix
    rows: int
    glu: bool
    act_group: int

    @property
    def key(self) -> str:
        return key_of(self.matrix, self.rows, self.glu, self.act_group)


def works(
    program: Program, matrices: dict[str, list[Matrix]], buckets: Sequence[int], logit_rows: int
) -> list[Work]:
    """Every different product of a program; of logits only up to as many rows as are computed at once."""
    found: dict[str, Work] = {}
    for i in program.instructions:
        if i.op != "linear" or i.weight is None:
            continue
        segments = matrices[i.weight]
        for rows in buckets:
            if i.out.value == LOGITS and rows > logit_rows:
                continue
            for matrix in segments:
                pair = bool(i.attribute("glu")) and len(segments) == 1
                work = Work(matrix, rows, pair, i.attribute("act_group"))
                found.setdefault(work.key, work)
    return list(found.values())


def tune_all(
    wanted: Sequence[Work], device: torch.device, time: Timer | None = None
) -> Iterator[tuple[Work, Config]]:
    """Times the candidates of each and stores the winners beside what was stored before; yields them as they
    come. What was timed before is kept, so that a run that was interrupted goes on."""
    tuned = Tuned.read(device)
    for work in wanted:
        config = tuned.config(work.matrix, work.rows, work.glu, work.act_group)
        if config is None:
            config = tune(
                work.matrix, work.rows, torch.float32, glu=work.glu, time=time, act_group=work.act_group
            )
            tuned = Tuned.read(device)  # with what another process has found meanwhile
            tuned.found[work.key] = asdict(config)
            tuned.write(device)
        yield work, config
