"""merge_linears: linears of one input become one."""

import pytest
from graphs import WIDTH, Rows, apply, canonical, only, ops
from torch import nn

from gristmill.passes import fuse_epilogue, merge_linears
from gristmill.passes.graph import arguments
from gristmill.passes.rule import Report


class Three(Rows):
    def __init__(self, inputs="same"):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 8)
        self.inputs = inputs

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        other = x + 1 if self.inputs == "others" else x
        a, b, c = self.a(x), self.b(other), self.c(other + 1 if self.inputs == "others" else x)
        if self.inputs == "activated":
            a, b = a.relu(), b.relu()
        return a * c + b.sum(-1, keepdim=True)


def test_three_linears_are_one_with_three_segments():
    graph = canonical(Three())
    report = apply(merge_linears, graph)
    assert report.hits == 1
    left = ops(graph)
    assert (left["gristmill.linear.default"], left["aten.slice.Tensor"]) == (1, 3)
    found = arguments(only(graph, "gristmill.linear.default"))
    assert [graph.weights[w.name].shape[0] for w in found["weights"]] == [8, 16, 8]
    assert [b is None for b in found["biases"]] == [False, True, False]
    assert only(graph, "gristmill.linear.default").meta["val"].shape[-1] == 32


@pytest.mark.parametrize("inputs", ["others", "activated"])
def test_near_misses_stay(inputs):
    graph = canonical(Three(inputs))
    fuse_epilogue.run(graph, Report())
    assert apply(merge_linears, graph).hits == 0
    assert ops(graph)["gristmill.linear.default"] == 3
