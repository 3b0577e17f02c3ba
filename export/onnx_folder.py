"""An artifact → a directory that ONNX Runtime and ONNX Runtime GenAI run.

    model.onnx        what GenAI runs: ids in, logits of the last row out, past and present keys and values
    rows.onnx         the same over the same weights, with logits of the rows that are asked for: a Session's
    model.onnx.data   the weights, mapped by both
    genai_config.json, tokenizer files, generation_config.json
    export.json, program.json    what `gristmill.load(directory, device="onnx:cpu")` reads

Weights are not rounded again. One matrix at a time is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx

import gristmill
from gristmill.export.folder import SESSION_FILES, Progress, new_folder, write_json, write_session_files
from gristmill.export.genai_config import genai_config, tokenizer_config
from gristmill.export.onnx_graph import Graph, WeightFile
from gristmill.export.onnx_half import HalfLowering
from gristmill.export.onnx_lowering import Lowering
from gristmill.export.onnx_runtime_ops import RuntimeLowering
from gristmill.export.stored import Stored
from gristmill.runtime.arguments import within
from gristmill.runtime.artifact import (
    EXPORT,
    GENERATION_CONFIG,
    MODEL_CONFIG,
    PROGRAM,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Artifact,
    open_artifact,
)
from gristmill.runtime.decoding.options import refuse_unknown
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import CACHE_TYPES, CacheSpec, Instruction, Program

MODEL, ROWS, DATA, GENAI = "model.onnx", "rows.onnx", "model.onnx.data", "genai_config.json"
WRITTEN = {MODEL, ROWS, DATA, GENAI, "config.json", *SESSION_FILES}
FLOAT_CACHES = ("f32", "f16")
PLAIN_CACHES = ("int8",)  # rounded ones that standard operators write out
ACTIVATIONS = ("int8", "f32", "f16")


@dataclass(frozen=True)
class OnnxOptions:
    """plain: standard operators alone. kv: "f32" keeps all of a cache that the artifact rounds. activations:
    "int8" or "f32", what integers are multiplied by, or "f16": what products and attention compute in, for
    CUDA; None: as the artifact. max_len: positions, None: as compiled."""

    plain: bool = False
    kv: str | None = None
    activations: str | None = None
    max_len: int | None = None


def export_onnx(
    artifact: str | Path,
    out: str | Path,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Write the artifact's model to the directory `out`. options: the fields of OnnxOptions.

    force: replace an earlier export. Raises GristmillError for what ONNX cannot express, leaving nothing.
    """
    refuse_unknown(options, [field.name for field in fields(OnnxOptions)], "the export to ONNX")
    chosen = OnnxOptions(**options)
    opened = open_artifact(artifact)
    program = _program(opened, chosen)
    with new_folder(out, force, lambda names: EXPORT in names and names <= WRITTEN) as staging:
        write_graphs(staging, program, Stored(opened.weights_path), chosen, progress)
        _write_rest(staging, opened, program, chosen)
    return Path(out).resolve()


def _program(opened: Artifact, options: OnnxOptions) -> Program:
    """The program with what the options change: float caches, limits, activations."""
    program = Program.from_json(opened.json(PROGRAM))
    limits = program.limits
    max_len = within("max_len", options.max_len, limits.max_len, limits.max_position)
    program.limits = replace(limits, max_len=max_len, max_position=max_len)
    _refuse_choices(options)
    program.caches = caches(program.caches, options)
    _refuse_shared(program)
    for i in program.instructions:
        if i.op == "linear" and options.activations is not None:
            i.attributes["act_group"] = _act_group(program, i) if options.activations == "int8" else 0
    return program


def _refuse_choices(options: OnnxOptions) -> None:
    if options.kv not in (None, "f32"):
        raise GristmillError(f"kv is {options.kv!r}, expected 'f32'")
    if options.activations not in (None, *ACTIVATIONS):
        raise GristmillError(f"activations are {options.activations!r}, expected one of {ACTIVATIONS}")
    if options.plain and options.activations == "f16":
        raise GristmillError("activations f16 are for ONNX Runtime's operators; leave out --plain (plain)")


