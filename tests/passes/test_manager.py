"""manager and legality: the ledger, and graphs that may not be."""

from types import ModuleType
from typing import Any

import pytest
import torch
from graphs import WIDTH, Rows, inputs, ops, traced
from torch import nn

from gristmill.compiler import interpret
from gristmill.passes import canonicalize, fuse_epilogue, last_rows, legality
from gristmill.passes.graph import aten, place
from gristmill.passes.manager import IllegalGraph, run_passes


class Model(Rows):
    def __init__(self, odd=False):
        super().__init__()
        self.linear, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.odd = odd

    def forward(self, tokens, positions):
        x = self.rows(tokens)
        x = x + self.linear(x.cumsum(1) if self.odd else x)
        return self.head(x)


def evaluate(graph):
    return interpret.run(graph, inputs())


PASSES = (canonicalize, fuse_epilogue, last_rows)


def test_the_ledger_counts_and_compares():
    graph = traced(Model())
    ledger = run_passes(graph, PASSES, evaluate)
    assert [entry.name for entry in ledger] == ["canonicalize", "fuse_epilogue", "last_rows"]
    assert [entry.hits for entry in ledger] == [3, 1, 1]
    assert all(entry.difference is not None and entry.difference < 1e-6 for entry in ledger)
    assert "rewrites" in str(ledger[0])
    assert set(ops(graph)) <= {str(op) for op in legality.FINAL}


def test_without_evaluation_nothing_is_compared():
    assert {entry.difference for entry in run_passes(traced(Model()), PASSES)} == {None}


def test_an_op_without_instruction_is_named_with_its_count():
    with pytest.raises(IllegalGraph, match=r"^aten\.cumsum\.default.* \(after last_rows\)$"):
        run_passes(traced(Model(odd=True)), PASSES)


def _module(name, run):
    module: Any = ModuleType(f"gristmill.passes.{name}")
    module.run = run
    return module


def test_a_pass_must_keep_its_promise():
    idle = _module("canonicalize", lambda graph, report: None)
    with pytest.raises(IllegalGraph, match=r"aten\.embedding\.default.* and 2 more \(after canonicalize\)"):
        run_passes(traced(Model()), [idle, fuse_epilogue])


def test_the_reason_of_a_miss_is_told():
    def run(graph, report):
        report.miss(next(n for n in graph.graph.nodes if n.op == "call_function"), "too warm")

    with pytest.raises(IllegalGraph, match="too warm$"):
        run_passes(traced(Model()), [_module("canonicalize", run), fuse_epilogue])


def test_a_pass_that_changes_numbers_shows_in_the_ledger():
    def run(graph, report):
        weight = graph.weights["p_head_bias"]
        load = weight.load
        weight.load = lambda: load() + 1.0

    entry = run_passes(
        traced(Model()), [canonicalize, _module("shift", run), last_rows, fuse_epilogue], evaluate
    )[1]
    assert entry.difference is not None
    assert entry.difference > 1e-3
    assert "difference" in str(entry)


def test_equal_misses_are_counted():
    def run(graph, report):
        for node in graph.graph.find_nodes(op="call_function", target=aten.linear.default):
            report.miss(node, "no")

        report.miss(node, "no")

    entry = run_passes(traced(Model()), [_module("look", run), *PASSES])[0]
    assert len(entry.misses) == 3
    assert str(entry).count("not at") == 2  # linear and head are two places
    assert "not at aten.linear.default in head: no (2 times)" in str(entry)


def test_places_are_paths_in_the_model():
    graph = traced(Model())
    linears = graph.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [place(n) for n in linears] == ["aten.linear.default in linear", "aten.linear.default in head"]
    linears[0].meta["nn_module_stack"] = {"x": ("_empty_nn_module_stack_from_metadata_hook", torch.nn.Module)}
    assert place(linears[0]) == "aten.linear.default"
