"""Make Hugging Face directories with random weights in the shape of published models.

Speed depends on a model's shape and not on what it learned, so a benchmark needs no download: config.json has
the published settings, weights are normal with a deviation of 0.02 (norm weights 1), the tokenizer is
byte-level with placeholder words up to the published vocabulary size. The same name gives the same bytes, and
a few megabytes at a time are in memory.

    python benchmarks/make_model.py tinyllama-1.1b OUT
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

SHARD_BYTES = 2_000_000_000
DEVIATION = 0.02

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {
    **LLAMA,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
ROPE3 = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        **LLAMA,
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama-3.2-1b": {
        **LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "rope_scaling": {**ROPE3, "factor": 32.0},
    },
    "llama-3.1-8b": {
        **LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "rope_scaling": {**ROPE3, "factor": 8.0},
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "sliding_window": None,
        "use_sliding_window": False,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
}
# for contexts longer than the published model's
SHAPES["tinyllama-1.1b-8k"] = {**SHAPES["tinyllama-1.1b"], "max_position_embeddings": 8192}


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every weight, in the order in which they are written."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, shape in {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}.items():
            yield f"{layer}self_attn.{name}_proj.weight", shape
        if config["model_type"] == "qwen3":
            yield layer + "self_attn.q_norm.weight", (head,)
            yield layer + "self_attn.k_norm.weight", (head,)
        for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            yield f"{layer}mlp.{name}_proj.weight", shape
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float's bits, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def random_weight(shape: tuple[int, ...], seed: int) -> Iterator[bytes]:
    """bfloat16 bytes of one tensor, a few megabytes at a time."""
    if len(shape) == 1:
        yield bfloat16(np.ones(shape, np.float32)).tobytes()
        return
    generator, left = np.random.Generator(np.random.SFC64(seed)), shape[0] * shape[1]
    while left:
        count = min(left, 1 << 21)
        yield bfloat16(generator.standard_normal(count, np.float32) * np.float32(DEVIATION)).tobytes()
        left -= count


def shards(config: dict[str, Any]) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Tensors in files of at most SHARD_BYTES, where no tensor alone is larger."""
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensor_shapes(config):
        bytes_here = 2 * int(np.prod(shape))
        if files[-1] and size + bytes_here > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append((name, shape))
        size += bytes_here
    return files


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], first_seed: int) -> int:
    """One safetensors file, streamed; the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for seed, (_, shape) in enumerate(tensors, first_seed):
            for piece in random_weight(shape, seed):
                file.write(piece)
    return end


def write_weights(config: dict[str, Any], out: Path) -> None:
    files = shards(config)
    where: dict[str, str] = {}
    seed = total = 0
    for i, tensors in enumerate(files, 1):
        name = f"model-{i:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        total += write_shard(out / name, tensors, seed)
        seed += len(tensors)
        where.update((tensor, name) for tensor, _ in tensors)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_tokenizer(config: dict[str, Any], out: Path) -> None:
    """Byte-level BPE without merges: 256 bytes, the ends of text, and words that no text reaches."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ends = {config["bos_token_id"]: "<|begin_of_text|>", config["eos_token_id"]: "<|end_of_text|>"}
    alphabet = iter(sorted(pre_tokenizers.ByteLevel.alphabet()))
    pieces = (ends.get(i) or next(alphabet, f"<placeholder {i}>") for i in range(config["vocab_size"]))
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in ends.values()])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": ends[config["bos_token_id"]],
        "eos_token": ends[config["eos_token_id"]],
        "model_max_length": config["max_position_embeddings"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def make_model(shape: str, out: Path) -> Path:
    """Write the model of that name; what is there already is kept."""
    config = SHAPES[shape]
    if not (out / "config.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(config, out)
        ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        (out / "generation_config.json").write_text(json.dumps(ends, indent=1))
        write_weights(config, out)
        (out / "config.json").write_text(json.dumps(config, indent=1))
    return out


@click.command(help=__doc__)
@click.argument("shape", type=click.Choice(sorted(SHAPES)))
@click.argument("out", type=click.Path(path_type=Path))
def main(shape: str, out: Path) -> None:
    print(make_model(shape, out))


if __name__ == "__main__":
    main()
