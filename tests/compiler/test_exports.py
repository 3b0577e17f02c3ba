"""Exports that are remembered: one for all models built alike, wherever they were read from."""

from typing import Any

from models import config_of

from gristmill.compiler import trace as tracing
from gristmill.compiler.exports import remembered


def test_models_built_alike_are_exported_once() -> None:
    exported: list[Any] = []

    def export(model: Any) -> tuple[Any, list[Any]]:
        exported.append(model)
        return tracing._export(model)

    once = remembered(export)
    graphs: list[Any] = []
    for changes in ({}, {}, {"rms_norm_eps": 1e-3}):
        config = config_of("llama", num_hidden_layers=1, **changes)
        config._name_or_path = f"/somewhere/{len(graphs)}"
        program, _ = once(tracing._build(config))
        graphs.append(program.graph_module.graph)
    assert len(exported) == 2
    graphs[0].erase_node(next(iter(graphs[0].find_nodes(op="output"))))
    assert len(graphs[1].find_nodes(op="output")) == 1, "each has a graph of its own"

    large = remembered(export, most_parameters=10)
    for _ in range(2):
        large(tracing._build(config_of("llama", num_hidden_layers=1)))
    assert len(exported) == 4, "a large model is not kept"
