"""fuse_norm: norms that models spell out."""

import pytest
import torch
from graphs import WIDTH, Rows, apply, canonical, only, ops
from torch import nn

from gristmill.passes import fuse_norm
from gristmill.passes.graph import arguments


class Norm(Rows):
    def __init__(self, kind):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH))
        self.kind = kind

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        dim = 1 if self.kind == "over rows" else -1
        mean = x.pow(2).mean(dim, keepdim=True)
        y = x * torch.rsqrt(mean + 1e-6)
        if self.kind == "weight last":
            return y * self.weight
        if self.kind == "no weight":
            return y + 0.5
        if self.kind == "weight of rows":
            return y * torch.tanh(x)
        return self.weight * y + (mean if self.kind == "mean used twice" else 0)


@pytest.mark.parametrize("kind", ["weight first", "weight last", "no weight"])
def test_rms_norm(kind):
    graph = canonical(Norm(kind))
    report = apply(fuse_norm, graph)
    assert (report.hits, report.misses) == (1, [])
    expected = {"gristmill.embedding.default": 1, "gristmill.rms_norm.default": 1}
    assert ops(graph) == expected | ({} if kind == "weight last" else {"aten.add.Tensor": 1})
    found = arguments(only(graph, "gristmill.rms_norm.default"))
    assert found["eps"] == 1e-6
    assert (found["weight"] is None) == (kind == "no weight")


@pytest.mark.parametrize("kind", ["over rows", "mean used twice"])
def test_near_misses_stay(kind):
    graph = canonical(Norm(kind))
    assert apply(fuse_norm, graph).hits == 0
    assert "gristmill.rms_norm.default" not in ops(graph)


def test_a_weight_that_is_no_constant_stays_outside():
    graph = canonical(Norm("weight of rows"))
    report = apply(fuse_norm, graph)
    assert report.hits == 1
    assert [reason for _, reason in report.misses] == [
        "the weight is not a constant vector of the row's width"
    ]
    assert arguments(only(graph, "gristmill.rms_norm.default"))["weight"] is None


class Centered(Rows):
    """Cohere's layer norm."""

    def __init__(self, other=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH))
        self.other = other

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - (0.5 * mean if self.other else mean)) * torch.rsqrt(variance + 1e-5))


def test_layer_norm_without_bias():
    graph = canonical(Centered())
    assert apply(fuse_norm, graph).hits == 1
    assert ops(graph) == {"gristmill.embedding.default": 1, "gristmill.layer_norm.default": 1}


def test_half_the_mean_is_no_layer_norm():
    graph = canonical(Centered(other=True))
    assert apply(fuse_norm, graph).hits == 0
    assert "gristmill.layer_norm.default" not in ops(graph)
