"""fuse_pointwise: one instruction per connected expression."""

import json

import pytest
import torch
from graphs import WIDTH, Rows, apply, canonical, only, ops
from torch import nn
from torch.nn import functional

from gristmill.passes import fuse_pointwise
from gristmill.runtime.program import POINTWISE_BINARY, POINTWISE_UNARY


class Expression(Rows):
    def __init__(self, what):
        super().__init__()
        self.linear, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.vector = nn.Parameter(torch.empty(WIDTH))
        self.what = what

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        y, g = self.linear(x), self.gate(x)
        t, n = torch.tanh(y), y.neg()
        return {
            "one": lambda: torch.exp(-x.abs()) * y + functional.gelu(x, approximate="tanh") / 2.0,
            "column": lambda: x * torch.sigmoid(g),
            "squares": lambda: (t * t).pow(2),
            "twice": lambda: functional.silu(n) * self.linear(n),
            "vector": lambda: x * self.vector,
            "alpha": lambda: torch.sub(x, y, alpha=3),
            "heads": lambda: (x.view(1, -1, 4, 6) * 2.0).flatten(2),
            "integers": lambda: self.table(tokens.abs()),
        }[self.what]()


@pytest.mark.parametrize("what, steps, inputs", [
    ("one", ["abs", "neg", "exp", "mul", "gelu_tanh", "div", "add"], 2),
    ("column", ["sigmoid", "mul"], 2),
    ("squares", ["tanh", "mul", "square"], 1),
])  # fmt: skip
def test_an_expression_is_one_instruction(what, steps, inputs):
    graph = canonical(Expression(what))
    report = apply(fuse_pointwise, graph)
    assert (report.hits, report.misses) == (1, [])
    node = only(graph, "gristmill.pointwise.default")
    assert [name for name, *_ in json.loads(node.args[1])] == steps
    assert len(node.args[0]) == inputs
    assert set(ops(graph)) <= {f"gristmill.{n}.default" for n in ("embedding", "linear", "pointwise")}


def test_a_part_with_two_readers_is_computed_once():
    graph = canonical(Expression("twice"))
    assert apply(fuse_pointwise, graph).hits == 2
    assert ops(graph)["gristmill.pointwise.default"] == 2


@pytest.mark.parametrize("what, op, reason", [
    ("vector", "aten.mul.Tensor", "an operand is a constant vector"),
    ("alpha", "aten.sub.Tensor", None),
    ("heads", "aten.mul.Tensor", "an operand is not a row of float32 columns"),
    ("integers", "aten.abs.default", "an operand is not a row of float32 columns"),
])  # fmt: skip
def test_near_misses_stay(what, op, reason):
    graph = canonical(Expression(what))
    report = apply(fuse_pointwise, graph)
    reasons = {r for _, r in report.misses}
    assert reasons == ({reason} if reason else set())
    assert ops(graph)[op] == 1
    assert report.hits == 0


def test_steps_are_known_to_the_program():
    assert set(fuse_pointwise.NAMES.values()) <= set(POINTWISE_UNARY) | set(POINTWISE_BINARY)
