"""The points of a sweep while they are measured: what each is, where its artifact lies, what went wrong."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gristmill.report.configurations import Configuration
from gristmill.report.identity import compile_versions, digest, model_digests
from gristmill.report.peer_measures import Peer
from gristmill.report.sweep_options import SweepOptions
from gristmill.runtime.artifact import Artifact, open_artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.report import read_program

ARTIFACTS = "artifacts"
KEY_DIGITS = 10  # of a hash in a directory's name


@dataclass
class Subject:
    """One point to be. content: what its figures depend on, known once its artifact is there; reasons: what
    went wrong, or is not measured; results: by kind, JSON of the tasks."""

    id: str
    label: str
    device: str
    weights: str
    method: str
    kv: str
    command: str
    artifact: Path | None = None
    configuration: Configuration | None = None
    peer: Peer | None = None
    compile_command: str = ""
    content: str = ""
    failed: bool = False
    reasons: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        self.failed = True
        self.reasons.append(reason)


@dataclass(frozen=True)
class Wanted:
    """An artifact of a configuration, at the place that its content decides."""

    configuration: Configuration
    path: Path
    options: dict[str, Any]
    key: str

    @property
    def is_there(self) -> bool:
        return content_of(self.path) is not None


def content_of(path: Path) -> str | None:
    """The content id of a whole artifact, None where there is none."""
    try:
        return open_artifact(path).content_id
    except GristmillError:
        return None


def wanted_artifacts(options: SweepOptions, directory: Path) -> list[Wanted]:
    """One for each configuration; directory: of the model."""
    files, versions = model_digests(directory), compile_versions()
    found = []
    for configuration in options.configurations:
        chosen = configuration.compile_options()
        if configuration.calibrated:
            chosen["samples"] = options.samples
        key = digest({"model": files, "options": chosen, "versions": versions})
        path = options.out / ARTIFACTS / f"{configuration.name}-{key[:KEY_DIGITS]}"
        found.append(Wanted(configuration, path, chosen, key))
    return found


def model_subjects(options: SweepOptions, wanted: Sequence[Wanted]) -> list[Subject]:
    assert options.model is not None, "a model"
    return [
        Subject(
            f"{w.configuration.name}-{device}",
            _label(w.configuration.label, device, options),
            device,
            w.configuration.weights,
            w.configuration.method,
            w.configuration.kv,
            repeat_command(options, [options.model], w.configuration.sweep_options(), device),
            w.path,
            w.configuration,
            compile_command=_compile_command(options.model, w),
        )
        for device in options.devices
        for w in wanted
    ]


def artifact_subjects(options: SweepOptions) -> list[Subject]:
    names = unique_names([path.resolve().name for path in options.artifacts])
    return [
        Subject(
            f"{name}-{device}",
            _label(name, device, options),
            device,
            *formats_of(path),
            repeat_command(options, [str(path)], [], device),
            path,
            compile_command=_compile_command_of(open_artifact(path)),
        )
        for device in options.devices
        for name, path in zip(names, options.artifacts, strict=True)
    ]


def peer_subjects(options: SweepOptions) -> list[Subject]:
    """Peers run on the CPU; the command that repeats one brings all of the report's own points along, since
    a peer is measured at their shapes."""
    subjects = [options.model] if options.model else [str(path) for path in options.artifacts]
    return [
        Subject(
            peer.name, peer.name, "cpu", Path(peer.path).stem, "", "f16" if peer.kind == "llama.cpp" else "",
            repeat_command(options, subjects, [], "cpu", peer), peer=peer,
        )
        for peer in options.peers
    ]  # fmt: skip


def unique_names(names: Sequence[str]) -> list[str]:
    """Those that come again get a number.

    >>> unique_names(["a", "b", "a"])
    ['a', 'b', 'a-2']
    """
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found


def formats_of(path: Path) -> tuple[str, str, str]:
    """Weights, method and cache of an artifact: the format that most of its weights have, the method that
    they were rounded by, the types of the cache."""
    opened, program = read_program(path)
    counts: dict[str, int] = {}
    for segment in (s for segments in program.weights.values() for s in segments):
        counts[segment.format] = counts.get(segment.format, 0) + segment.n * segment.k
    weights = max(counts, key=lambda name: counts[name])
    said = opened.manifest["quantization"]
    kinds = list(dict.fromkeys(t for c in program.caches for t in (c.k_dtype, c.v_dtype)))
    method = str(said.get("method", "")) if weights.startswith("int") else ""
    return weights, "" if method == "none" else method, str(said.get("kv", "/".join(kinds)))


def _label(name: str, device: str, options: SweepOptions) -> str:
    return f"{name}, {device}" if len(options.devices) > 1 else name


def _compile_command(model: str, wanted: Wanted) -> str:
    words = ["gristmill", "compile", model, "-o", "OUT"]
    for name, value in wanted.options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _compile_command_of(opened: Artifact) -> str:
    """As it stands in the artifact, "" where that was never measured by a gate."""
    name = "evaluation.json"
    return str(opened.json(name).get("command", "")) if name in opened.files else ""


def repeat_command(
    options: SweepOptions,
    subjects: Sequence[str],
    chosen: Sequence[str],
    device: str,
    peer: Peer | None = None,
) -> str:
    """The `gristmill report` that measures these subjects as this sweep does."""
    words = ["gristmill", "report", *subjects, *chosen, "--devices", device]
    for name in ("text", "last_word", "reference"):
        value = getattr(options, name)
        words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    for name in ("tokens", "threads", "samples", "rounds"):
        value = getattr(options, name)
        of_cpu = name == "threads" and device != "cpu"  # where it would be refused
        if value is not None and value != getattr(SweepOptions, name) and not of_cpu:
            words += [f"--{name}", str(value)]
    words += peer.words if peer else []
    return shlex.join([*words, "-o", str(options.out)])


def default_threads() -> int:
    """What a session takes that is not told: one for each physical core that may be used."""
    from gristmill.runtime import machine
    from gristmill.runtime.session import native

    return int(min(machine.usable_cpus(), native().default_threads()))
