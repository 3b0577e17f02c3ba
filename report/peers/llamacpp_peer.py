"""llama.cpp by its Python package, in a Python of its own.

    python -m venv peer && peer/bin/pip install llama-cpp-python gguf numpy
    peer/bin/python report/peers convert HF_DIR OUT_DIR q4_0 q8_0     Llama-shaped models only
    peer/bin/python report/peers time llama.cpp OUT_DIR/q4_0.gguf

Token ids go in directly, so that a GGUF made here carries a placeholder vocabulary. Without the package gguf
everything works but the conversion, and bytes and bits of the weights are not known.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .peer_process import Engine, prompt_ids, speeds

FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q3_k_m": 12, "q4_k_m": 15, "q6_k": 18}
CACHE_TYPES = {"f16": 1, "q8_0": 8}
DTYPES = {"F16": np.float16, "F32": np.float32, "BF16": np.uint16}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
CONTROL, BYTE, NORMAL = 3, 6, 1  # kinds of token in a GGUF


def tensors(directory: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(name, values) of every safetensors file in the directory."""
    for path in sorted(directory.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + size].tobytes())
        for name, info in header.items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in info["data_offsets"])
                yield name, widened(data[begin:end].view(DTYPES[info["dtype"]])).reshape(info["shape"])


def widened(values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTSIDE:
        return OUTSIDE[stem] + ".weight"
    _, _, layer, inside = stem.split(".", 3)
    return f"blk.{layer}.{INSIDE[inside]}.weight"


def interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """GGUF rotates neighbouring rows of a head, HF its two halves: [H, 2, d/2, in] -> [H, d/2, 2, in]."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def add_settings(writer: Any, config: dict[str, Any]) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(1)


def add_vocabulary(writer: Any, size: int) -> None:
    pieces = [(b"<unk>", 2), (b"<s>", CONTROL), (b"</s>", CONTROL)]
    pieces += [(f"<0x{i:02X}>".encode(), BYTE) for i in range(256)]
    pieces += [(f"t{i}".encode(), NORMAL) for i in range(len(pieces), size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _ in pieces[:size]])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([kind for _, kind in pieces[:size]])


def convert(directory: Path, out: Path, kinds: list[str]) -> None:
    """Write OUT/f16.gguf, and from it one file per kind."""
    import gguf
    import llama_cpp

    config = json.loads((directory / "config.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    source = out / "f16.gguf"
    writer = gguf.GGUFWriter(str(source), "llama")
    add_settings(writer, config)
    add_vocabulary(writer, config["vocab_size"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, values in tensors(directory):
        target = gguf_name(name)
        kind = target.split(".")[-2]
        ordered = interleaved(values, heads[kind]) if kind in heads else values
        writer.add_tensor(target, ordered if ordered.ndim == 1 else ordered.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for kind in kinds:
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = FILE_TYPES[kind], 2
        paths = (str(path).encode() for path in (source, out / f"{kind}.gguf"))
        if llama_cpp.llama_model_quantize(*paths, ctypes.byref(parameters)):
            raise SystemExit(f"llama.cpp could not quantize {source} to {kind}")


def facts(path: Path) -> dict[str, Any]:
    """read_bytes_per_token: bytes of weights that one decoded token reads, all but an embedding that is not
    the head; bits_per_weight: of all matrices. None without the package gguf."""
    try:
        import gguf
    except ImportError:
        return {"read_bytes_per_token": None, "bits_per_weight": None}
    tensors = list(gguf.GGUFReader(str(path)).tensors)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    matrices = [t for t in tensors if len(t.shape) > 1]
    bits = 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)
    return {"read_bytes_per_token": sum(sizes.values()), "bits_per_weight": bits}


def measure(model: Any, prompt: int, context: int, tokens: int) -> dict[str, Any]:
    """A prefill of `prompt`, and `tokens` decoded after `context` others; see peer_process."""
    ids = prompt_ids(max(prompt, context, 1))
    model.reset()
    begin = time.perf_counter()
    model.eval(ids[:prompt])
    first_s = time.perf_counter() - begin
    model.reset()
    model.eval(ids[: max(context, 1)])
    token_s = []
    for i in range(tokens):
        begin = time.perf_counter()
        model.eval([ids[i % len(ids)]])
        token_s.append(time.perf_counter() - begin)
    return speeds(prompt, first_s, token_s)


def logits(path: Path, ids: Path, out: Path) -> float:
    """Write the logits [N, S, V] f32 of token ids [N, S]; the bits per weight of all matrices."""
    windows = np.load(ids)
    model = open_model(path, 2, windows.shape[1] + 8, logits=True)
    found = np.lib.format.open_memmap(out, "w+", np.float32, (*windows.shape, model.n_vocab()))
    for i, window in enumerate(windows):
        found[i] = window_logits(model, window.tolist())
    return float(facts(path)["bits_per_weight"])


def window_logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    """[ids, vocabulary] of a model that was opened with logits."""
    model.reset()
    model.eval(ids)
    return np.asarray(model.scores[: len(ids)], np.float32)


def open_model(path: Path, threads: int, length: int, cache: str = "f16", logits: bool = False) -> Any:
    """A quantized cache needs flash attention, and gets it."""
    import llama_cpp

    return llama_cpp.Llama(
        str(path),
        n_ctx=length,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=512,
        type_k=CACHE_TYPES[cache],
        type_v=CACHE_TYPES[cache],
        flash_attn=cache != "f16",
        logits_all=logits,
        verbose=False,
    )


def load(path: Path, threads: int, length: int, cache: str = "f16", logits: bool = False) -> Engine:
    import llama_cpp

    begin = time.perf_counter()
    model = open_model(path, threads, length, cache, logits)
    about = {
        "load_s": time.perf_counter() - begin,
        "bytes": path.stat().st_size,
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        **facts(path),
    }

    def ask(prompt: int, context: int, tokens: int) -> dict[str, Any]:
        return measure(model, prompt, context, tokens)

    def write_logits(ids: list[int], out: str) -> None:
        np.save(out, window_logits(model, ids))

    return Engine(about, ask, write_logits if logits else None)
