"""canonicalize: one spelling for everything."""

import math

import torch
from graphs import WIDTH, Rows, apply, only, ops, traced
from torch import nn

from gristmill.passes import canonicalize
from gristmill.passes.graph import arguments


class Plain(Rows):
    """Everything that canonicalize has another word for, with no-ops between."""

    def __init__(self, normalized=(WIDTH,), dtype=torch.float32):
        super().__init__()
        self.norm = nn.LayerNorm(normalized)
        self.linear = nn.Linear(WIDTH, 8)
        self.dtype = dtype

    def forward(self, tokens, positions):
        x = nn.functional.dropout(self.rows(tokens), 0.5, training=False).contiguous()
        x = self.norm(x.to(self.dtype).float() * 1.0)
        return self.linear(x.view(1, -1, WIDTH))


def test_layers_become_our_ops_and_no_ops_go():
    graph = traced(Plain())
    report = apply(canonicalize, graph)
    assert report.hits >= 5
    assert ops(graph) == {
        "gristmill.embedding.default": 1, "gristmill.layer_norm.default": 1, "gristmill.linear.default": 1,
    }  # fmt: skip


def test_a_cast_that_rounds_stays():
    graph = traced(Plain(dtype=torch.float16))
    apply(canonicalize, graph)
    assert ops(graph)["aten._to_copy.default"] == 2


class NormOfTwo(Rows):
    def forward(self, tokens, positions):
        heads = self.rows(tokens).view(1, -1, 4, WIDTH // 4)
        return nn.functional.layer_norm(heads, (4, WIDTH // 4)).flatten(2)


def test_a_norm_over_two_dimensions_stays():
    graph = traced(NormOfTwo())
    apply(canonicalize, graph)
    assert "gristmill.layer_norm.default" not in ops(graph)


class Conv1D(Rows):
    """GPT-2's linear: weight [in, out], rows flattened."""

    def __init__(self, beta=1):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(WIDTH, 8)), nn.Parameter(torch.empty(8))
        self.beta = beta

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        y = torch.addmm(self.bias, x.view(-1, WIDTH), self.weight, beta=self.beta)
        return y.view(1, x.shape[1], 8)


def test_addmm_over_flattened_rows_is_a_linear():
    graph = traced(Conv1D())
    apply(canonicalize, graph)
    assert ops(graph) == {"gristmill.embedding.default": 1, "gristmill.linear.default": 1}
    (weight,) = arguments(only(graph, "gristmill.linear.default"))["weights"]
    assert graph.weights[weight.name].shape == (8, WIDTH)


def test_addmm_that_scales_its_bias_stays():
    graph = traced(Conv1D(beta=2))
    apply(canonicalize, graph)
    assert ops(graph)["aten.addmm.default"] == 1


class Constants(Rows):
    """Gemma's 1 + w, and scalars kept as tensors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH))
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.tensor(3.0))

    def forward(self, tokens, positions):
        x = self.rows(tokens) * (1.0 + self.weight)
        return torch.add(x * self.scale, self.scale, alpha=2)


def test_constants_fold_and_alpha_survives():
    graph = traced(Constants())
    report = apply(canonicalize, graph)
    assert report.hits == 4  # the embedding, 1 + w, two scalars
    assert ops(graph) == {"gristmill.embedding.default": 1, "aten.mul.Tensor": 2, "aten.add.Tensor": 1}
    assert only(graph, "aten.add.Tensor").args[1] == 3.0
    folded = [lazy for name, lazy in graph.weights.items() if name.endswith("_folded")]
    assert [lazy.shape for lazy in folded] == [(WIDTH,)]


class Positions(Rows):
    def __init__(self):
        super().__init__()
        self.learned = nn.Embedding(64, WIDTH)

    def forward(self, tokens, positions):
        return self.rows(tokens) + self.learned(positions + 2)


def test_learned_positions_keep_their_offset():
    graph = traced(Positions())
    apply(canonicalize, graph)
    assert ops(graph) == {"gristmill.embedding.default": 2, "aten.add.Tensor": 1}
    found = graph.graph.find_nodes(op="call_function", target=torch.ops.gristmill.embedding.default)
    assert sorted(arguments(n)["offset"] for n in found) == [0, 2]


FACTOR = math.sqrt(2.0 / math.pi)


class GeluNew(Rows):
    def __init__(self, factor=FACTOR):
        super().__init__()
        self.factor = factor

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        return 0.5 * x * (1.0 + torch.tanh(self.factor * (x + 0.044715 * torch.pow(x, 3.0))))


def test_gelu_spelled_out_is_one_op():
    graph = traced(GeluNew())
    apply(canonicalize, graph)
    assert ops(graph) == {"gristmill.embedding.default": 1, "aten.gelu.default": 1}


def test_gelu_with_another_constant_is_not():
    graph = traced(GeluNew(factor=0.8))
    apply(canonicalize, graph)
    assert "aten.gelu.default" not in ops(graph)


class Flattened(Rows):
    """OPT's rows: [T, W] for a while."""

    def __init__(self, mixing=False):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.mixing = mixing

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        flat = x.reshape(-1, WIDTH)
        y = flat + torch.relu(self.linear(flat))
        return (y - y.mean(0) if self.mixing else y).view(x.shape)


def test_flattened_rows_get_their_dimension_back():
    graph = traced(Flattened())
    apply(canonicalize, graph)
    assert "aten.view.default" not in ops(graph)
    linear = only(graph, "gristmill.linear.default")
    assert linear.meta["val"].shape[0] == 1
    assert linear.meta["val"].dim() == 3


def test_rows_that_mix_stay_flat():
    graph = traced(Flattened(mixing=True))
    apply(canonicalize, graph)
    assert ops(graph)["aten.view.default"] == 2
