"""Parts of a graph that are rows in, rows out, as programs of the C++ executor.

A region is an op with everything before it that nobody else needs: one result, some inputs. Its inputs enter
the program as f32 tables that are looked up by position; they lie in the program's weights file, in memory
that both sides map, so that a call copies rows and nothing else. More rows than a program holds go through it
in turn, for every row is its own.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ...passes.graph import Lazy, Traced, is_op, ours, shape
from ...quant.scheme import Scheme
from ...runtime.program import Limits
from ...runtime.weights_file import TensorSpec, WeightsWriter, layout
from ..emit import write_weights
from ..lower import Lowered, lower
from ..memory import plan_arena
from ..options import CacheFormat

ROWS = 256  # of one forward
ROW_WISE = (ours.linear.default, ours.rms_norm.default, ours.layer_norm.default, ours.pointwise.default)
NUMBERS = itertools.count()  # for what equals nothing else
INPUT = "input_"  # names of the tables that inputs are


@dataclass(frozen=True)
class Region:
    """nodes in order, the last one its result; inputs [..., W] f32, all with the result's leading extents."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]

    @property
    def result(self) -> fx.Node:
        return self.nodes[-1]

    def key(self, traced: Traced) -> tuple[Any, ...]:
        """Equal for regions that compute the same of their inputs with the same stored weights."""
        number = {n: ("input", i, shape(n)[-1]) for i, n in enumerate(self.inputs)}
        number |= {n: ("node", i, shape(n)[-1]) for i, n in enumerate(self.nodes)}

        def named(node: fx.Node) -> Any:
            if node in number:
                return number[node]
            lazy = traced.weights[node.name]
            as_stored = lazy.origin in ("checkpoint", "transposed")
            return ("weight", lazy.origin, lazy.names) if as_stored else ("computed", next(NUMBERS))

        return tuple((str(n.target), str(fx.map_arg(n.args, named)), str(n.kwargs)) for n in self.nodes)


def regions(traced: Traced) -> list[Region]:
    """The regions of a graph that have a product or a norm, disjoint, in the order of their results."""
    taken: set[fx.Node] = set()
    found = []
    for node in reversed(list(traced.graph.nodes)):
        if node in taken or not _is_eligible(traced, node):
            continue
        inside = _cone(traced, node, taken)
        taken |= inside
        if any(not is_op(n, ours.pointwise.default) for n in inside):
            found.append(_region(traced, inside))
    return found[::-1]


def _cone(traced: Traced, result: fx.Node, taken: set[fx.Node]) -> set[fx.Node]:
    """``result`` and all before it whose every use is inside."""
    inside, stack = {result}, [result]
    while stack:
        for source in stack.pop().all_input_nodes:
            fits = source not in inside | taken and _is_eligible(traced, source)
            if fits and shape(source)[:-1] == shape(result)[:-1] and set(source.users) <= inside:
                inside.add(source)
                stack.append(source)
    return inside


def _region(traced: Traced, inside: set[fx.Node]) -> Region:
    nodes = tuple(n for n in traced.graph.nodes if n in inside)
    sources = dict.fromkeys(s for n in nodes for s in n.all_input_nodes)
    return Region(nodes, tuple(s for s in sources if s not in inside and traced.weight(s) is None))


def _is_eligible(traced: Traced, node: fx.Node) -> bool:
    """One of our ops over rows of f32, all operands with the same leading extents."""
    if not is_op(node, *ROW_WISE):
        return False
    values = [node, *(s for s in node.all_input_nodes if traced.weight(s) is None)]
    return all(
        isinstance(v.meta["val"], Tensor) and v.meta["val"].dtype == torch.float32
        and len(shape(v)) > 1 and shape(v)[:-1] == shape(node)[:-1]
        for v in values
    )  # fmt: skip


