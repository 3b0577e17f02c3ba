"""rotate: the residual stream turned by a Hadamard matrix, with the same logits."""

from functools import partial
from typing import Any

import pytest
import torch
from graphs import WIDTH, Rows, apply, canonical, only, ops
from models import config_of, fused, logits, random_model, relative, texts, traced_of
from torch import nn

from gristmill.passes import fuse_epilogue, fuse_norm, last_rows, merge_linears, rotate
from gristmill.passes.graph import Lazy, Traced, arguments, is_op, ours
from gristmill.passes.hadamard import Rotation
from gristmill.passes.rule import Report
from gristmill.quant.scheme import Scheme
from gristmill.quant.tensor import dequantize_tensor, quantize_tensor

TOLERANCE = 3e-6  # of the largest logit, float32


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Stream(Rows):
    """An embedding, one layer and a head; ``what`` is done otherwise."""

    def __init__(self, what=""):
        super().__init__()
        self.first, self.last = Norm(), Norm()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.what = what

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        if self.what == "tanh stream":
            x = torch.tanh(x)
        normed = self.first(x)
        y = self.down(self.up(x if self.what == "read without norm" else normed).relu())
        if self.what in ("activated", "post-norm"):
            y = y.relu() if self.what == "activated" else self.first(y)
        x = x + y
        if self.what == "norm read by tanh":
            x = x + self.down(self.up(torch.tanh(normed)))
        if self.what == "stream read by tanh":
            x = x + self.down(self.up(torch.tanh(x)))
        if self.what == "layer norm":
            return self.head(nn.functional.layer_norm(x, (WIDTH,), self.last.weight))
        return self.head(x if self.what == "no last norm" else self.last(x))


def prepared(module: nn.Module) -> Traced:
    graph = canonical(module)
    for step in (fuse_norm, fuse_epilogue, merge_linears, last_rows):
        step.run(graph, Report())
    return graph


@pytest.mark.parametrize("what, norms", [("", 2), ("read without norm", 1), ("no last norm", 1)])
def test_a_stream_is_turned(what, norms):
    graph = prepared(Stream(what))
    before = ops(graph)
    report = apply(rotate, graph, TOLERANCE)
    assert (report.hits, report.misses) == (4, [])
    assert ops(graph) == before
    assert report.notes == ["stream of 24 columns, Hadamard matrix of order 24 = 12 × 2"]
    found = graph.graph.find_nodes(op="call_function", target=ours.rms_norm.default)
    assert len(found) == norms
    assert all(arguments(n)["weight"] is None for n in found)


def test_the_stream_itself_is_turned():
    """The embedding's table is the old one times Q: no norm could be dropped unseen."""
    graph = prepared(Stream())
    old = graph.weights[arguments(only(graph, "gristmill.embedding.default"))["weight"].name].load()
    rotate.run(graph, Report())
    new = graph.weights[arguments(only(graph, "gristmill.embedding.default"))["weight"].name].load()
    rotation = Rotation.of(WIDTH)
    assert rotation is not None
    torch.testing.assert_close(new.double(), rotation.rotate(old.double()), rtol=0, atol=1e-6)
    assert float((new - old).abs().max()) > 0.1


@pytest.mark.parametrize("what, target, reason", [
    (
        "layer norm", "layer_norm",
        "a layer norm subtracts the mean over columns, which a rotation does not keep",
    ),
    ("post-norm", "rms_norm", "a post-norm's weight stands between what is added and the stream"),
    ("activated", "linear", "what a linear adds to the stream passes an activation first"),
    ("norm read by tanh", "tanh", "a norm of the stream is read by something else than a linear"),
    ("stream read by tanh", "tanh", "the stream is read by something else than an rms norm or a linear"),
    ("tanh stream", "tanh", "the stream is written by something else than an embedding or a linear"),
])  # fmt: skip
def test_near_misses_stay(what, target, reason):
    graph = prepared(Stream(what))
    before, weights = ops(graph), set(graph.weights)
    report = apply(rotate, graph, TOLERANCE)
    assert report.hits == 0
    [(where, why)] = report.misses
    assert why == reason
    assert target in where
    assert (ops(graph), set(graph.weights)) == (before, weights)


def test_a_width_without_hadamard_matrix(monkeypatch):
    graph = prepared(Stream())
    monkeypatch.setattr(Rotation, "of", lambda width: None)
    report = apply(rotate, graph)
    assert [why for _, why in report.misses] == [
        "no Hadamard matrix fits 24 columns; expected a multiple of four"
    ]


