"""Runs a graph with plain torch, one weight in memory at a time: the float reference of gate and checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.ops import REFERENCES
from ..passes.graph import Traced, evaluate, is_op, ours


def run(traced: Traced, inputs: dict[str, Tensor]) -> Tensor:
    """The graph's output. ``inputs``: tokens, positions, slots [1, T] and rows [R], as far as it has them."""
    env: dict[fx.Node, Any] = {}
    with torch.inference_mode():
        for step in steps(traced):
            _execute(step, env, _leaves(traced, inputs))
    return env[traced.logits]


def run_with(traced: Traced, inputs: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """The same with these weights, by their placeholders' names, all in memory, and with gradients: the ops'
    references are called as they are."""
    env: dict[fx.Node, Any] = {}
    for step in steps(traced):
        _execute(step, env, {**weights, **inputs}.__getitem__, REFERENCES)
    out: Tensor = env[traced.logits]
    return out


def logits_by_group(traced: Traced, inputs: dict[str, Tensor], groups: Sequence[Tensor]) -> Iterator[Tensor]:
    """Like ``run`` for several ``rows`` in turn: the body runs once, what follows gather_rows once per group.

    groups: row numbers [R_i] each; yields [R_i, V].
    """
    ordered = steps(traced)
    cut = next(i for i, (node, _) in enumerate(ordered) if is_op(node, ours.gather_rows.default))
    env: dict[fx.Node, Any] = {}
    with torch.inference_mode():
        for step in ordered[:cut]:
            _execute(step, env, _leaves(traced, inputs))
        for rows in groups:
            tail = dict(env)
            for step in ordered[cut:]:
                _execute(step, tail, _leaves(traced, inputs | {"rows": rows}))
            yield tail[traced.logits][0]


Step = tuple[fx.Node, list[fx.Node]]


def steps(traced: Traced) -> list[Step]:
    """Calls in order, each with the values that nobody needs afterwards."""
    calls = [n for n in traced.graph.nodes if n.op == "call_function"]
    last: dict[fx.Node, fx.Node] = {}
    for node in calls:
        for source in node.all_input_nodes:
            last[source] = node
    kept = traced.logits
    return [(n, [s for s in n.all_input_nodes if last[s] is n and s is not kept]) for n in calls]


def _leaves(traced: Traced, inputs: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """A placeholder's value; weights are read whenever they are asked for."""

    def leaf(name: str) -> Tensor:
        lazy = traced.weights.get(name)
        return inputs[name] if lazy is None else lazy.load()

    return leaf


def _execute(
    step: Step,
    env: dict[fx.Node, Any],
    leaf: Callable[[str], Tensor],
    instead: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> None:
    """instead: what to call for some of the ops."""
    node, finished = step

    def value(source: fx.Node) -> Any:
        return env[source] if source.op != "placeholder" else leaf(source.name)

    env[node] = evaluate(instead.get(node.target, node.target), node.args, node.kwargs, value)
    for source in finished:
        env.pop(source, None)
