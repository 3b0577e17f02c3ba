"""Small models with tokenizers that a GGUF can hold, and GGUF files changed on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from families import save_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import gristmill
import gristmill.compiler.pipeline

TEXT = "def f(x):\n    return x + 12  # yes, it's 3,456\n" * 20
SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
WIDE: dict[str, Any] = SMALL | {
    "hidden_size": 256,
    "intermediate_size": 320,
}  # integers meet int8 activations
OPTIONS: dict[str, Any] = {"max_slots": 2, "max_tokens": 64, "gate": False}


def byte_pairs(digits: bool = False) -> Tokenizer:
    """A tokenizer of byte pairs, with `<s>` before every text; digits: each by itself."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = [pre_tokenizers.Digits(individual_digits=True), level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if digits else level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def save_model(folder: Path, family: str = "llama", **changes: Any) -> Any:
    """A random model with byte pairs in `folder`; the transformers model."""
    model = save_tiny(folder, family, **changes)
    byte_pairs().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return model


def made(folder: Path, family: str = "llama", options: dict[str, Any] | None = None, **changes: Any) -> Path:
    """An artifact of such a model; `folder / "m"` has the model."""
    save_model(folder / "m", family, **changes)
    gristmill.compile(folder / "m", folder / "a", **OPTIONS | (options or {}))
    return folder / "a"


def changed(source: Path, target: Path, drop: tuple[str, ...] = (), **metadata: Any) -> Path:
    """A copy of a GGUF file without the keys and tensors in `drop`, with other metadata.

    Keys are written with "__" for "."; values are strings, integers or lists of either.
    """
    reader = gguf.GGUFReader(source)
    new = {key.replace("__", "."): value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(target, new.pop("general.architecture", "llama"))
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in (*drop, *new, "general.architecture"):
            continue
        kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), kind, inner)
    for key, value in new.items():
        add = {
            str: writer.add_string,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
