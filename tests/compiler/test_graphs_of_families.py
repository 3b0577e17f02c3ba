"""Fused graphs of every family against transformers, run by the torch references, and their Programs."""

from typing import Any

import pytest
import torch
from models import batch, config_of, expected, fused, logits, random_model, relative, texts, traced_of

from gristmill.compiler import interpret
from gristmill.compiler.formats import Formats
from gristmill.compiler.lower import lower
from gristmill.compiler.memory import plan_arena
from gristmill.compiler.options import CompileOptions
from gristmill.runtime.program import OPS, Limits, Program

TOLERANCE = 1e-5  # of the largest logit, float32
# family → (instructions besides the layers', instructions per layer, what its config says beyond the base);
# the first eight have two layers
FAMILIES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "llama": (4, 7, {}),
    "mistral": (4, 7, {"sliding_window": 5}),
    "qwen2": (4, 7, {"tie_word_embeddings": True}),
    "qwen3": (4, 7, {"head_dim": 12}),
    "phi3": (4, 7, {}),
    "gemma2": (4, 9, {"head_dim": 12, "sliding_window": 5}),
    "gpt2": (5, 7, {"n_positions": 128, "n_embd": 48, "n_layer": 2, "n_head": 6}),
    "gpt_neox": (4, 8, {"num_key_value_heads": 6}),
    "stablelm": (4, 7, {"num_hidden_layers": 1}),
    "olmo2": (4, 9, {"num_hidden_layers": 1}),
    "starcoder2": (4, 7, {"sliding_window": 5, "num_hidden_layers": 1}),
    "phi": (4, 7, {"num_hidden_layers": 1}),
    "gemma": (4, 7, {"head_dim": 12, "num_hidden_layers": 1}),
    "gemma3_text": (4, 9, {"head_dim": 12, "sliding_window": 5}),
    "smollm3": (4, 7, {"num_hidden_layers": 1}),
    "granite": (
        4,
        7,
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "num_hidden_layers": 1,
        },
    ),
    "exaone4": (4, 7, {}),
    "cohere": (4, 6, {"num_hidden_layers": 1}),
    "glm4": (4, 9, {"head_dim": 12, "num_hidden_layers": 1}),
    "opt": (5, 8, {"ffn_dim": 64, "word_embed_proj_dim": 48, "num_hidden_layers": 1}),
}


def program_of(graph: Any) -> Program:
    options = CompileOptions.of(weights="f32")
    program = lower(graph, Formats.of(options).scheme, options.cache_format, Limits(32, 4, 64, 128)).program
    plan_arena(program)
    return program


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    ends, layer, changes = FAMILIES[family]
    config = config_of(family, **changes)
    model = random_model(config)
    graph = fused(traced_of(model, config))
    sequences = texts(17, 9)
    assert relative(logits(graph, sequences), expected(model, sequences)) < TOLERANCE
    program = program_of(graph)
    assert len(program.instructions) == ends + config.num_hidden_layers * layer
    assert len(program.listing().splitlines()) >= len(program.instructions) + 2
    assert {i.op for i in program.instructions} <= set(OPS)
    assert Program.from_json(program.to_json()).to_json() == program.to_json()
    _rows_are_independent(graph, sequences)


def _rows_are_independent(graph, sequences):
    """Interleaving the rows of two slots permutes the logits and nothing else."""
    inputs = batch(sequences)
    straight = interpret.run(graph, inputs)[0]
    for seed in range(2):
        order = merged(len(sequences[0]), len(sequences[1]), seed)
        mixed = {k: v[:, order] if k != "rows" else v for k, v in inputs.items()}
        difference = (interpret.run(graph, mixed)[0] - straight[order]).abs().max()
        assert float(difference / straight.abs().max()) < TOLERANCE


def merged(first, second, seed):
    """A random merge of two sequences' rows: each keeps its order."""
    taken = torch.randperm(first + second, generator=torch.Generator().manual_seed(seed)) < first
    order = torch.empty(first + second, dtype=torch.long)
    order[taken], order[~taken] = torch.arange(first), torch.arange(first, first + second)
    return order


def test_rows_of_the_graph_are_chosen():
    config = config_of("llama", num_hidden_layers=1)
    model = random_model(config)
    graph = fused(traced_of(model, config))
    sequences = texts(9, 4)
    inputs = batch(sequences)
    whole = interpret.run(graph, inputs)[0]
    some = interpret.run(graph, inputs | {"rows": torch.tensor([12, 8])})[0]
    assert relative(some, whole[[12, 8]]) < TOLERANCE
    groups = list(interpret.logits_by_group(graph, inputs, [torch.tensor([12]), torch.tensor([8, 0])]))
    assert [g.shape[0] for g in groups] == [1, 2]
    assert relative(torch.cat(groups), whole[[12, 8, 0]]) < TOLERANCE


def test_a_tied_pair_is_one_matrix_and_q_k_v_one_weight_list():
    config = config_of("llama", num_hidden_layers=1, tie_word_embeddings=True)
    graph = fused(traced_of(random_model(config), config))
    program = program_of(graph)
    embedding, head = program.instructions[0], program.instructions[-1]
    assert embedding.weight is not None
    assert head.weight is not None
    assert program.weights[embedding.weight] == program.weights[head.weight]
    assert "model.layers.0.self_attn.q_proj+k_proj+v_proj" in program.weights