def caches(given: list[CacheSpec], options: OnnxOptions) -> list[CacheSpec]:
    """With the types that the graphs have: f32, int8 where plain graphs round as the artifact does, and f16
    of f16 activations."""
    rounded = {t for c in given for t in (c.k_dtype, c.v_dtype)} - set(FLOAT_CACHES)
    kept = set(PLAIN_CACHES) if options.plain and options.kv is None else set()
    if rounded - kept and options.kv is None:
        plain = "" if rounded - set(PLAIN_CACHES) else " or with --plain, which has int8"
        raise GristmillError(
            f"the artifact's KV cache is {' and '.join(sorted(rounded - kept))} with a scale per position, "
            "which ONNX Runtime's attention lacks; export with --kv f32 (kv='f32'), which rounds "
            f"nothing{plain}"
        )
    floats = "f16" if options.activations == "f16" else "f32"
    types = {t: t if t in kept else floats for t in CACHE_TYPES}
    return [replace(c, k_dtype=types[c.k_dtype], v_dtype=types[c.v_dtype]) for c in given]


def _act_group(program: Program, i: Instruction) -> int:
    """Integers are multiplied by int8; ONNX Runtime's groups are those of the weights."""
    assert i.weight is not None
    integer = all(s.format.startswith("int") for s in program.weights[i.weight])
    return i.attribute("act_group") or (32 if integer else 0)


def _refuse_shared(program: Program) -> None:
    used = [i.attribute("cache") for i in program.instructions if i.op == "attention"]
    if len(set(used)) != len(used):
        raise GristmillError("layers of this model share a KV cache, which the export to ONNX lacks")


def write_graphs(
    folder: Path, program: Program, stored: Stored, options: OnnxOptions, progress: Progress | None = None
) -> None:
    """Both graphs and their weights. The program's caches are of the types that the flavour has."""
    kind = _flavour(options)
    weights = WeightFile(folder / DATA)
    try:
        for name, all_rows in ((ROWS, True), (MODEL, False)):
            graph = Graph(weights, kind.opset)
            lowering = kind(program, stored, graph, program.limits.max_len, all_rows)
            lowering.run(partial(progress, "weights") if progress and all_rows else None)
            model = graph.model(program.name, gristmill.__version__)
            onnx.save_model(model, folder / name)
    finally:
        weights.close()
    for name in (ROWS, MODEL):
        onnx.checker.check_model(str(folder / name))


def _flavour(options: OnnxOptions) -> type[Lowering]:
    if options.plain:
        return Lowering
    return HalfLowering if options.activations == "f16" else RuntimeLowering


def _write_rest(folder: Path, opened: Artifact, program: Program, options: OnnxOptions) -> None:
    config = opened.json(MODEL_CONFIG) if MODEL_CONFIG in opened.files else {}
    if config:
        write_json(folder / "config.json", config)
    generation = opened.json(GENERATION_CONFIG) if GENERATION_CONFIG in opened.files else {}
    found = genai_config(program, config, generation, _input_names(folder / MODEL), shares=not options.plain)
    if found is not None:
        write_json(folder / GENAI, found)
    if TOKENIZER in opened.files:
        own = opened.json(TOKENIZER_CONFIG) if TOKENIZER_CONFIG in opened.files else {}
        write_json(folder / TOKENIZER_CONFIG, tokenizer_config(own))
    settings = {
        "plain": options.plain, "shared_buffer": not options.plain, "max_len": program.limits.max_len,
        "activations": options.activations,
    }  # fmt: skip
    write_session_files(folder, opened, program, "onnx", settings)


def _input_names(path: Path) -> list[str]:
    return [i.name for i in onnx.load(str(path), load_external_data=False).graph.input]
