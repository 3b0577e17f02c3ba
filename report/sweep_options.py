"""What a sweep may be asked for, and everything that can be refused before any work."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.quant.scheme import FORMATS
from gristmill.report.configurations import DEVICES, Configuration, grid, names
from gristmill.report.identity import MODEL_FILES, is_artifact, model_directory
from gristmill.report.peer_measures import Peer
from gristmill.report.ray_tasks import check_address
from gristmill.runtime.artifact import open_artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.evaluation import read_text
from gristmill.runtime.last_word import read_passages

SLACK_BYTES = 64 << 20  # left free beside what is written
STORE_SHARE = 2.0  # of a model's bytes: what calibrated weights take while they wait, with their inputs


@dataclass(frozen=True)
class SweepOptions:
    """Either model (a directory or hub name) with configurations, or artifacts.

    out: the report's folder; text: scored for accuracy, None for the built-in one that suits; tokens: of it;
    last_word: file of passages; reference: the artifact that others are compared with, None for the one
    nearest to float; samples: of calibration; rounds: of speed; seconds: least time of a measurement within
    one; fresh: measure accuracy anew as well; reuse_speed: take the speeds of the last run, if it was here
    and today; explain: measure why; ray: where configurations are compiled side by side, see ray_tasks.py;
    command: what the user typed, for the report.
    """

    out: Path
    model: str | None = None
    configurations: tuple[Configuration, ...] = ()
    artifacts: tuple[Path, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    text: Path | None = None
    tokens: int = 2048
    last_word: Path | None = None
    reference: Path | None = None
    peers: tuple[Peer, ...] = ()
    threads: int | None = None
    tensor_parallel: int | None = None
    samples: int = 64
    rounds: int = 3
    seconds: float = 0.3
    fresh: bool = False
    reuse_speed: bool = False
    explain: bool = True
    ray: str | None = None
    command: str = ""

    @staticmethod
    def of(
        subjects: Iterable[str], out: str | Path, *, weights: Sequence[str] | None = None,
        methods: Sequence[str] | None = None, kv: Sequence[str] | None = None,
        devices: Sequence[str] | None = None, **given: Any,
    ) -> SweepOptions:  # fmt: skip
        """From what stands on the command line: one model, or artifacts; given: other fields. Raises
        GristmillError, as `check` does, for what cannot be done."""
        paths = list(dict.fromkeys(subjects))
        made = [path for path in paths if is_artifact(path)]
        if not paths:
            raise GristmillError("nothing to report on; give a model, or artifacts")
        if made and len(made) < len(paths):
            other = next(path for path in paths if path not in made)
            raise GristmillError(
                f"{other} is no artifact and {made[0]} is one; give one model, or artifacts alone"
            )
        if not made and len(paths) > 1:
            raise GristmillError(f"{len(paths)} models were given, expected one; artifacts may be several")
        grid_names = {"weights": weights, "methods": methods, "kv": kv}
        chosen = [name for name, value in grid_names.items() if value is not None]
        if made and chosen:
            raise GristmillError(
                f"--{chosen[0]} says what to compile, and artifacts were given; leave it out"
            )
        subject: dict[str, Any] = (
            {"artifacts": tuple(map(Path, paths))}
            if made
            else {"model": paths[0], "configurations": grid(**grid_names)}
        )
        on = names("devices", ("cpu",) if devices is None else devices, DEVICES)
        options = SweepOptions(Path(out), devices=on, **subject, **given)
        check(options)
        return options


def check(options: SweepOptions) -> None:
    """Raises GristmillError for what would fail later, each in one line."""
    for name, value, least in (
        ("tokens", options.tokens, 2), ("rounds", options.rounds, 1), ("samples", options.samples, 1),
        ("threads", options.threads, 1), ("tensor_parallel", options.tensor_parallel, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise GristmillError(f"{name} is {value}, expected {least} or more")
    if options.ray is not None:
        if options.model is None:
            raise GristmillError("--ray is for compiling, and artifacts were given; leave it out")
        check_address(options.ray)
    if options.threads is not None and options.devices == ("cuda",):
        raise GristmillError("--threads is for the device cpu; leave it out")
    if options.out.exists() and not options.out.is_dir():
        raise GristmillError(f"{options.out} is a file; give -o a directory")
    if is_artifact(options.out):
        raise GristmillError(f"{options.out} is an artifact; give -o a directory of its own")
    _check_files(options)
    if "cuda" in options.devices:
        from gristmill.runtime.cuda import require_device

        require_device()


def _check_files(options: SweepOptions) -> None:
    if options.text is not None:
        read_text(options.text)
    if options.last_word is not None and not list(read_passages(options.last_word)):
        raise GristmillError(f"{options.last_word} has no passages")
    if options.reference is not None:
        if options.model is not None:
            raise GristmillError(
                "--reference is for artifacts; a model is compared with its own float weights"
            )
        open_artifact(options.reference)
    for artifact in options.artifacts:
        open_artifact(artifact)
    if options.model is not None and model_directory(options.model).resolve() == options.out.resolve():
        raise GristmillError(  # its report.json would count as a file of the model
            f"{options.out} is the model's own directory; give -o another one"
        )


def refuse_full_disk(options: SweepOptions, directory: Path, missing: Iterable[Configuration]) -> None:
    """Raises GristmillError where the artifacts that are missing will not fit."""
    whole = sum(p.stat().st_size for m in MODEL_FILES if "json" not in m for p in directory.glob(m))
    missing = list(missing)
    bits = [8.0 if FORMATS[c.weights].bits == 8 else FORMATS[c.weights].bits + 1.5 for c in missing]
    needed = sum(whole * b / 16 for b in bits) + SLACK_BYTES
    needed += STORE_SHARE * whole if any(c.calibrated for c in missing) else 0
    folder = next(p for p in (options.out.resolve(), *options.out.resolve().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise GristmillError(
            f"{options.out}: {len(missing)} artifacts take about {int(needed) >> 20} MiB, {free >> 20} are "
            "free; make room, or ask for fewer --weights"
        )