# family → what its config says beyond the base, rewrites: embedding, head, and 5 a layer with its values
TURNED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, head of 20": ("llama", {"head_dim": 20}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "gemma": ("gemma", {"head_dim": 12}),
    "phi3": ("phi3", {}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "gpt2": ({"n_positions": 128, "n_embd": 48, "n_layer": 2, "n_head": 6}, "ln_f", "a layer norm subtracts"),
    "gemma2": ({"head_dim": 12, "sliding_window": 5}, "layers.1", "a post-norm's weight"),
    "olmo2": ({}, "layers.1", "a post-norm's weight"),
}


def family(name: str, **changes: Any) -> Traced:
    config = config_of(name, **changes)
    return fused(traced_of(random_model(config), config))


@pytest.mark.parametrize("case", TURNED)
def test_families(case):
    name, changes = TURNED[case]
    graph, sequences = family(name, **changes), texts(17, 9)
    before, calls = logits(graph, sequences), ops(graph)
    report = Report()
    rotate.run(graph, report)
    assert (report.hits, report.misses) == (12, [])
    assert ops(graph) == calls
    assert relative(logits(graph, sequences), before) < TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_are_refused(name):
    changes, where, reason = REFUSED[name]
    graph, sequences = family(name, **changes), texts(17)
    before = logits(graph, sequences)
    report = Report()
    rotate.run(graph, report)
    [(place, why)] = report.misses
    assert report.hits == 0
    assert where in place
    assert why.startswith(reason)
    assert torch.equal(logits(graph, sequences), before)


def test_a_head_that_no_four_divides_keeps_its_values():
    graph, sequences = family("llama", head_dim=6), texts(17)
    before = logits(graph, sequences)
    report = Report()
    rotate.run(graph, report)
    assert report.hits == 10
    assert {why for _, why in report.misses} == {"no Hadamard matrix has the order 6 of a head"}
    assert relative(logits(graph, sequences), before) < TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_pair_becomes_two_matrices(tied):
    graph = family("llama", num_hidden_layers=1, tie_word_embeddings=tied)
    report = Report()
    rotate.run(graph, report)
    assert any("is no longer the head too" in note for note in report.notes) == tied
    table = arguments(only(graph, "gristmill.embedding.default"))["weight"]
    output = next(n for n in graph.graph.nodes if n.op == "output")
    [head] = arguments(output.args[0][0])["weights"]
    assert graph.weights[table.name].names == ("model.embed_tokens.weight",)
    assert graph.weights[head.name].names == ("lm_head.weight",)


def test_a_pair_without_norm_between_stays_tied():
    module = Stream("no last norm")
    module.head.weight = module.table.weight
    graph = prepared(module)
    assert "is no longer" not in "".join(apply(rotate, graph, TOLERANCE).notes)
    table = arguments(only(graph, "gristmill.embedding.default"))["weight"]
    assert table in [w for n in table.users if is_op(n, ours.linear.default) for w in arguments(n)["weights"]]


def test_no_weight_is_read_by_the_pass():
    config = config_of("qwen2", num_hidden_layers=1)
    graph = fused(traced_of(random_model(config), config))
    for name, lazy in graph.weights.items():
        graph.weights[name] = Lazy(lazy.shape, lazy.names, lambda: pytest.fail("read"))
    report = Report()
    rotate.run(graph, report)
    assert report.hits == 7


def test_outliers_of_the_stream_are_spread():
    """Three columns of the stream × 30: int4 loses less on the turned weights."""
    config = config_of("llama", num_hidden_layers=1)
    model = random_model(config)
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith(("embed_tokens.weight",)):
            weight[:, [3, 17, 40]] *= 30
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[[3, 17, 40]] *= 30
    sequences = texts(60)
    errors = []
    for turn in (False, True):
        graph = fused(traced_of(model, config))
        exact = logits(graph, sequences)
        if turn:
            rotate.run(graph, Report())
        _round(graph)
        errors.append(float((logits(graph, sequences) - exact).square().mean()))
    assert errors[1] < 0.7 * errors[0], errors


def _round(graph: Traced) -> None:
    """Every matrix becomes its int4 rounding."""
    for name, lazy in graph.weights.items():
        if len(lazy.shape) == 2:
            rounded = dequantize_tensor(quantize_tensor(name, lazy.load(), Scheme("int4", 32)))
            graph.weights[name] = Lazy(lazy.shape, lazy.names, partial(torch.from_numpy, rounded))
