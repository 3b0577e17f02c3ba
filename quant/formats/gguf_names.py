"""What llama.cpp calls the tensors of Llama-shaped models, and how it orders their rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # [dims / 2] f32: each frequency is divided by its factor
ARCHITECTURES = ("llama", "qwen2", "qwen3")
INTERLEAVED = ("llama",)  # architectures that rotate neighbouring rows of q and k, not the halves of a head


def transformers_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; None for an unknown tensor.

    >>> transformers_name("blk.3.attn_q.weight"), transformers_name("output.weight")
    ('model.layers.3.self_attn.q_proj.weight', 'lm_head.weight')
    """
    stem, _, suffix = name.rpartition(".")
    if suffix not in ("weight", "bias"):
        return None
    if stem in OUTSIDE:
        return f"{OUTSIDE[stem]}.{suffix}"
    block, _, rest = stem.partition(".")
    layer, _, inside = rest.partition(".")
    if block != "blk" or not layer.isdecimal() or inside not in INSIDE:
        return None
    return f"model.layers.{int(layer)}.{INSIDE[inside]}.{suffix}"


def interleaved_rows(heads: int, dim: int) -> NDArray[Any]:
    """Row i of a GGUF's q or k is row out[i] of transformers': pairs a half apart become neighbours.

    >>> interleaved_rows(1, 6).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return np.arange(heads * dim).reshape(heads, 2, dim // 2).swapaxes(1, 2).reshape(-1)
