"""A GGUF file as a source: its metadata becomes a config.json and a tokenizer.json, its tensors a checkpoint.

transformers reads GGUF metadata too; it leaves out head sizes, scaled rotary frequencies, biases and
pre-tokenizers, so that config and tokenizer are built here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..quant.formats.gguf_names import (
    ARCHITECTURES,
    INTERLEAVED,
    ROPE_FACTORS,
    interleaved_rows,
    transformers_name,
)
from ..runtime.errors import GristmillError
from .gguf_checkpoint import Entry, GgufHeader, GgufTensors, gguf_reader, read_header
from .gguf_tokenizer import tokenizer_files
from .load import Source, load_config
from .quantized import QuantizedCheckpoint

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
OUTPUT = {"self_attn.o_proj"}
HEAD_NORMS = ("q_norm", "k_norm")
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
# What transformers calls a setting → llama.cpp's key after the architecture, the type it has
SETTINGS: dict[str, tuple[str, type]] = {
    "hidden_size": ("embedding_length", int),
    "intermediate_size": ("feed_forward_length", int),
    "num_hidden_layers": ("block_count", int),
    "num_attention_heads": ("attention.head_count", int),
    "max_position_embeddings": ("context_length", int),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", float),
}
DEFAULT_BASE = 10000.0


def gguf_source(path: Path) -> Source:
    """Open a GGUF file. Raises GristmillError for anything that is not a whole dense Llama or Qwen."""
    header = read_header(path)
    _refuse(header)
    config = model_config(header)
    entries, factors = _named(header, config)
    tensors = GgufTensors(path, entries)
    divided = None if factors is None else tensors.read_entry(ROPE_FACTORS, factors).tolist()
    config["rope_parameters"] = _rope(header, config, divided)
    folder = TemporaryDirectory(prefix="gristmill-gguf-")
    directory = Path(folder.name)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    for name, data in tokenizer_files(header).items():
        (directory / name).write_bytes(data)
    checkpoint: Any = tensors
    if any(not entry.is_float for entry in entries.values()):
        checkpoint = QuantizedCheckpoint(checkpoint, gguf_reader(tensors))
    return Source(path.name, directory, load_config(directory), checkpoint, folder)


def _refuse(header: GgufHeader) -> None:
    metadata = header.metadata
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise GristmillError(f"{header.path}: holds a {kind!r}, expected a model")
    parts = metadata.get("split.count", 1)
    if parts != 1:
        raise GristmillError(
            f"{header.path}: is one of {parts} parts of a model; join them with `llama-gguf-split --merge`"
        )
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise GristmillError(
            f"{header.path}: architecture {architecture!r} is not read from GGUF; expected one of "
            f"{', '.join(ARCHITECTURES)}, or give the model's Hugging Face directory"
        )
    if metadata.get(f"{architecture}.expert_count"):
        raise GristmillError(
            f"{header.path}: mixture-of-experts models are not supported; expected a dense "
            f"{', '.join(ARCHITECTURES)}"
        )


def model_config(header: GgufHeader) -> dict[str, Any]:
    """config.json but for the rotary frequencies. Raises GristmillError for what is missing or contrary."""
    architecture = header.metadata["general.architecture"]
    config: dict[str, Any] = {name: _setting(header, key, kind) for name, (key, kind) in SETTINGS.items()}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = _setting(header, "attention.head_count_kv", int, heads)
    head_dim = _setting(header, "attention.key_length", int, config["hidden_size"] // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if _setting(header, key, int, head_dim) != head_dim:
            raise GristmillError(
                f"{header.path}: {key} differs from the head size of {head_dim}, which is not supported"
            )
    config |= {"head_dim": head_dim, "hidden_act": "silu"}
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    embedding = header.tensors.get("token_embd.weight")
    config["vocab_size"] = embedding.shape[0] if embedding else 0
    for name, key in {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}.items():
        config[key] = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    family = _family(header, architecture, config)
    return {"model_type": family, "architectures": [CLASSES[family]], **config}


def _family(header: GgufHeader, architecture: str, config: dict[str, Any]) -> str:
    """transformers' model type: which linears have biases decides between llama and qwen2."""
    names = [transformers_name(name) or "" for name in header.tensors]
    biased = {".".join(n.split(".")[3:-1]) for n in names if n.endswith(".bias")}
    if architecture == "llama" and biased == ATTENTION:
        return "qwen2"
    if architecture == "qwen2" and biased == ATTENTION:
        return architecture
    config["attention_bias"] = biased >= ATTENTION | OUTPUT
    allowed: list[set[str]] = [set(), ATTENTION | OUTPUT]
    if architecture == "llama":
        config["mlp_bias"] = biased >= MLP
        allowed += [MLP, ATTENTION | OUTPUT | MLP]
    if architecture == "qwen2" or biased not in allowed:
        raise GristmillError(
            f"{header.path}: an {architecture} with biases at {', '.join(sorted(biased)) or 'no linear'} "
            "is not supported"
        )
    return architecture


