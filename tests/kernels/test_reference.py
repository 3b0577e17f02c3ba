"""The torch references against transformers' own formulas."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from gristmill.kernels import ops as _ops  # noqa: F401  (registers the ops)
from gristmill.kernels.reference.attention import attend, attention, attention_heads, rope
from gristmill.kernels.reference.linear import ACTIVATIONS, embedding, linear
from gristmill.kernels.reference.norms import layer_norm, rms_norm
from gristmill.kernels.reference.pointwise import STEPS, pointwise
from gristmill.runtime import program

EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 0.0}
FLOAT32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_linear_is_torchs():
    x, w, b = torch.randn(1, 5, 8), torch.randn(6, 8), torch.randn(6)
    torch.testing.assert_close(linear(x, [w], [b]), functional.linear(x, w, b), **EXACT)
    parts = linear(x, [w[:4], w[4:]], [b[:4], None])
    torch.testing.assert_close(parts, functional.linear(x, w, torch.cat([b[:4], torch.zeros(2)])), **FLOAT32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_epilogue_is_in_order(name):
    x, w, r = torch.randn(1, 5, 8), torch.randn(6, 8), torch.randn(1, 5, 6)
    y = ACTIVATIONS[name](functional.linear(x, w)) * 0.5
    wanted = r + 3.0 * torch.tanh(y / 3.0)
    torch.testing.assert_close(linear(x, [w], [None], r, name, False, 0.5, 3.0), wanted, **FLOAT32)


def test_glu_is_llamas_mlp():
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = SimpleNamespace(hidden_size=8, intermediate_size=6, mlp_bias=False, hidden_act="silu")
    mlp, x = LlamaMLP(config), torch.randn(1, 5, 8)
    inner = linear(x, [mlp.gate_proj.weight, mlp.up_proj.weight], [None, None], None, "silu", True)
    torch.testing.assert_close(linear(inner, [mlp.down_proj.weight], [None]), mlp(x), **FLOAT32)


def test_activations_are_those_of_the_program():
    assert tuple(ACTIVATIONS) == program.ACTIVATIONS
    assert set(STEPS) == set(program.POINTWISE_UNARY) | set(program.POINTWISE_BINARY)


def test_embedding_scales_and_shifts():
    table, ids, r = torch.randn(9, 4), torch.tensor([[0, 3, 6]]), torch.randn(1, 3, 4)
    wanted = r + 2.0 * table[torch.tensor([[2, 5, 8]])]
    torch.testing.assert_close(embedding(ids, table, r, 2.0, 2), wanted, **EXACT)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_norms(width):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, r = torch.randn(1, 5, width), torch.randn(1, 5, width)
    norm = LlamaRMSNorm(width, eps=1e-6)
    norm.weight.data.normal_()
    torch.testing.assert_close(rms_norm(x, norm.weight, r, 1e-6), r + norm(x), **FLOAT32)
    torch.testing.assert_close(rms_norm(x, None, None, 1e-6) * norm.weight, norm(x), **FLOAT32)
    layer = nn.LayerNorm(width, eps=1e-5)
    torch.testing.assert_close(layer_norm(x, layer.weight, layer.bias, r, 1e-5), r + layer(x), **FLOAT32)


@pytest.mark.parametrize("dims", [8, 4])
def test_rope_in_halves_is_llamas(dims):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, positions, inv_freq = torch.randn(1, 3, 6, 8), torch.randint(0, 500, (1, 6)), torch.rand(dims // 2)
    angles = positions[..., None].float() * torch.cat([inv_freq, inv_freq])
    wanted, _ = apply_rotary_pos_emb(x[..., :dims], x[..., :dims], angles.cos() * 1.5, angles.sin() * 1.5)
    got = rope(x, positions, inv_freq, "half", 1.5)
    torch.testing.assert_close(got, torch.cat([wanted, x[..., dims:]], -1), **FLOAT32)


def test_rope_in_pairs_is_coheres():
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb

    x, positions, inv_freq = torch.randn(1, 3, 6, 8), torch.randint(0, 500, (1, 6)), torch.rand(4)
    angles = positions[..., None].float() * inv_freq.repeat_interleave(2)
    wanted, _ = apply_rotary_pos_emb(x, x, angles.cos(), angles.sin())
    torch.testing.assert_close(rope(x, positions, inv_freq, "interleaved", 1.0), wanted, **FLOAT32)


def heads(*shape):
    return torch.randn(shape)


def causal(rows, window):
    t = torch.arange(rows)
    seen = t[None] <= t[:, None]
    return seen & (t[None] > t[:, None] - window) if window else seen


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_attention_is_torchs(kv, window):
    q, k, v = heads(4, 9, 8), heads(kv, 9, 8), heads(kv, 9, 6)
    wanted = functional.scaled_dot_product_attention(
        q, k.repeat_interleave(4 // kv, 0), v.repeat_interleave(4 // kv, 0), causal(9, window), scale=0.3
    )
    torch.testing.assert_close(attend(q, k, v, 0.3, window, 0.0, None), wanted, **FLOAT32)


def test_softcap_is_gemma2s():
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    q, k, v = heads(1, 4, 9, 8), heads(1, 2, 9, 8), heads(1, 2, 9, 8)
    module = SimpleNamespace(num_key_value_groups=2, training=False, head_dim=8)
    mask = torch.zeros(9, 9).masked_fill(~causal(9, 0), float("-inf"))[None, None]
    wanted, _ = eager_attention_forward(module, q, k, v, mask, scaling=0.3, softcap=2.0)
    torch.testing.assert_close(attention_heads(q, k, v, 0, 0.3, 0, 2.0, None), wanted, **FLOAT32)


def test_sinks_are_gpt_osss():
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    q, k, v, sinks = heads(1, 4, 9, 8), heads(1, 2, 9, 8), heads(1, 2, 9, 8), torch.randn(4)
    module = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
    mask = torch.zeros(9, 9).masked_fill(~causal(9, 0), float("-inf"))[None, None]
    wanted, _ = eager_attention_forward(module, q, k, v, mask, scaling=0.3)
    torch.testing.assert_close(attention_heads(q, k, v, 0, 0.3, 0, 0.0, sinks), wanted, **FLOAT32)


def rows_of_two_slots():
    """Sequences of 5 and 3 rows, interleaved; (positions, slots)."""
    slots = torch.tensor([[2, 0, 2, 2, 0, 2, 0, 2]])
    positions = torch.tensor([[0, 0, 1, 2, 1, 3, 2, 4]])
    return positions, slots


def test_attention_over_slots_is_attention_of_each():
    positions, slots = rows_of_two_slots()
    q, k, v = torch.randn(1, 8, 4 * 6), torch.randn(1, 8, 2 * 6), torch.randn(1, 8, 2 * 5)
    weights = torch.rand(6), torch.rand(6)
    inv_freq = torch.rand(3)
    got = attention(
        q, k, v, positions, slots, inv_freq, *weights, None, 4, 2, 0.4, 3, 0.0, "half", 1.0, 1e-6
    )  # fmt: skip
    for slot in (0, 2):
        rows = (slots[0] == slot).nonzero()[:, 0]
        parts = [x[:, rows].view(1, len(rows), n, -1).transpose(1, 2) for x, n in ((q, 4), (k, 2), (v, 2))]
        turned = [
            rope(rms_norm(x, w, None, 1e-6), positions[:, rows], inv_freq, "half", 1.0)
            for x, w in zip(parts, weights)
        ]
        wanted = attend(turned[0][0], turned[1][0], parts[2][0], 0.4, 3, 0.0, None).transpose(0, 1).flatten(1)
        torch.testing.assert_close(got[0, rows], wanted, **FLOAT32)


def test_pointwise_registers():
    x, y = torch.rand(1, 3, 5), torch.rand(1, 3, 1)
    steps = [["exp", 0], ["mul", 2, 1], ["add", 3, {"const": 0.5}], ["maximum", 4, 0]]
    wanted = torch.maximum(x.exp() * y + 0.5, x)
    torch.testing.assert_close(pointwise([x, y], json.dumps(steps)), wanted, **FLOAT32)


def test_ops_are_registered_with_torch():
    ours = torch.ops.gristmill
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(ours.gather_rows(x, torch.tensor([4, 1])), x[:, [4, 1]], **EXACT)
    torch.testing.assert_close(ours.rms_norm(x, None, None, 1e-5), rms_norm(x, None, None, 1e-5), **EXACT)
