"""fuse_epilogue: what follows a linear or a norm moves into it."""

from typing import Any

import pytest
import torch
from graphs import WIDTH, Rows, apply, canonical, only, ops
from torch import nn
from torch.nn import functional

from gristmill.passes import fuse_epilogue
from gristmill.passes.graph import arguments


class After(Rows):
    def __init__(self, what):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.weight, self.bias = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH))
        self.what = what

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        y = self.linear(x)
        return {
            "activation": lambda: functional.gelu(y, approximate="tanh"),
            "residual": lambda: x + y,
            "residual, other order": lambda: y + x,
            "scale": lambda: y * 0.25,
            "divided": lambda: y / 4,
            "softcap": lambda: torch.tanh(y / 30.0) * 30.0,
            "all": lambda: x + functional.relu(y) * 0.5,
            "norm": lambda: x + functional.layer_norm(x, (WIDTH,), self.weight, self.bias),
            "two caps": lambda: torch.tanh(y / 30.0) * 20.0,
            "used twice": lambda: functional.relu(y) - y,
            "residual first": lambda: functional.relu(x + y),
            "broadcast": lambda: y + y.mean(-1, keepdim=True),
            "vector": lambda: y * self.weight,
        }[self.what]()


FUSED: dict[str, dict[str, Any]] = {
    "activation": {"activation": "gelu_tanh"},
    "residual": {"residual": True},
    "residual, other order": {"residual": True},
    "scale": {"scale": 0.25},
    "divided": {"scale": 0.25},
    "softcap": {"softcap": 30.0},
    "all": {"activation": "relu", "scale": 0.5, "residual": True},
    "residual first": {"residual": True},
}
HITS = {"all": 3}


@pytest.mark.parametrize("what", FUSED)
def test_epilogues(what):
    graph = canonical(After(what))
    report = apply(fuse_epilogue, graph)
    assert report.hits == HITS.get(what, 1)
    rest = {"aten.relu.default": 1} if what == "residual first" else {}
    assert ops(graph) == {"gristmill.embedding.default": 1, "gristmill.linear.default": 1} | rest
    found = arguments(only(graph, "gristmill.linear.default"))
    for name, value in FUSED[what].items():
        assert found[name] is not None if name == "residual" else found[name] == value, name


def test_residual_of_a_norm():
    graph = canonical(After("norm"))
    assert apply(fuse_epilogue, graph).hits == 1
    assert ops(graph) == {"gristmill.embedding.default": 1, "gristmill.layer_norm.default": 1}


@pytest.mark.parametrize("what", ["two caps", "used twice", "broadcast", "vector"])
def test_near_misses_stay(what):
    graph = canonical(After(what))
    before = ops(graph)
    report = apply(fuse_epilogue, graph)
    if what == "two caps":  # the division alone is a scale
        assert [reason for _, reason in report.misses] == [
            "tanh is not scaled by the number that it was divided by"
        ]
        assert ops(graph)["aten.tanh.default"] == 1
        assert arguments(only(graph, "gristmill.linear.default"))["softcap"] == 0.0
    else:
        assert report.hits == 0
        assert ops(graph) == before


class Sum(Rows):
    def forward(self, tokens, positions):
        return torch.tanh(self.rows(tokens)) + torch.sin(self.rows(tokens))


def test_a_sum_of_neither_is_reported():
    graph = canonical(Sum())
    report = apply(fuse_epilogue, graph)
    assert report.hits == 0
    assert [reason for _, reason in report.misses] == ["neither side is a linear or norm used only here"]


class Scaled(Rows):
    def forward(self, tokens, positions):
        return self.rows(tokens) * 3.0


def test_a_scaled_embedding():
    graph = canonical(Scaled())
    assert apply(fuse_epilogue, graph).hits == 1
    assert arguments(only(graph, "gristmill.embedding.default"))["scale"] == 3.0
