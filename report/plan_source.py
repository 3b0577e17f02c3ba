"""The programs that a plan is about: an artifact's own, or those that a compile of a config would make.

Tracing a config takes seconds to a minute and asks nothing of the device or of the formats, so its programs
are kept in the user's cache directory, by the config and by everything that makes a program of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gristmill.compiler.options import WEIGHTS, CompileOptions
from gristmill.quant.scheme import Scheme
from gristmill.runtime.artifact import MANIFEST
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import CacheSpec, Instruction, Program, Segment, segment_row_bytes
from gristmill.runtime.report import read_program

FORMAT = 1
CONFIG = "config.json"


@dataclass(frozen=True)
class Sketch:
    """A program in one format of weights; label: that format in words, with its group."""

    weights: str
    label: str
    program: Program

    @property
    def segments(self) -> list[Segment]:
        """Every matrix once."""
        found = {s.name: s for segments in self.program.weights.values() for s in segments}
        return list(found.values())

    @property
    def weight_bytes(self) -> int:
        """Of all tensors: matrices with f16 scales, and vectors in f32."""
        matrices = sum(segment.n * segment_row_bytes(segment) for segment in self.segments)
        return matrices + 4 * sum(_vectors(self.program).values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all matrices, scales included, per weight: as a compile counts them."""
        count = sum(segment.n * segment.k for segment in self.segments)
        bits = sum(
            s.n * s.k * Scheme(s.format, s.group, s.symmetric).bits_per_weight(s.k) for s in self.segments
        )
        return bits / count

    def with_cache(self, dtype: str) -> Program:
        """The same program with caches of another type."""
        caches: list[CacheSpec] = [
            replace(cache, k_dtype=dtype, v_dtype=dtype) for cache in self.program.caches
        ]
        return replace(self.program, caches=caches)


def _vectors(program: Program) -> dict[str, int]:
    """Elements of every vector by name; a column order [k] has as many bytes to an element."""
    found = {rope.inv_freq: rope.dims // 2 for rope in program.ropes}
    for instruction in program.instructions:
        for role, name in instruction.vectors.items():
            found[name] = _vector_size(program, instruction, role)
    return found


def _vector_size(program: Program, instruction: Instruction, role: str) -> int:
    if instruction.op == "attention":
        cache = program.caches[instruction.attribute("cache")]
        return int(instruction.attribute("heads")) if role == "sinks" else cache.k_dim
    if instruction.op == "linear":
        segments = program.weights[instruction.weight or ""]
        return segments[0].k if role == "order" else sum(segment.n for segment in segments)
    return instruction.out.width


def sketches(model: str, weights: Sequence[str] | None, default: Sequence[str]) -> tuple[str, list[Sketch]]:
    """The name of a model and its programs by format; ``model`` is a directory with a config.json, an
    artifact, or a name on the hub, of which the config alone is fetched.

    Raises GristmillError for what is none of them, for models that do not compile, and for ``weights`` beside
    an artifact, which has its own.
    """
    path = Path(model)
    if path.is_dir() and (path / MANIFEST).is_file():
        if weights:
            raise GristmillError(
                f"{model} is an artifact, whose weights are what they are; leave out --weights, or plan the "
                "model that it was made from"
            )
        return path.resolve().name, [_of_artifact(path)]
    chosen = list(dict.fromkeys(weights or default))
    for name in chosen:
        if name not in WEIGHTS:
            raise GristmillError(f"weights is {name!r}, expected one of {', '.join(WEIGHTS)}")
    return _of_model(model, chosen)


def _of_artifact(path: Path) -> Sketch:
    """Its linears' commonest format stands for it."""
    artifact, program = read_program(path)
    weights: dict[str, int] = {}
    for segments in program.weights.values():
        for s in segments:
            name = str(Scheme(s.format, s.group, s.symmetric))
            weights[name] = weights.get(name, 0) + s.n * s.k
    label = max(weights, key=lambda name: weights[name])
    return Sketch(label.split("-")[0], label, program)


def _of_model(model: str, weights: Sequence[str]) -> tuple[str, list[Sketch]]:
    try:
        from gristmill.compiler.load import read_config, resolve
    except ModuleNotFoundError as error:
        raise _needs_compiler(error) from error
    directory = resolve(model, [CONFIG])
    read_config(directory)
    programs = _kept_programs(directory, weights)
    name = directory.name if os.path.isdir(model) else model
    return name, [Sketch(w, _label(w, programs[w]), programs[w]) for w in weights]


def _needs_compiler(error: ModuleNotFoundError) -> Exception:
    if str(error.name).split(".")[0] not in ("torch", "transformers", "huggingface_hub"):
        return error
    return GristmillError(
        f"planning a model needs {error.name}; install it with `pip install 'gristmill[compile]'`, "
        "or plan an artifact"
    )


def _label(weights: str, program: Program) -> str:
    """The scheme that most weights of the format have."""
    found: dict[str, int] = {}
    for segments in program.weights.values():
        for s in segments:
            if s.format == weights:
                name = str(Scheme(s.format, s.group, s.symmetric))
                found[name] = found.get(name, 0) + s.n * s.k
    return max(found, key=lambda name: found[name], default=weights)


def _kept_programs(directory: Path, weights: Sequence[str]) -> dict[str, Program]:
    """By format: from the cache directory, or traced and kept there for all formats."""
    path = cache_file(directory / CONFIG)
    found: dict[str, Program] = {}
    with suppress(OSError, ValueError, GristmillError, AttributeError):  # damaged counts as missing
        found = _parsed(path.read_text("utf-8"))
    if not all(name in found for name in weights):
        programs = _traced_programs(directory)
        text = json.dumps({name: program.to_json() for name, program in programs.items()})
        _keep(path, text)
        found = _parsed(text)
    return found


def _parsed(text: str) -> dict[str, Program]:
    kept: dict[str, Any] = json.loads(text)
    return {name: Program.from_json(document) for name, document in kept.items()}


def _traced_programs(directory: Path) -> dict[str, Program]:
    try:
        from gristmill.compiler.shapes import Shape
    except ModuleNotFoundError as error:
        raise _needs_compiler(error) from error
    shape = Shape.of(directory)
    return {
        name: shape.lowered(CompileOptions.of(weights=name, kv="f16")).program for name in WEIGHTS
    }  # lowering is quick: all of them


def cache_file(config: Path) -> Path:
    """Where the programs of a config are kept: by its bytes, and by the sources and packages that trace."""
    from importlib.metadata import version

    from gristmill import compiler, passes

    digest = hashlib.sha256(f"{FORMAT} {version('torch')} {version('transformers')}".encode())
    for folder in (*compiler.__path__, *passes.__path__):
        for source in sorted(Path(folder).glob("*.py")):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(config.read_bytes())
    root = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(root) if Path(root).is_absolute() else Path(os.path.expanduser("~")) / ".cache"
    return home / "gristmill" / f"programs-{digest.hexdigest()[:16]}.json"


def _keep(path: Path, text: str) -> None:
    """Written beside and renamed; where that is not possible, the next plan traces again."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
