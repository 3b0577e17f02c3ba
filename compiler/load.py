"""A Hugging Face directory (or hub name) → its config, its weights and the files that travel along."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..passes.graph import Traced
from ..quant.formats import Reader, reader
from ..runtime.adapters.peft import PeftAdapter
from ..runtime.errors import GristmillError
from . import gate
from .checkpoint import Checkpoint, file_hash
from .exports import Export
from .options import CompileOptions
from .quantized import QuantizedCheckpoint
from .tokenizer_files import tokenizer_files
from .trace import trace

QUANTIZATION = "quantization_config"
GGUF = ".gguf"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "pytorch_model*.bin"]


@dataclass
class Source:
    """What the compiler starts from. ``config`` is a transformers PretrainedConfig of the float model.

    ``folder``: what keeps a temporary directory alive. ``adapters``: what is merged into the weights.
    """

    name: str
    directory: Path
    config: Any
    checkpoint: Checkpoint | QuantizedCheckpoint
    folder: Any = None
    adapters: Sequence[PeftAdapter] = ()

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of the config and of every weight file, by name."""
        return {
            "config.json": file_hash(self.directory / "config.json"), **self.checkpoint.hashes(),
            **self.adapter_hashes(),
        }  # fmt: skip

    def adapter_hashes(self) -> dict[str, str]:
        """sha256 of the files of what is merged, by name."""
        every = [(number, adapter) for number, adapter in enumerate(self.adapters)]
        return {f"lora.{n}/{name}": found for n, a in every for name, found in a.hashes().items()}

    def refuse(self, options: CompileOptions) -> None:
        """Raises GristmillError for options that this source cannot do."""

    def tokenizer(self) -> dict[str, bytes]:
        """The tokenizer's files for the artifact, by name. Raises GristmillError where there is none."""
        return tokenizer_files(self.directory, [gate.default_text("prose"), gate.default_text("code")])

    def stored_config(self) -> dict[str, Any] | None:
        """config.json of the float model, which exports to Hugging Face formats need."""
        return {k: v for k, v in read_config(self.directory).items() if k != QUANTIZATION}

    def trace(self, max_len: int, export: Export | None = None) -> Traced:
        """The model's graph over rows; export: see exports.py."""
        return trace(self.config, self.checkpoint, max_len, export)

    def check(self, traced: Traced) -> None:
        """Raises GristmillError where the graph after all passes is known to differ from the model."""

    def command(self, options: CompileOptions) -> str:
        """The command line that makes the artifact again."""
        words = ["gristmill", "compile", self.name, "-o", "OUT"]
        for option, value in changed_options(options):
            flag = option.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, tuple):
                words += [word for item in value for word in (f"--{flag}", item)]
            else:
                words += [f"--{flag}", str(value)]
        return shlex.join(words)


def changed_options(options: CompileOptions) -> Iterator[tuple[str, Any]]:
    """Options that are not the default and make a difference to the artifact; files by name alone."""
    for option in fields(options):
        value = getattr(options, option.name)
        if value != option.default and option.name not in ("force", "resume", "explain", "check_passes"):
            if option.name in ("text", "calibration"):
                value = Path(value).name
            yield option.name, tuple(Path(v).name for v in value) if option.name == "lora" else value


def load_source(model: str) -> Source:
    """Open ``model``: a directory, a GGUF file, or a name on the Hugging Face hub.

    Raises GristmillError for anything unusable.
    """
    if model.lower().endswith(GGUF):
        return _gguf(model)
    directory = resolve(model)
    quantized = quantization_reader(directory)
    config = load_config(directory)
    checkpoint = Checkpoint(directory)
    return Source(
        directory.name if os.path.isdir(model) else model,
        directory,
        config,
        QuantizedCheckpoint(checkpoint, quantized) if quantized else checkpoint,
    )


def _gguf(model: str) -> Source:
    if not os.path.isfile(model):
        raise GristmillError(f"{model}: {'not a file' if os.path.exists(model) else 'no such file'}; "
                             "expected a GGUF file")  # fmt: skip
    try:
        from .gguf_source import gguf_source
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise GristmillError(
            "reading GGUF needs gguf; install it with `pip install 'gristmill[gguf]'`"
        ) from error
    return gguf_source(Path(model).resolve())


def load_config(directory: Path) -> Any:
    """The transformers config of a directory's float model; custom code is refused."""
    config = _transformers_config(directory, read_config(directory)["model_type"])
    if hasattr(config, QUANTIZATION):
        delattr(config, QUANTIZATION)  # else transformers builds the quantized model
    return config


def quantization_reader(directory: Path) -> Reader | None:
    """How the checkpoint of a directory is quantized, None for a float one.

    Raises GristmillError where that is not supported.
    """
    settings = read_config(directory).get(QUANTIZATION)
    if not settings:
        return None
    try:
        return reader(settings)
    except GristmillError as error:
        raise GristmillError(f"{directory / 'config.json'}: {error}") from None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory as it stands, checked to be one that we may use."""
    path = directory / "config.json"
    if not path.is_file():
        raise GristmillError(f"{directory}: no config.json; expected a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise GristmillError(f"{path}: not valid JSON ({error}); download the model again") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise GristmillError(f"{path}: no model_type; expected a Hugging Face model configuration")
    if raw.get("auto_map"):
        raise GristmillError(
            f"{path}: the model brings its own code (trust_remote_code), which is never run; "
            "use a built-in one"
        )
    return raw


def _transformers_config(directory: Path, model_type: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise GristmillError(
            f"{directory}: model_type {model_type!r} is not a decoder that transformers knows; "
            "see the README's list"
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # validation errors of transformers are of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise GristmillError(f"{directory}/config.json: transformers refuses it ({reason})") from None


def resolve(model: str, patterns: Sequence[str] = HUB_PATTERNS) -> Path:
    """The directory of a model, a name on the hub after its files that fit ``patterns`` were fetched."""
    if os.path.isdir(model):
        return Path(model).resolve()
    if os.path.exists(model):
        raise GristmillError(
            f"{model}: is a file; expected a Hugging Face model directory, a .gguf file or a hub name"
        )
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise GristmillError(
            f"{model}: no such directory; expected a Hugging Face model directory "
            "or a hub name like owner/model"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except Exception as error:  # network and hub errors are of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise GristmillError(f"{model}: no such directory, and the hub download failed ({reason})") from None
