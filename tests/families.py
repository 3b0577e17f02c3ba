"""Tiny random models of the families that compile, saved as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 320
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# What differs from BASE. The mistral and gemma2 windows are shorter than the texts of the tests.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24},
    "phi3": {"pad_token_id": 0},
    "gemma2": {"head_dim": 32, "sliding_window": 7},
    "gpt2": {"n_positions": 256, "n_embd": 96, "n_layer": 2, "n_head": 6},
    "gpt_neox": {"num_key_value_heads": 6},
}
# Settings as published models have them.
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)], "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "longrope": (
        "phi3",
        {"pad_token_id": 0, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "head-dim": ("llama", {"head_dim": 40}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
}


def save_tiny(directory: Path, family: str, **changes: Any) -> Any:
    """Write a random float32 model of ``family`` to ``directory``; returns it in eager mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1} if family == "gpt2" else BASE
    config = AutoConfig.for_model(family, **base | FAMILIES[family] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        wide = parameter.dim() > 1
        parameter.data.normal_(0, 0.08) if wide else parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return model


def save_tokenizer(directory: Path, vocabulary: int = 300) -> None:
    """A byte-level tokenizer with fewer entries than the models have logits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", *alphabet]
    names += [f"<extra_{i}>" for i in range(vocabulary - len(names))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
