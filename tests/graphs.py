"""Small traced graphs for tests of passes: modules of a few lines, exported as the tracer does it."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gristmill.compiler import interpret
from gristmill.passes import canonicalize
from gristmill.passes.graph import EXAMPLE_ROWS, Lazy, Traced
from gristmill.passes.rule import Report

VOCABULARY, WIDTH = 50, 24


class Rows(nn.Module):
    """Base of the test modules: ``self.rows(tokens)`` gives [1, T, WIDTH] rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)

    def rows(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


def traced(module: nn.Module) -> Traced:
    """``module(tokens, positions)`` exported over [1, T] rows; parameters and buffers become weights."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    rows = torch.export.Dim("T", min=2, max=1 << 20)
    example = (torch.ones(1, EXAMPLE_ROWS, dtype=torch.long), torch.arange(EXAMPLE_ROWS)[None])
    shapes = {"tokens": {1: rows}, "positions": {1: rows}}
    with torch.no_grad():
        exported = torch.export.export(module.eval(), example, dynamic_shapes=shapes, strict=False)
        program = exported.run_decompositions({})
    signature = program.graph_signature
    names = signature.inputs_to_parameters | signature.inputs_to_buffers
    names |= signature.inputs_to_lifted_tensor_constants
    held = {**program.constants, **program.state_dict}
    weights = {node: _constant(name, held[name]) for node, name in names.items()}
    return Traced(program.graph_module.graph, weights, None)


def canonical(module: nn.Module) -> Traced:
    """``traced`` after canonicalize, as the other passes meet it."""
    graph = traced(module)
    canonicalize.run(graph, Report())
    return graph


def _constant(name: str, value: Tensor) -> Lazy:
    value = value.detach().clone()
    return Lazy(tuple(value.shape), (name,), lambda: value)


def inputs() -> dict[str, Tensor]:
    """One sequence of EXAMPLE_ROWS tokens; logits of all rows."""
    tokens = torch.randint(0, VOCABULARY, (1, EXAMPLE_ROWS), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(EXAMPLE_ROWS)
    return {
        "tokens": tokens, "positions": positions[None], "slots": torch.zeros_like(tokens), "rows": positions,
    }  # fmt: skip


def apply(module: ModuleType, graph: Traced, tolerance: float = 1e-5) -> Report:
    """Run one pass; the graph's numbers must stay, within ``tolerance`` of the largest."""
    before = interpret.run(graph, inputs())
    report = Report()
    module.run(graph, report)
    after = interpret.run(graph, inputs())
    difference = float((after - before).abs().max() / before.abs().max())
    assert difference < tolerance, f"{module.__name__} changes the result by {difference:.1e}"
    return report


def ops(graph: Traced) -> dict[str, int]:
    """How many calls of each op the graph has, symbolic sizes aside."""
    calls = (n for n in graph.graph.nodes if n.op == "call_function")
    return dict(Counter(str(n.target) for n in calls if str(n.target) != "aten.sym_size.int"))


def only(graph: Traced, name: str) -> Any:
    """The one call of an op."""
    found = [n for n in graph.graph.nodes if n.op == "call_function" and str(n.target) == name]
    assert len(found) == 1, f"{len(found)} calls of {name}"
    return found[0]
