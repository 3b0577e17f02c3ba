"""An artifact → a GGUF file that llama.cpp runs.

Matrices go over level by level where a GGUF type holds them, and what was rounded anew is measured and told.
Tensors are converted a chunk of rows at a time and written one after the other, so that memory holds one
matrix. The file is written beside its place and renamed when complete.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from gristmill.export import gguf_tensors
from gristmill.export.gguf_tensors import TYPES, Tensor
from gristmill.export.gguf_tokenizer import Vocabulary, vocabulary
from gristmill.export.llama_shape import Layer, LlamaShape, Rows, llama_shape
from gristmill.export.stored import StoredWeights
from gristmill.quant.formats.gguf_names import INTERLEAVED, ROPE_FACTORS, interleaved_rows
from gristmill.runtime.artifact import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    MODEL_CONFIG,
    SPECIAL_TOKENS_MAP,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Artifact,
    open_artifact,
)
from gristmill.runtime.errors import GristmillError

Array = NDArray[Any]
MAGIC = b"GGUF"
ROPE_TOLERANCE = 1e-5  # of a frequency: f32 powers in another order
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "bf16": 32}
Progress = Callable[[str, float], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class _Plan:
    """What is written. kinds: type by tensor's name; vectors: norms and biases, f32."""

    architecture: str
    shape: LlamaShape
    tensors: tuple[Tensor, ...]
    kinds: dict[str, str]
    vectors: dict[str, Array]
    context: int


def export_gguf(
    artifact: str | Path,
    out: str | Path,
    type: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Path:
    """Write the artifact's model to the file `out`.

    type: of the linears, one of `TYPES`; None: the smallest that holds each matrix exactly. force: replace a
    GGUF file that is there. note: told what types were written, and what was rounded anew at what loss.
    Raises GristmillError for what GGUF or llama.cpp cannot express, leaving nothing.
    """
    if type is not None and type not in TYPES:
        raise GristmillError(f"GGUF type {type!r} is not written; expected one of {', '.join(TYPES)}")
    opened = open_artifact(artifact)
    target = Path(out).absolute()
    _check_target(target, force)
    weights = StoredWeights(opened)
    tell = note or (lambda line: None)
    plan = _plan(weights, type, tell)
    words = _vocabulary(opened, plan.shape.embedding.count)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.tmp-{os.getpid()}"
    try:
        losses = _write(staging, weights, plan, words, progress or (lambda stage, fraction: None))
        staging.replace(target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    _report(plan, losses, tell)
    return target


def _plan(weights: StoredWeights, asked: str | None, note: Note) -> _Plan:
    shape = llama_shape(weights.program)
    architecture = _architecture(weights.artifact, shape)
    tensors = tuple(_tensors(shape, architecture))
    kinds = {tensor.name: gguf_tensors.choose(weights, tensor, asked) for tensor in tensors}
    vectors = dict(_vectors(weights, shape, architecture))
    factors = _rope_factors(weights, shape)
    if factors is not None:
        if architecture not in INTERLEAVED:
            raise GristmillError(
                f"llama.cpp's {architecture} cannot scale rotary frequencies one by one; "
                "a model with default rope works"
            )
        vectors[ROPE_FACTORS] = factors
    context = weights.program.limits.max_position
    if shape.window and shape.window < context:
        context = shape.window
        note(f"warning: llama.cpp has no sliding window for {architecture}: the file's context is {context}, "
             "within which nothing differs")  # fmt: skip
    return _Plan(architecture, shape, tensors, kinds, vectors, context)


def _architecture(artifact: Artifact, shape: LlamaShape) -> str:
    """llama.cpp's name of the model: by what it is, and qwen2 by its own name where it is one."""
    if any(layer.q_norm for layer in shape.layers):
        return "qwen3"
    family = artifact.json(MODEL_CONFIG).get("model_type") if MODEL_CONFIG in artifact.files else None
    plain = all(layer.output.bias is None and layer.gate.bias is None for layer in shape.layers)
    biased = all(rows.bias for layer in shape.layers for rows in (layer.q, layer.k, layer.v))
    square = shape.heads * shape.head_dim == shape.hidden
    return "qwen2" if family == "qwen2" and plain and biased and square else "llama"


def _matrices(layer: Layer) -> dict[str, Rows]:
    return {
        "attn_q": layer.q, "attn_k": layer.k, "attn_v": layer.v, "attn_output": layer.output,
        "ffn_gate": layer.gate, "ffn_up": layer.up, "ffn_down": layer.down,
    }  # fmt: skip


def _order(shape: LlamaShape, architecture: str, name: str) -> Array | None:
    """The rows of q and k in the order in which this architecture rotates them."""
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(name)
    turned = architecture in INTERLEAVED and shape.rope.style == "half"
    if architecture not in INTERLEAVED and shape.rope.style != "half":
        raise GristmillError(f"llama.cpp's {architecture} rotates halves of a head, this model neighbours")
    return interleaved_rows(heads, shape.head_dim) if heads and turned else None


def _tensors(shape: LlamaShape, architecture: str) -> Iterator[Tensor]:
    yield Tensor("token_embd.weight", shape.embedding, end=True)
    for n, layer in enumerate(shape.layers):
        for name, rows in _matrices(layer).items():
            yield Tensor(f"blk.{n}.{name}.weight", rows, _order(shape, architecture, name))
    if shape.head is not None:
        yield Tensor("output.weight", shape.head, end=True)


def _vectors(weights: StoredWeights, shape: LlamaShape, architecture: str) -> Iterator[tuple[str, Array]]:
    ones = np.ones(shape.hidden, np.float32)
    yield "output_norm.weight", weights.tensor(shape.norm) if shape.norm else ones
    for n, layer in enumerate(shape.layers):
        for name, norm in (("attn_norm", layer.attn_norm), ("ffn_norm", layer.ffn_norm)):
            yield f"blk.{n}.{name}.weight", weights.tensor(norm) if norm else ones
        for name, norm in (("attn_q_norm", layer.q_norm), ("attn_k_norm", layer.k_norm)):
            if norm:
                yield f"blk.{n}.{name}.weight", weights.tensor(norm)
        for name, rows in _matrices(layer).items():
            if rows.bias is not None:
                bias = weights.tensor(rows.bias.name)[rows.bias.start :][: rows.bias.count]
                order = _order(shape, architecture, name)
                yield f"blk.{n}.{name}.bias", bias if order is None else bias[order]


def _rope_factors(weights: StoredWeights, shape: LlamaShape) -> Array | None:
    """What llama.cpp divides each frequency of the default rope by; None where all of them are 1."""
    base, frequencies = _rope_base(weights, shape), weights.tensor(shape.rope.inv_freq)
    default = base ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    factors = default / frequencies
    return None if np.abs(factors - 1).max() < ROPE_TOLERANCE else factors.astype(np.float32)


def _rope_base(weights: StoredWeights, shape: LlamaShape) -> float:
    """The base of the frequencies, from the config; the fit of the last one where the config has none."""
    config = weights.artifact.json(MODEL_CONFIG) if MODEL_CONFIG in weights.artifact.files else {}
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = settings.get("rope_theta", config.get("rope_theta"))
    if isinstance(base, (int, float)) and base > 1:
        return float(base)
    last = float(weights.tensor(shape.rope.inv_freq)[-1])
    return float(last ** (-shape.head_dim / (shape.head_dim - 2))) if shape.head_dim > 2 else 10000.0


def _vocabulary(artifact: Artifact, size: int) -> Vocabulary:
    names = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CHAT_TEMPLATE)
    files = {name: artifact.read(name) for name in names if name in artifact.files}
    if TOKENIZER not in files:
        raise GristmillError(f"{artifact.path} holds no tokenizer, without which llama.cpp reads no GGUF")
    found = (
        artifact.json(GENERATION_CONFIG).get("eos_token_id") if GENERATION_CONFIG in artifact.files else None
    )
    return vocabulary(
        files, size, [i for i in (found if isinstance(found, list) else [found]) if type(i) is int]
    )


def _write(
    path: Path, weights: StoredWeights, plan: _Plan, words: Vocabulary, progress: Progress
) -> dict[str, float]:
    """Write the file; returns the loss of every matrix by its name."""
    writer = gguf.GGUFWriter(path, plan.architecture)
    _add_settings(writer, weights, plan)
    words.write(writer)
    for tensor in plan.tensors:
        kind = plan.kinds[tensor.name]
        raw, nbytes = gguf.GGMLQuantizationType[kind.upper()], gguf_tensors.byte_count(kind, tensor.shape)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw)
    for name, vector in plan.vectors.items():
        writer.add_tensor_info(name, vector.shape, np.dtype(np.float32), 4 * vector.size)
    losses = {}
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for count, tensor in enumerate(plan.tensors):
            encoded = gguf_tensors.encode(weights, tensor, plan.kinds[tensor.name])
            losses[tensor.name] = encoded.loss
            writer.write_tensor_data(encoded.array)
            progress("weights", (count + 1) / len(plan.tensors))
        for vector in plan.vectors.values():
            writer.write_tensor_data(np.ascontiguousarray(vector, np.float32))
    finally:
        writer.close()
    return losses


