"""A torch module as a source of a compile: its own parameters in memory, its own code traced."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import nn

from ...passes import canonicalize, capture_attention, lift_positions
from ...passes.graph import EXAMPLE_ROWS, Traced
from ...passes.rule import Report
from ...runtime.artifact import TOKENIZER
from ...runtime.errors import GristmillError
from ...runtime.tokenizer import Tokenizer
from .. import interpret
from ..exports import Export
from ..load import Source, changed_options
from ..options import CompileOptions
from ..tokenizer_files import COPIED, tokenizer_files
from .export_module import export, first_names, lift, tracing_copy
from .forward import Call, call_of
from .memory import MemoryCheckpoint
from .row_check import check_rows

MOST_POSITIONS = 1 << 20  # of a module that nothing bounds
# Of the largest logit, between the graph and the module run eagerly, by the module's type
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 2e-2}


@dataclass
class ModuleConfig:
    """What the compiler asks of a config."""

    model_type: str
    max_position_embeddings: int


@dataclass
class ModuleSource(Source):
    """A module, or what a file was converted to. traced: its graph with positions as an input.

    files: the tokenizer's, empty: none. eager: the module and how it is called, to hold the graph to.
    """

    traced: Traced | None = None
    files: Mapping[str, bytes] | None = None
    eager: tuple[Any, Call] | None = None

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of every parameter, by name."""
        return self.checkpoint.hashes()

    @property
    def vocabulary(self) -> int:
        assert self.traced is not None
        return self.traced.vocabulary

    def refuse(self, options: CompileOptions) -> None:
        """Raises GristmillError for adapters, whose names are a checkpoint's, and for options that need a
        tokenizer, where there is none."""
        if options.lora:
            raise GristmillError(
                f"{self.name}: lora is for Hugging Face directories and GGUF files; merge the adapter "
                "into the module (PEFT's merge_and_unload) before it is compiled"
            )
        if self.files:
            return
        asked = "the gate" if options.gate else None
        if options.method != "rtn" or options.bits is not None or options.size is not None:
            asked = "calibration"
        if asked:
            raise GristmillError(
                f"{self.name}: {asked} reads text, which needs a tokenizer; pass tokenizer=, a directory, a "
                "tokenizer.json or a tokenizer" + (", or gate=False" if asked == "the gate" else "")
            )

    def tokenizer(self) -> dict[str, bytes]:
        return dict(self.files or {})

    def stored_config(self) -> dict[str, Any] | None:
        return None

    def command(self, options: CompileOptions) -> str:
        """The Python call: no command line has the module."""
        words = [self.name, repr("OUT"), *(f"{name}={value!r}" for name, value in changed_options(options))]
        return f"gristmill.compile({', '.join(words)})"

    def trace(self, max_len: int, export: Export | None = None) -> Traced:
        """The graph with its attention as ops, rows independent. Once: passes rewrite it."""
        traced, self.traced = self.traced, None
        assert traced is not None, "a module's graph is made once"
        report = Report()
        capture_attention.run(traced, report, max_len)
        if report.misses:
            where, reason = report.misses[0]
            raise GristmillError(
                f"{self.name}: the attention at {where} cannot be compiled: {reason}; call "
                "gristmill.attention, or scaled_dot_product_attention with is_causal=True"
            )
        canonicalize.run(traced, Report())
        check_rows(traced, self.name, traced.vocabulary)
        return traced

    def check(self, traced: Traced) -> None:
        """Raises GristmillError where the rewritten graph does not compute what the module does."""
        assert self.eager is not None
        module, call = self.eager
        rows = min(EXAMPLE_ROWS, traced.max_position or EXAMPLE_ROWS)
        tokens = torch.randint(0, 64, (1, rows), generator=torch.Generator().manual_seed(1))
        tokens %= traced.vocabulary
        expected, kind = run_eager(module, call, tokens)
        positions = torch.arange(rows)
        inputs = {
            "tokens": tokens,
            "positions": positions[None],
            "slots": torch.zeros_like(tokens),
            "rows": positions,
        }
        found = interpret.run(traced, inputs)
        largest = float(expected.abs().max())
        difference = float((found - expected).abs().max()) / max(largest, 1e-30)
        if not difference <= TOLERANCE.get(kind, 0.1):
            raise GristmillError(
                f"{self.name}: the traced graph differs from the module run eagerly by {difference:.1e} of "
                "the largest logit; does its forward keep state, or branch on values?"
            )