def _setting(header: GgufHeader, key: str, kind: type, default: Any = None) -> Any:
    """A number of the metadata; one value for every layer may be given as a list of equal ones."""
    name = f"{header.metadata['general.architecture']}.{key}"
    value = header.metadata.get(name, default)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise GristmillError(f"{header.path}: {name} differs between layers, which is not supported")
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise GristmillError(
            f"{header.path}: {name} is {value!r}, expected a number above 0; download it again"
        )
    return kind(value)


def _named(header: GgufHeader, config: Mapping[str, Any]) -> tuple[dict[str, Entry], Entry | None]:
    """The tensors by transformers' names, rows of q and k to be put back; and the rotary factors."""
    architecture, entries = header.metadata["general.architecture"], {}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, entry in header.tensors.items():
        if name == ROPE_FACTORS:
            continue
        found = transformers_name(name)
        if found is None or (found.split(".")[-2] in HEAD_NORMS and architecture != "qwen3"):
            raise GristmillError(
                f"{header.path}: tensor {name!r} is not one of a plain {architecture}; a model of this kind "
                "is not supported"
            )
        turned = heads.get(found.split(".")[-2]) if architecture in INTERLEAVED else None
        if turned and entry.shape[0] == turned * config["head_dim"]:
            order = np.argsort(interleaved_rows(turned, config["head_dim"]))
            entry = replace(entry, order=order)
        entries[found] = entry
    return entries, header.tensors.get(ROPE_FACTORS)


def _rope(header: GgufHeader, config: Mapping[str, Any], factors: list[float] | None) -> dict[str, Any]:
    """rope_parameters; frequencies divided one by one are what transformers calls longrope."""
    base = _setting(header, "rope.freq_base", float, DEFAULT_BASE)
    architecture, metadata = header.metadata["general.architecture"], header.metadata
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    attention = _setting(header, "rope.scaling.attn_factor", float, 1.0)
    if factors is None and attention != 1:
        factors = [1.0] * (config["head_dim"] // 2)
    if factors is not None:
        if kind != "none" or len(factors) != config["head_dim"] // 2 or min(factors) <= 0:
            raise GristmillError(
                f"{header.path}: rotary factors together with scaling {kind!r} are not supported"
            )
        return {
            "rope_type": "longrope", "rope_theta": base, "short_factor": factors, "long_factor": factors,
            "attention_factor": attention,
            "original_max_position_embeddings": config["max_position_embeddings"],
        }  # fmt: skip
    if kind == "none":
        return {"rope_type": "default", "rope_theta": base}
    if kind not in ("linear", "yarn"):
        raise GristmillError(
            f"{header.path}: rope scaling {kind!r} is not supported; expected linear or yarn"
        )
    scaled = {"rope_type": kind, "rope_theta": base, "factor": _setting(header, "rope.scaling.factor", float)}
    if kind == "yarn":
        original = _setting(header, "rope.scaling.original_context_length", int)
        scaled["original_max_position_embeddings"] = original
    return scaled
