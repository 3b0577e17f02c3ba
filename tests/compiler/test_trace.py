"""trace: no weight is touched, the config stays as it was, and what a graph cannot say is refused by name."""

import copy
import re

import pytest
import torch
from models import (
    MemoryCheckpoint,
    checkpoint_of,
    config_of,
    expected,
    fused,
    logits,
    random_model,
    relative,
    texts,
    traced_of,
)

from gristmill.compiler import trace as tracing
from gristmill.compiler.trace import trace
from gristmill.runtime.errors import GristmillError

TOLERANCE = 1e-5  # of the largest logit, float32


def meta_checkpoint(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return MemoryCheckpoint(AutoModelForCausalLM.from_config(config).state_dict())


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_no_weight_is_touched():
    config = config_of("llama", vocab_size=400_000, hidden_size=768, num_hidden_layers=1)
    checkpoint = meta_checkpoint(config)
    trace(
        config_of("llama", num_hidden_layers=1), meta_checkpoint(config_of("llama", num_hidden_layers=1)), 64
    )
    before = resident()
    graph = trace(config, checkpoint, 64)
    assert graph.weights["p_model_model_embed_tokens_weight"].shape == (400_000, 768)
    assert resident() - before < 300 << 20  # the two ends alone are 2.4 GB
    assert checkpoint.reads == []


def test_the_config_stays_as_it_was():
    config = config_of("gemma2", sliding_window=5)
    before = copy.deepcopy(config.to_dict()), config._attn_implementation
    traced_of(random_model(copy.deepcopy(config)), config)
    assert (config.to_dict(), config._attn_implementation) == before


def test_an_unknown_mask_is_refused_by_name():
    config = config_of("llama4_text", head_dim=8, num_local_experts=1, intermediate_size_mlp=64)
    with pytest.raises(GristmillError, match="chunked") as caught:
        trace(config, meta_checkpoint(config), 64)
    assert "\n" not in str(caught.value)


def own_mask(limit):
    return lambda batch, head, q, kv: kv < limit


@pytest.mark.parametrize("window, message", [
    (5, None),
    (7, r"windows of \[7\] but its attention says \[5\]"),
])  # fmt: skip
def test_windows_of_masks_and_attention_agree(window, message):
    from transformers.masking_utils import sliding_window_causal_mask_function

    config = config_of("mistral", sliding_window=5, num_hidden_layers=1)
    program, _ = tracing._export(tracing._build(config))
    masks = [sliding_window_causal_mask_function(window)]
    if message is None:
        tracing._refuse_masks(masks, program)
        return
    with pytest.raises(GristmillError, match=message):
        tracing._refuse_masks(masks, program)


def test_a_mask_function_from_elsewhere_is_refused():
    from transformers.masking_utils import and_masks, causal_mask_function

    config = config_of("llama", num_hidden_layers=1)
    program, _ = tracing._export(tracing._build(config))
    with pytest.raises(GristmillError, match="'own_mask' is not supported"):
        tracing._refuse_masks([and_masks(causal_mask_function, own_mask(3))], program)


@pytest.mark.parametrize("given, message", [
    ({"attention_mask": torch.zeros(1)}, "brings a mask of its own"),
    ({"attention_mask": None, "position_bias": torch.zeros(1)}, "the tensor 'position_bias'"),
])  # fmt: skip
def test_tensors_that_would_be_lost_are_refused(given, message):
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(GristmillError, match=message):
        tracing._attention(torch.nn.Identity(), q, q, q, **given)


def same_as_transformers(config, max_len=64, lengths=(17, 9)):
    model = random_model(config)
    graph = fused(traced_of(model, config, max_len))
    sequences = texts(*lengths)
    assert relative(logits(graph, sequences), expected(model, sequences)) < TOLERANCE
    return graph


ROPES = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "linear": {"factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_ropes(kind):
    scaling = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    graph = same_as_transformers(config_of("llama", num_hidden_layers=1, rope_parameters=scaling))
    assert graph.max_position is None


LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0], "original_max_position_embeddings": 32, "factor": 4.0,
}  # fmt: skip


def longrope():
    changes = {"rope_parameters": LONG, "original_max_position_embeddings": 32}
    return config_of("phi3", num_hidden_layers=1, **changes)


def test_longrope_has_the_short_set_up_to_the_original_length():
    graph = same_as_transformers(longrope(), max_len=32)
    assert graph.max_position == 32


def test_longrope_has_the_long_set_beyond():
    graph = same_as_transformers(longrope(), max_len=64, lengths=(40, 35))
    assert graph.max_position is None


def dynamic(max_len):
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = config_of("llama", num_hidden_layers=1, rope_parameters=scaling)
    return same_as_transformers(config, max_len=max_len)


def test_dynamic_scaling_holds_up_to_the_trained_length():
    assert dynamic(max_len=128).max_position == 128


def test_dynamic_scaling_beyond_is_refused():
    with pytest.raises(GristmillError, match="give --max-len 128"):
        dynamic(max_len=129)


@pytest.mark.parametrize("family, changes", [
    ("llama", {"head_dim": 20}), ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}), ("stablelm", {"use_parallel_residual": True}),
], ids=str)  # fmt: skip
def test_variants(family, changes):
    same_as_transformers(config_of(family, num_hidden_layers=1, **changes))


def test_a_missing_tensor_is_named():
    config = config_of("llama", num_hidden_layers=1)
    checkpoint = checkpoint_of(random_model(config))
    del checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(GristmillError, match=re.escape("no tensor 'model.layers.0.mlp.up_proj.weight'")):
        trace(config, checkpoint, 64)


def test_a_wrong_shape_is_told():
    config = config_of("llama", num_hidden_layers=1)
    checkpoint = checkpoint_of(random_model(config))
    checkpoint.tensors["model.norm.weight"] = torch.ones(49)
    with pytest.raises(GristmillError, match=r"has shape \[49\], the config asks for \[48\]"):
        trace(config, checkpoint, 64)


@pytest.mark.parametrize("differ", [False, True])
def test_a_tied_head_stored_twice(differ):
    config = config_of("llama", num_hidden_layers=1, tie_word_embeddings=True)
    checkpoint = checkpoint_of(random_model(config))
    head = checkpoint.tensors["model.embed_tokens.weight"].clone()
    checkpoint.tensors["lm_head.weight"] = head + 1 if differ else head
    if not differ:
        assert trace(config, checkpoint, 64).weights
        return
    with pytest.raises(GristmillError, match='set "tie_word_embeddings": false'):
        trace(config, checkpoint, 64)


def test_older_spellings_of_names_are_found():
    config = config_of("llama", num_hidden_layers=1)
    model = random_model(config)
    checkpoint = checkpoint_of(model)
    checkpoint.tensors = {k.removeprefix("model."): v for k, v in checkpoint.tensors.items()}
    graph = fused(trace(config, checkpoint, 64))
    sequences = texts(9)
    assert relative(logits(graph, sequences), expected(model, sequences)) < TOLERANCE