def run_eager(module: Any, call: Call, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """Logits [1, T, V] in float32 on the CPU, and the type of the module's parameters; its mode is kept."""
    first = next((p for p in module.parameters()), torch.zeros(()))
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            positions = torch.arange(tokens.shape[1])[None].to(first.device)
            logits = call.run(module, tokens.to(first.device), positions)
    finally:
        for part, training in modes.items():
            part.training = training
    return logits.float().cpu(), first.dtype


def module_source(module: Any, example: Any = None, tokenizer: Any = None) -> ModuleSource:
    """Trace a module. See gristmill.compile for what the arguments are. Raises GristmillError."""
    module = getattr(module, "_orig_mod", module)  # what torch.compile wrapped
    if isinstance(module, torch.jit.ScriptModule):
        from .torchscript import script_source

        return script_source(module, type(module).__name__, example, tokenizer)
    return graph_source(module, call_of(module, example), type(module).__name__, tokenizer, eager=module)


def graph_source(module: nn.Module, call: Call, name: str, tokenizer: Any, eager: Any) -> ModuleSource:
    """Trace ``module``; eager: what its graph is held to. Raises GristmillError where it does not fit."""
    checkpoint = checkpoint_of(module, name)
    copied = tracing_copy(module, name)
    traced = lift(export(copied, call, name), copied, checkpoint, ModuleConfig(name, MOST_POSITIONS))
    _refuse_ends(name, traced)
    canonicalize.run(traced, Report())
    lift_positions.run(traced, Report())
    config = ModuleConfig(name, traced.max_position or MOST_POSITIONS)
    traced.config = config
    files = files_of(tokenizer)
    if files and (size := Tokenizer.of_files(files).size) > traced.vocabulary:
        raise GristmillError(
            f"{name}: the tokenizer has {size} ids, the logits are {traced.vocabulary} wide; give the "
            "tokenizer of this model"
        )
    held: Any = checkpoint  # a Checkpoint in all but where it reads from
    return ModuleSource(
        name, Path(), config, held, traced=traced, files=files, eager=(eager, call)
    )  # fmt: skip


def checkpoint_of(module: nn.Module, name: str) -> MemoryCheckpoint:
    """The module's parameters, a tied one by its first name."""
    first = set(first_names(module).values())
    parameters = {n: p for n, p in module.named_parameters() if n in first}
    for key, parameter in parameters.items():
        if parameter.is_meta:
            raise GristmillError(
                f"{name}: parameter {key!r} is on the meta device and has no values; load weights"
            )
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise GristmillError(f"{name}: parameter {key!r} has values that are not finite")
    return MemoryCheckpoint(parameters)


def _refuse_ends(name: str, traced: Traced) -> None:
    logits = traced.logits.meta["val"]
    if not lift_positions.is_rows(logits.shape[1], traced):
        raise GristmillError(
            f"{name}: forward returns logits [1, {logits.shape[1]}, {logits.shape[2]}] for [1, T] tokens; "
            "expected a row for each token (not the last one alone)"
        )


def files_of(tokenizer: Any) -> dict[str, bytes]:
    """The files of a tokenizer for the artifact: of a directory, a tokenizer.json, or a tokenizer object."""
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return {TOKENIZER: tokenizer.to_str().encode()}
    if hasattr(tokenizer, "save_pretrained"):
        with tempfile.TemporaryDirectory(prefix="gristmill-tokenizer-") as folder:
            tokenizer.save_pretrained(folder)
            return _files_in(Path(folder))
    if not isinstance(tokenizer, (str, PathLike)):
        raise GristmillError(
            f"tokenizer is {type(tokenizer).__name__}, expected a directory, a tokenizer.json, or a "
            "tokenizer of tokenizers or transformers"
        )
    path = Path(tokenizer)
    if path.is_dir():
        return _files_in(path)
    if not path.is_file():
        raise GristmillError(f"tokenizer {path}: no such file or directory")
    beside = {name: path.with_name(name) for name in COPIED if path.name == TOKENIZER}
    return {name: file.read_bytes() for name, file in beside.items() if file.is_file()} | {
        TOKENIZER: path.read_bytes()
    }


def _files_in(directory: Path) -> dict[str, bytes]:
    from ..gate import default_text

    return tokenizer_files(directory, [default_text("prose"), default_text("code")])
