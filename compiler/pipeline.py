"""The whole compile, one line a stage: load, trace, passes, lower, emit, gate."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..passes import (
    canonicalize,
    fuse_epilogue,
    fuse_glu,
    fuse_norm,
    fuse_pointwise,
    fuse_rope,
    last_rows,
    merge_linears,
    rotate,
    static_kv,
)
from ..passes.graph import EXAMPLE_ROWS, Traced
from ..passes.manager import Entry, IllegalGraph, run_passes
from ..quant.methods import METHODS
from ..runtime import selftest
from ..runtime.artifact import MODEL_CONFIG
from ..runtime.artifact_writer import ArtifactWriter
from ..runtime.errors import GristmillError
from ..runtime.evaluation import read_text
from ..runtime.program import Limits
from ..runtime.session import Session
from ..runtime.session import load as load_session
from . import foreign, gate, interpret, lora
from .emit import write_weights
from .exports import Export
from .load import Source, load_source
from .lower import Lowered
from .memory import plan_arena
from .options import CompileOptions
from .quantize import Note, Quantized, quantize

PASSES = (
    canonicalize,
    fuse_norm,
    fuse_rope,
    fuse_glu,
    fuse_epilogue,  # after GLU, which wants the activation by itself
    static_kv,  # needs norms and ropes as ops
    merge_linears,  # needs q, k, v as columns of rows
    last_rows,
    fuse_pointwise,  # what nobody wanted
)
DEFAULT_MAX_LEN = 4096
Progress = Callable[[str, float], None]


@dataclass
class CompileResult:
    """Where the artifact is and what the summary prints."""

    path: Path
    summary: dict[str, Any] = field(default_factory=dict)


def compile_model(
    model: str | Source,
    out: str,
    options: CompileOptions,
    progress: Progress | None = None,
    note: Note | None = None,
    export: Export | None = None,
) -> CompileResult:
    """Compile ``model`` (directory, GGUF file, hub name, or a source) to the artifact directory ``out``.

    ``progress(stage, fraction)`` is called on the way, ``note(line)`` with what is worth telling at once;
    ``export``: of exports.py, where several compiles share one.
    Raises GristmillError, leaving nothing behind but a calibration that can be resumed.
    """
    report = progress or (lambda stage, fraction: None)
    tell = note or (lambda line: None)
    if options.device == "cuda":
        from gristmill.runtime.cuda import require_device

        require_device()  # before minutes of work, and not after
    start = time.perf_counter()
    with ArtifactWriter(out, options.force) as writer:
        report("load", 0.0)
        source = model if isinstance(model, Source) else load_source(model)
        source.refuse(options)
        source.adapters = lora.read_adapters(options.lora)
        limits = plan_limits(source.config, options)
        tokenizer = source.tokenizer()
        report("trace", 0.0)
        traced = source.trace(limits.max_len, export)
        lora.merge(traced, source.adapters)
        limits = narrow(limits, traced)
        report("passes", 0.0)
        taken = foreign.of(source, options)
        taken.before_passes(traced)
        ledger = rewrite(traced, options)
        source.check(traced)
        taken.after_passes(traced)
        made = quantize(traced, source, options, limits, tokenizer, writer.out, tool_versions(), report, tell)
        try:
            plan_arena(made.lowered.program)
            errors = _write(writer, made.lowered, tokenizer, source, report)
            manifest = _manifest(made, source, options, errors)
            manifest["quantization"] |= taken.record(made.lowered)
            accepted = accept(writer, manifest, traced, source, options, report)
            path = writer.commit(manifest)
            made.clear()
        except GristmillError:
            made.clear()
            raise
        size = writer.size_bytes
    summary = _summary(made, manifest, size, accepted, ledger, time.perf_counter() - start)
    summary |= taken.summary(made.lowered)
    return CompileResult(path, summary)


@dataclass(frozen=True)
class FloatModel:
    """A model as it is before any rounding: what `float_reference` runs. max_len: positions it is traced
    for; vocabulary: width of its logits."""

    traced: Traced
    tokenizer: dict[str, bytes]
    max_len: int
    vocabulary: int


def float_model(source: Source, export: Export | None = None) -> FloatModel:
    """Traces and rewrites a model as a compile with default options does; what its checkpoint holds quantized
    is what it stands for. Raises GristmillError as a compile does."""
    options = CompileOptions.of()
    limits = plan_limits(source.config, options)
    tokenizer = source.tokenizer()
    traced = source.trace(limits.max_len, export)
    rewrite(traced, options)
    max_len = min(limits.max_len, narrow(limits, traced).max_position)
    return FloatModel(traced, tokenizer, max_len, traced.vocabulary)


def plan_limits(config: Any, options: CompileOptions) -> Limits:
    """Shapes of the program: as asked for, else min(model's, 4096). Raises GristmillError beyond."""
    most = _first_of(config, "max_position_embeddings", "n_positions", "n_ctx") or DEFAULT_MAX_LEN
    max_len = options.max_len or min(most, DEFAULT_MAX_LEN)
    if max_len > most:
        raise GristmillError(
            f"max_len {max_len} is beyond the {most} positions of the model; give {most} or less"
        )
    return Limits(options.max_tokens, options.max_slots, max_len, most)


def narrow(limits: Limits, traced: Traced) -> Limits:
    """No more positions than frozen rotary frequencies hold for."""
    most = min(limits.max_position, traced.max_position or limits.max_position)
    return Limits(limits.max_tokens, limits.max_slots, limits.max_len, most)


def _first_of(config: Any, *names: str) -> int | None:
    return next((int(v) for n in names if isinstance(v := getattr(config, n, None), int)), None)


def rewrite(traced: Traced, options: CompileOptions) -> list[Entry]:
    """All passes over the graph, and what each did. Raises GristmillError for what cannot be lowered."""
    evaluate = partial(_example_logits, vocabulary=traced.vocabulary) if options.check_passes else None
    kind = getattr(traced.config, "model_type", "model")
    try:
        ledger = run_passes(traced, (*PASSES, rotate) if options.rotate else PASSES, evaluate)
        _refuse_unrotated(ledger, options, kind)
        return ledger
    except IllegalGraph as error:
        raise GristmillError(
            f"{kind}: cannot lower {error}; see the README for the families that compile"
        ) from None


def _refuse_unrotated(ledger: list[Entry], options: CompileOptions, kind: str) -> None:
    """Raises GristmillError where a rotation was asked for and the graph does not allow it exactly."""
    if options.rotate and not ledger[-1].hits:
        where, reason = ledger[-1].misses[0]
        raise GristmillError(
            f"{kind}: the residual stream cannot be rotated: {reason} ({where}); compile without rotate"
        )


def _example_logits(traced: Traced, vocabulary: int) -> torch.Tensor:
    rows = EXAMPLE_ROWS
    tokens = torch.randint(0, vocabulary, (1, rows), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(rows)[None]
    inputs = {
        "tokens": tokens,
        "positions": positions,
        "slots": torch.zeros_like(positions),
        "rows": torch.arange(rows),
    }
    return interpret.run(traced, inputs)


def _write(
    writer: ArtifactWriter, lowered: Lowered, tokenizer: dict[str, bytes], source: Source, report: Progress
) -> dict[str, float]:
    errors = write_weights(writer, lowered, {"model": source.name}, report)
    writer.write_bytes("program.json", lowered.program.to_bytes())
    config = source.stored_config()
    if config is not None:
        writer.write_json(MODEL_CONFIG, config)
    for name, data in tokenizer.items():
        writer.write_bytes(name, data)
    return errors


def _manifest(
    made: Quantized, source: Source, options: CompileOptions, errors: dict[str, float]
) -> dict[str, Any]:
    """Seconds stand apart from the quantization record, which is a part of the content id."""
    matrices = {n: {k: v for k, v in r.items() if k != "seconds"} for n, r in made.records.items()}
    quantization = {
        "method": made.method,
        "kv": str(options.cache_format),
        "rotated": options.rotate,
        "activations": options.activations,
        "schemes": {name: str(matrix.scheme) for name, matrix in made.lowered.matrices.items()},
        "relative_error": errors,
    }
    if made.calibration is not None:
        quantization |= {"calibration": made.calibration, "matrices": matrices}
    if made.tuning is not None:
        quantization["tuning"] = made.tuning
    if METHODS[options.method].awq:
        quantization["channel_scales"] = True  # those that are not 1 stand beside the weights
    manifest = {
        "source": {"name": source.name, "model_type": source.config.model_type, "sha256": source.hashes},
        "tools": tool_versions(),
        "quantization": quantization,
        "bits_per_weight": bits_per_weight(made.lowered),
        "origins": made.lowered.origins,
    }
    if source.adapters:
        manifest["adapters"] = lora.record(source.adapters)
    if made.records:
        manifest["calibration_seconds"] = {name: record["seconds"] for name, record in made.records.items()}
    return manifest


def tool_versions() -> dict[str, str]:
    """Versions of what made the artifact."""
    import transformers

    from gristmill import __version__

    return {
        "gristmill": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "numpy": np.__version__,
    }  # fmt: skip


def bits_per_weight(lowered: Lowered) -> float:
    """Stored bits of all matrices, scales and zeros included, per weight."""
    weights = [m.lazy.shape[0] * m.lazy.shape[1] for m in lowered.matrices.values()]
    bits = [
        w * m.scheme.bits_per_weight(m.lazy.shape[1])
        for w, m in zip(weights, lowered.matrices.values(), strict=True)
    ]
    return round(sum(bits) / sum(weights), 4)


def accept(
    writer: ArtifactWriter,
    manifest: dict[str, Any],
    traced: Traced | None,
    source: Source,
    options: CompileOptions,
    report: Progress,
) -> tuple[gate.Evaluation, list[str]] | None:
    """Open the artifact itself: record its self-test and, unless told not to, hold it to the float model,
    which is ``traced``.

    Returns what was measured and the lines that say which limits it keeps. Raises GristmillError where it
    breaks one.
    """
    sealed = writer.seal(manifest)
    session = load_session(sealed)
    writer.write_json("selftest.json", selftest.record(session))
    if not options.gate:
        return None
    assert traced is not None, "the gate compares with the float model"
    report("gate", 0.0)
    if options.device != "cpu":
        session = load_session(sealed, options.device)
    tokens = options.gate_tokens or gate.DEFAULT_TOKENS
    text = gate.HeldText.of(*_held_text(session, options), session.tokenizer, tokens)
    reference = partial(float_reference, traced)
    command = source.command(options)
    evaluation = gate.run_gate(session, reference, text, command=command, versions=tool_versions())
    kept = gate.enforce(evaluation, gate.Limits(options.max_ppl_increase, options.max_kl))
    writer.write_json("evaluation.json", evaluation.to_json())
    return evaluation, kept


def _held_text(session: Session, options: CompileOptions) -> tuple[str, str]:
    if options.text is None:
        return gate.suiting_text(session.tokenizer)
    return Path(options.text).name, read_text(options.text)


def float_reference(traced: Traced, windows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """The float32 logits [len, V] of each window; all windows pass the layers together, weight by weight."""
    lengths = [len(w) for w in windows]
    slots = np.repeat(np.arange(len(windows)), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    rows = torch.split(torch.arange(len(slots)), lengths)
    tokens = np.concatenate([np.asarray(w) for w in windows])
    named = {"tokens": tokens, "positions": positions, "slots": slots}
    inputs = {name: torch.from_numpy(array.astype(np.int64))[None] for name, array in named.items()}
    for logits in interpret.logits_by_group(traced, inputs, rows):
        yield logits.numpy()


def _summary(
    made: Quantized, manifest: dict[str, Any], size: int, accepted: tuple[gate.Evaluation, list[str]] | None,
    ledger: list[Entry], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    return {
        "bits_per_weight": manifest["bits_per_weight"],
        "size_bytes": size,
        "compile_s": round(seconds, 2),
        "peak_memory_bytes": peak_memory_bytes(),
        "instructions": len(made.lowered.program.instructions),
        "estimate": asdict(made.estimate) if made.estimate else None,
        "budget": made.budget,
        "evaluation": accepted[0].to_json() if accepted else None,
        "gate": accepted[0].lines() + accepted[1] if accepted else [],
        "ledger": "\n".join(map(str, ledger)),
    }


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
