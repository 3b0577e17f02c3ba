"""last_rows: only the rows asked for reach the head."""

import pytest
import torch
from graphs import WIDTH, Rows, apply, canonical, inputs, only, ops
from torch import nn
from torch.nn import functional

from gristmill.compiler import interpret
from gristmill.passes import fuse_epilogue, last_rows
from gristmill.passes.graph import arguments, is_op, ours
from gristmill.passes.rule import Report


class Head(Rows):
    def __init__(self, end="norm"):
        super().__init__()
        self.mix, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 50)
        self.weight, self.bias = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH))
        self.end = end

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        x = x + self.mix(x)
        if self.end == "norm":
            x = functional.layer_norm(x, (WIDTH,), self.weight, self.bias)
        logits = self.head(x)
        return {"softcap": torch.tanh(logits / 30) * 30, "softmax": logits.softmax(-1)}.get(self.end, logits)


def prepared(end):
    graph = canonical(Head(end))
    fuse_epilogue.run(graph, Report())
    return graph


@pytest.mark.parametrize("end, first", [
    ("norm", ours.layer_norm.default), ("head", ours.linear.default), ("softcap", ours.linear.default),
])  # fmt: skip
def test_rows_are_gathered_at_the_residual_stream(end, first):
    graph = prepared(end)
    before = ops(graph)
    report = apply(last_rows, graph)
    assert (report.hits, report.misses) == (1, [])
    assert ops(graph) == before | {"gristmill.gather_rows.default": 1}
    (user,) = only(graph, "gristmill.gather_rows.default").users
    assert is_op(user, first)
    assert arguments(only(graph, "gristmill.gather_rows.default"))["x"].target == ours.linear.default


def test_fewer_rows_have_the_same_logits():
    graph = prepared("norm")
    everything = interpret.run(graph, inputs())
    last_rows.run(graph, Report())
    some = interpret.run(graph, inputs() | {"rows": torch.tensor([12, 3])})
    torch.testing.assert_close(some, everything[:, [12, 3]], rtol=0, atol=1e-6)


def test_another_end_stays():
    graph = prepared("softmax")
    report = apply(last_rows, graph)
    assert report.hits == 0
    assert [reason for _, reason in report.misses] == ["the logits do not come from a linear"]
    assert "gristmill.gather_rows.default" not in ops(graph)
