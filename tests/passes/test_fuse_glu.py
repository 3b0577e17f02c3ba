"""fuse_glu: gate and up become one linear."""

from typing import Any

import pytest
import torch
from graphs import WIDTH, Rows, apply, canonical, only, ops
from torch import nn
from torch.nn import functional

from gristmill.passes import fuse_glu
from gristmill.passes.graph import arguments

ACTIVATIONS: dict[str, Any] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class TwoLinears(Rows):
    def __init__(self, activation="silu", wrong=None):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 16)
        self.activation, self.wrong = ACTIVATIONS[activation], wrong

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        gate = self.activation(self.gate(x))
        up = self.up(x + 1 if self.wrong == "inputs" else x)
        return up * gate + (gate if self.wrong == "gate used" else 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_linears(activation):
    graph = canonical(TwoLinears(activation))
    report = apply(fuse_glu, graph)
    assert (report.hits, report.misses) == (1, [])
    assert ops(graph) == {
        "gristmill.embedding.default": 1, "gristmill.linear.default": 1, "aten.add.Tensor": 1,
    }  # fmt: skip
    found = arguments(only(graph, "gristmill.linear.default"))
    assert (found["activation"], found["glu"], len(found["weights"])) == (activation, True, 2)
    assert [b is None for b in found["biases"]] == [True, False]


@pytest.mark.parametrize("wrong, reason", [
    ("inputs", "gate and up are not linears of one input, gate first"),
    ("gate used", "the activation is used elsewhere"),
])  # fmt: skip
def test_near_misses_stay(wrong, reason):
    graph = canonical(TwoLinears(wrong=wrong))
    report = apply(fuse_glu, graph)
    assert report.hits == 0
    assert ops(graph)["gristmill.linear.default"] == 2
    assert [r for _, r in report.misses] == [reason]


class Halves(Rows):
    def __init__(self, cut):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 16)
        self.cut = cut

    def forward(self, tokens, positions):
        y = self.linear(self.rows(tokens))
        first, second = y.chunk(2, -1) if self.cut == "chunk" else (y[..., :8], y[..., 8:])
        if self.cut == "up first":
            first, second = second, first
        if self.cut == "overlap":
            second = y[..., 4:12]
        return functional.silu(first) * second


@pytest.mark.parametrize("cut", ["chunk", "slices"])
def test_halves_of_one_linear(cut):
    graph = canonical(Halves(cut))
    assert apply(fuse_glu, graph).hits == 1
    assert ops(graph) == {"gristmill.embedding.default": 1, "gristmill.linear.default": 1}


@pytest.mark.parametrize("cut", ["up first", "overlap"])
def test_other_cuts_stay(cut):
    graph = canonical(Halves(cut))
    report = apply(fuse_glu, graph)
    assert (report.hits, len(report.misses)) == (0, 1)
    assert ops(graph)["aten.silu.default"] == 1


def test_a_gate_by_another_function_stays():
    class Tanh(TwoLinears):
        def forward(self, tokens, positions):
            x = self.rows(tokens)
            return torch.tanh(self.gate(x)) * self.up(x)

    graph = canonical(Tanh())
    assert apply(fuse_glu, graph).hits == 0
    assert ops(graph)["gristmill.linear.default"] == 2
