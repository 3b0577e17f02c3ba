"""Runs a graph over a calibration set, one node at a time for all samples, with one node's weights in memory.

The graph is a list of instructions over rows, so that a linear's inputs can be gathered for the whole set,
its weights replaced by quantized ones, and everything after it computed with those: every linear sees what
the quantized model gives it (true-sequential), and the set passes the model once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from ..passes.graph import Traced, evaluate
from .interpret import steps

CHUNK_ROWS = 1024  # rows evaluated together, whole samples each: bounds what an op needs besides its result

Values = list[Tensor]  # a node's value [1, T_i, width], in chunks of whole samples
# Called before a node runs; returns weights to use instead of the graph's own, by the placeholder's name.
Visit = Callable[[fx.Node], Mapping[str, Tensor]]


def no_visit(node: fx.Node) -> Mapping[str, Tensor]:
    return {}


class Walk:
    """A calibration set on its way through the graph.

    at: number of nodes done. values: what later nodes still need.
    """

    def __init__(self, traced: Traced, samples: Sequence[Sequence[int]]) -> None:
        self.traced = traced
        self.inputs = _chunks(samples)
        self.steps = steps(traced)
        self.result = traced.logits
        self.at = 0
        self.values: dict[fx.Node, Values] = {}

    @property
    def node(self) -> fx.Node:
        """The node that runs next."""
        return self.steps[self.at][0]

    @property
    def done(self) -> bool:
        """The logits themselves are nobody's input and not computed."""
        return self.at == len(self.steps)

    @property
    def at_boundary(self) -> bool:
        """Between decoder blocks, or their halves: the residual stream is all that later nodes need."""
        return len(self.values) == 1 and not self.done

    def advance(self, visit: Visit = no_visit) -> None:
        """Visit and run one node."""
        node, finished = self.steps[self.at]
        with torch.inference_mode():
            weights = dict(visit(node))
            if node is not self.result:
                for source in node.all_input_nodes:
                    lazy = self.traced.weights.get(source.name)
                    if lazy is not None and source.name not in weights:
                        weights[source.name] = lazy.load()
                self.values[node] = self._run(node, weights)
        for source in finished:
            self.values.pop(source, None)
        self.at += 1

    def _run(self, node: fx.Node, weights: Mapping[str, Tensor]) -> Values:
        def run_chunk(chunk: int) -> Tensor:
            def value(source: fx.Node) -> Tensor:
                if source.name in weights:
                    return weights[source.name]
                if source.op == "placeholder":
                    return self.inputs[chunk][source.name]
                return self.values[source][chunk]

            out: Tensor = evaluate(node.target, node.args, node.kwargs, value)
            return out

        return [run_chunk(chunk) for chunk in range(len(self.inputs))]

    def state(self) -> dict[str, Tensor]:
        """The values alive at a boundary, by a name that `restore` knows."""
        return {
            f"{node.name}.{i}": part for node, parts in self.values.items() for i, part in enumerate(parts)
        }

    def restore(self, at: int, state: Mapping[str, Tensor]) -> None:
        """Continue before node number ``at`` with the values of `state`."""
        self.at, self.values = at, {}
        nodes = {node.name: node for node, _ in self.steps}
        for name in sorted(state, key=lambda name: int(name.rpartition(".")[2])):  # files sort 10 before 2
            self.values.setdefault(nodes[name.rpartition(".")[0]], []).append(state[name])


def _chunks(samples: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
    """The graph's inputs for whole samples at a time: tokens, positions, slots [1, T] and rows [T]."""
    chunks: list[list[Sequence[int]]] = [[]]
    for sample in samples:
        if chunks[-1] and sum(map(len, chunks[-1])) + len(sample) > CHUNK_ROWS:
            chunks.append([])
        chunks[-1].append(sample)
    return [sample_inputs(chunk) for chunk in chunks]


def sample_inputs(samples: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The graph's inputs for whole samples: tokens, positions, slots [1, T] and rows [T], int64."""
    lengths = torch.tensor([len(s) for s in samples])
    return {
        "tokens": torch.tensor([i for s in samples for i in s])[None],
        "positions": torch.cat([torch.arange(n) for n in lengths])[None],
        "slots": torch.repeat_interleave(torch.arange(len(samples)), lengths)[None],
        "rows": torch.arange(int(lengths.sum())),
    }
