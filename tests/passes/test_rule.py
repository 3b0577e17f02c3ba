"""The matcher behind rules: captured literals, refusals, chains."""

import torch
from graphs import Rows, canonical, ops

from gristmill.passes.graph import aten, call
from gristmill.passes.rule import Report, Rule


class Twice(Rows):
    def __init__(self, a=2.0, b=2.0, times=1):
        super().__init__()
        self.a, self.b, self.times = a, b, times

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        for _ in range(self.times):
            x = torch.tanh(x / self.a) * self.b
        return x


def _pattern(x, a):
    return aten.mul.Tensor(aten.tanh.default(aten.div.Tensor(x, a)), a)


RULE = Rule(
    patterns=(_pattern,),
    check=lambda traced, found: "too large" if found["a"] > 10 else None,
    replace=lambda traced, out, found: call(traced, out, aten.abs.default, (found["x"],)),
)


def rewritten(**options):
    graph, report = canonical(Twice(**options)), Report()
    RULE.apply(graph, report)
    return graph, report


def test_a_chain_of_matches_is_rewritten_whole():
    graph, report = rewritten(times=3)
    assert report.hits == 3
    assert ops(graph) == {"gristmill.embedding.default": 1, "aten.abs.default": 3}


def test_a_literal_captured_twice_must_be_equal():
    graph, report = rewritten(b=3.0)
    assert (report.hits, report.misses) == (0, [])
    assert ops(graph)["aten.tanh.default"] == 1


def test_a_refusal_is_reported_with_its_reason():
    graph, report = rewritten(a=20.0, b=20.0)
    assert report.hits == 0
    assert [reason for _, reason in report.misses] == ["too large"]
    assert ops(graph)["aten.tanh.default"] == 1