class Kernel:
    """A region as a program over weights of a scheme, run by the C++ executor."""

    def __init__(
        self, traced: Traced, region: Region, scheme: Scheme, float_activations: bool, threads: int
    ) -> None:
        from gristmill.runtime.cpu import _native

        graph, count = _program_graph(traced, region)
        limits = Limits(ROWS, 1, ROWS, ROWS)

        def assign(role: str, name: str) -> Scheme:
            return Scheme("f32") if role == "embedding" else scheme

        lowered = lower(graph, assign, CacheFormat("f32", "f32"), limits, float_activations)
        plan_arena(lowered.program)
        descriptor = os.memfd_create("gristmill-region")
        try:
            self._tables = _mapped(descriptor, lowered, count)
            self._executor = _native.Executor(
                lowered.program.to_bytes(),
                f"/proc/self/fd/{descriptor}",
                threads=threads,
                max_len=ROWS,
                max_slots=1,
            )
        finally:
            os.close(descriptor)
        self.instructions = len(lowered.program.instructions) - 2 * count

    def __call__(self, inputs: Iterable[Tensor]) -> Tensor:
        """inputs: [..., W_i] f32 on the CPU -> [..., V]."""
        given = [t.detach() for t in inputs]
        rows = [t.reshape(-1, t.shape[-1]).numpy() for t in given]
        out = np.empty((len(rows[0]), self._executor.vocabulary), np.float32)
        for first in range(0, len(out), ROWS):
            count = min(ROWS, len(out) - first)
            for table, values in zip(self._tables, rows, strict=True):
                table[:count] = values[first : first + count]
            numbers, zeros = np.arange(count, dtype=np.int32), np.zeros(count, np.int32)
            out[first : first + count] = self._executor.forward(zeros, numbers, zeros, numbers)
        return torch.from_numpy(out).reshape(*given[0].shape[:-1], -1)


def _program_graph(traced: Traced, region: Region) -> tuple[Traced, int]:
    """The region by itself: inputs are embeddings of positions, the last op takes the rows asked for."""
    graph = fx.Graph()
    own = Traced(graph, {}, None)
    known: dict[fx.Node, fx.Node] = {}
    positions = graph.placeholder("positions")
    rows = graph.placeholder("rows")
    for number, source in enumerate(region.inputs):
        name = f"{INPUT}{number}"
        extent = (ROWS, shape(source)[-1])
        own.weights[name] = Lazy(extent, (name,), partial(torch.zeros, extent), "constant")
        known[source] = _call(graph, source, ours.embedding.default, (positions, graph.placeholder(name)))
    for node in region.nodes:
        for source in node.all_input_nodes:
            if source not in known:
                known[source] = graph.placeholder(source.name)
                own.weights[source.name] = traced.weights[source.name]
        if node is region.result:
            inner = [s for s in node.all_input_nodes if traced.weight(s) is None]
            for source in inner:
                known[source] = _call(graph, source, ours.gather_rows.default, (known[source], rows))
        known[node] = _call(graph, node, node.target, fx.map_arg(node.args, known.__getitem__))
    graph.output((known[region.result],))
    return own, len(region.inputs)


def _call(graph: fx.Graph, like: fx.Node, target: Any, args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    return node


class _File:
    """What emit.py writes into: a file that is not an artifact's."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.specs: list[TensorSpec] = []
        self.header_bytes = 0

    def declare_weights(self, specs: Iterable[TensorSpec], metadata: Any = None) -> WeightsWriter:
        os.ftruncate(self.descriptor, 0)
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        self.specs = list(specs)
        writer = WeightsWriter(os.fdopen(os.dup(self.descriptor), "wb", buffering=0), self.specs)
        self.header_bytes = writer.size_bytes
        return writer


def _mapped(descriptor: int, lowered: Lowered, count: int) -> list[np.ndarray]:
    """Writes the weights file; returns its tables of inputs [ROWS, W], which may be written to."""
    file = _File(descriptor)
    nothing: Callable[[str, float], None] = lambda stage, fraction: None  # noqa: E731
    write_weights(file, lowered, {}, nothing)  # type: ignore[arg-type]
    shared = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    placed = {spec.name: (spec, file.header_bytes + offset) for spec, offset in layout(file.specs)}
    tables = []
    for number in range(count):
        spec, offset = next(placed[n] for n in placed if n.removesuffix(".weight") == f"{INPUT}{number}")
        flat = np.frombuffer(shared, np.float32, math.prod(spec.shape), offset)
        tables.append(flat.reshape(spec.shape))
    return tables
