"""One export for all compiles of a process whose models are built alike: most of a small compile is that."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

MOST_PARAMETERS = 1 << 24  # of a model whose memory may stay allocated, unless told otherwise
Export = Callable[[Any], tuple[Any, Any]]


def remembered(export: Export, most_parameters: int = MOST_PARAMETERS) -> Export:
    """An `export` as trace.py has it that exports no model twice. Passes change graphs, so each caller gets
    its own. The parameters of a model stay allocated with it, though nothing ever touched them."""
    known: dict[str, tuple[Any, Any]] = {}

    def once(model: Any) -> tuple[Any, Any]:
        if sum(parameter.numel() for parameter in model.parameters()) > most_parameters:
            return export(model)
        key = _all_that_exports_read(model)
        if key not in known:
            known[key] = export(model)
        program, masks = known[key]
        return _with_own_graph(program), list(masks)

    return once


def _all_that_exports_read(model: Any) -> str:
    """The class, the config, and what may have been changed since the model was built from them."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # where it was read from
    parts = [type(model).__qualname__, json.dumps(config, sort_keys=True)]
    parts += [f"{name} {buffer.tolist()}" for name, buffer in model.named_buffers()]
    for module in model.modules():
        if hasattr(module, "rope_type"):
            parts.append(f"{module.rope_type} {getattr(module, 'attention_scaling', None)}")
    return "\n".join(parts)


def _with_own_graph(program: Any) -> Any:
    graph = copy.deepcopy(program.graph_module.graph)
    return SimpleNamespace(
        graph_module=SimpleNamespace(graph=graph), graph_signature=program.graph_signature,
        state_dict=program.state_dict, constants=program.constants,
    )  # fmt: skip
