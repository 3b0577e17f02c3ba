"""What ONNX Runtime GenAI reads beside a graph: genai_config.json, and a tokenizer_config.json it knows."""

from __future__ import annotations

from typing import Any

from gristmill.runtime.program import Program

MODEL_TYPE = "llama"  # to GenAI the name of a decoder with these inputs and outputs, whatever is in the graph
# GenAI chooses a tokenizer by class, and takes tokenizer.json for the rest; names of transformers 5 and
# classes that it does not know go by this one, whose tokenizer.json may be of any kind.
KNOWN_CLASS = "PreTrainedTokenizerFast"


def genai_config(
    program: Program, config: dict[str, Any], generation: dict[str, Any], inputs: list[str], shares: bool
) -> dict[str, Any] | None:
    """None where layers have caches of different shapes or of int8, which GenAI lacks.

    config, generation: the model's own config.json and generation_config.json, or nothing. inputs: of the
    graph. shares: past and present are one buffer.
    """
    shapes = {(c.kv_heads, c.k_dim, c.v_dim) for c in program.caches}
    attention = [i for i in program.instructions if i.op == "attention"]
    heads = {i.attribute("heads") for i in attention}
    if len(shapes) != 1 or len(heads) != 1 or any("int8" in (c.k_dtype, c.v_dtype) for c in program.caches):
        return None
    ((kv_heads, dim, v_dim),) = shapes
    if dim != v_dim:
        return None
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    given = [name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs]
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    begin = generation.get("bos_token_id", config.get("bos_token_id"))
    end = ends[0] if isinstance(ends, list) else ends
    pad = config.get("pad_token_id")
    hidden = program.hidden
    return {
        "model": {
            "type": MODEL_TYPE,
            "bos_token_id": _first(begin, end, 0),
            "eos_token_id": _first(ends, begin, 0),
            "pad_token_id": _first(pad, end, 0),
            "vocab_size": program.vocabulary,
            "context_length": program.limits.max_len,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": dim,
                "hidden_size": hidden.width if hidden is not None else program.values[0].width,
                "num_attention_heads": heads.pop(),
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": len(program.caches),
                "inputs": {name: name for name in given} | names,
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
                            "present_value_names": "present.%d.value"},
            },
        },
        "search": {
            "max_length": program.limits.max_len, "min_length": 0, "do_sample": False,
            "past_present_share_buffer": shares, "num_beams": 1, "num_return_sequences": 1, "top_k": 1,
            "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0,
            "early_stopping": True, "diversity_penalty": 0.0, "no_repeat_ngram_size": 0,
        },
    }  # fmt: skip


def tokenizer_config(own: dict[str, Any]) -> dict[str, Any]:
    """The model's own, with a class that GenAI knows."""
    return own | {"tokenizer_class": KNOWN_CLASS}


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