def _add_settings(writer: Any, weights: StoredWeights, plan: _Plan) -> None:
    """The keys from which llama.cpp builds the model."""
    shape = plan.shape
    source = weights.artifact.manifest.get("source")
    name = source.get("name") if isinstance(source, dict) else None
    writer.add_type("model")
    writer.add_name(str(name or weights.artifact.path.name))
    writer.add_vocab_size(shape.embedding.count)
    writer.add_context_length(plan.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(len(shape.layers))
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(_rope_base(weights, shape))
    if shape.rope.scale != 1:
        writer.add_rope_scaling_attn_factors(shape.rope.scale)
    most = Counter(plan.kinds[t.name] for t in plan.tensors if not t.end).most_common(1)[0][0]
    writer.add_file_type(FILE_TYPES[most])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _report(plan: _Plan, losses: dict[str, float], note: Note) -> None:
    counts = Counter(plan.kinds.values())
    note("matrices: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    lossy = {name: loss for name, loss in losses.items() if loss > 0}
    if not lossy:
        note("every matrix holds the artifact's values exactly")
        return
    worst = max(lossy, key=lambda name: lossy[name])
    kinds = ", ".join(sorted({plan.kinds[name] for name in lossy}))
    note(
        f"warning: {len(lossy)} of {len(losses)} matrices were rounded anew ({kinds}): relative squared "
        f"error {sum(lossy.values()) / len(lossy):.2g} on average, at most {lossy[worst]:.2g} ({worst})"
    )


def _check_target(target: Path, force: bool) -> None:
    """Only an empty place, or with force an earlier GGUF file, is written to."""
    if not os.path.lexists(target):
        return
    if target.is_dir():
        raise GristmillError(f"{target} is a directory; give the name of a file, such as model.gguf")
    if not force:
        raise GristmillError(f"{target} exists; use --force (force=True) to replace it")
    with target.open("rb") as file:
        if file.read(4) != MAGIC:
            raise GristmillError(f"{target} exists and is not a GGUF file; remove it or give another name")
