"""torch.compile(model, backend="gristmill"), a preview: inference in float32 on the CPU.

What Dynamo hands over is exported once per shape, rewritten by the passes of a compile, and cut into regions
(see regions.py) that the C++ executor runs; everything between them, attention included, is left to torch.
Whatever is not inference in float32 on the CPU is run as it came. The logger "gristmill" says at level INFO
what was lowered, and why something was not.

torch finds the backend by an entry point of the package; `register` is for where that is not installed.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import list_backends, register_backend

from ...passes import canonicalize, fuse_epilogue, fuse_glu, fuse_norm, fuse_pointwise, merge_linears
from ...passes.graph import Lazy, Traced, evaluate
from ...passes.rule import Report
from ...quant.scheme import FORMATS, parse
from ...runtime.errors import GristmillError
from ..options import CompileOptions
from ..trace import first_line, held_tensor
from .regions import Kernel, Region, regions

NAME = "gristmill"
OPTIONS = ("weights", "group_size", "asymmetric", "activations")
PASSES: tuple[ModuleType, ...] = (
    canonicalize, fuse_norm, fuse_glu, fuse_epilogue, merge_linears, fuse_pointwise,
)  # fmt: skip
MOST_SHAPES = 16  # plans that are kept of one graph
log = logging.getLogger("gristmill")


def backend(
    module: fx.GraphModule, examples: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A Dynamo backend. options: weights ("f32", exact, unless given; else any format of a compile),
    group_size, asymmetric, activations ("int8" or "f32", for integer weights), threads. Raises GristmillError
    for others."""
    return Compiled(module, dict(options or {}))


class Compiled:
    """A graph of Dynamo's: planned for each shape when it first comes, run as it is where it cannot be."""

    def __init__(self, module: fx.GraphModule, options: dict[str, Any]) -> None:
        self.threads = _threads(options.pop("threads", 0))
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise GristmillError(
                f"torch.compile backend gristmill: unknown option {unknown[0]!r}, expected one of "
                f"{', '.join((*OPTIONS, 'threads'))}"
            )
        chosen = CompileOptions.of(**{"weights": "f32", **options})
        numbers = FORMATS[chosen.linear_format]
        self.scheme = parse(chosen.linear_format, chosen.group(numbers), not chosen.asymmetric)
        self.float_activations = chosen.activations == "f32"
        self.module = module
        self.plans: dict[Any, Plan | None] = {}
        self.kernels: dict[Any, Kernel] = {}
        self.stamps: tuple[Any, ...] = ()

    def __call__(self, *given: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in given):
            return self.module(*given)
        stamps = tuple(_stamp(a) for a in given if isinstance(a, nn.Parameter))
        if stamps != self.stamps:  # the weights are others: everything that was made of them is void
            self.plans, self.kernels, self.stamps = {}, {}, stamps
        key = tuple(_shape(a) for a in given)
        if key not in self.plans:
            if len(self.plans) == MOST_SHAPES:
                del self.plans[next(iter(self.plans))]
            self.plans[key] = self._plan(given)
        plan = self.plans[key]
        return self.module(*given) if plan is None else plan(given)

    def _plan(self, given: Sequence[Any]) -> Plan | None:
        reason = _why_not(given)
        if reason is None:
            try:
                return Plan(self, given)
            except _LeftToTorch as left:
                reason = str(left)
        log.info("a graph of %d nodes is left to torch: %s", len(self.module.graph.nodes), reason)
        return None

    def kernel(self, traced: Traced, region: Region) -> Kernel:
        """The region's program; regions of other shapes that compute the same share it."""
        key = region.key(traced)
        if key not in self.kernels:
            self.kernels[key] = Kernel(traced, region, self.scheme, self.float_activations, self.threads)
        return self.kernels[key]


class _LeftToTorch(Exception):
    """Why a graph is run as Dynamo gave it."""


class Plan:
    """A graph for inputs of one shape: calls of torch and of kernels in order."""

    def __init__(self, compiled: Compiled, given: Sequence[Any]) -> None:
        program = _exported(compiled.module, given)
        self.traced, self.leaves = _traced(program, given)
        for module in PASSES:
            module.run(self.traced, Report())
        found = regions(self.traced)
        self.kernels = {r.result: (compiled.kernel(self.traced, r), r.inputs) for r in found}
        inside = {node for r in found for node in r.nodes[:-1]}
        self.order = [n for n in self.traced.graph.nodes if n.op != "placeholder" and n not in inside]
        self.last = _last_uses(self.order, self.kernels)
        self.spec = program.call_spec.out_spec
        count = sum(kernel.instructions for kernel, _ in self.kernels.values())
        log.info(
            "a graph is %d regions of %d instructions, and %d calls of torch", len(found), count,
            len(self.order) - 1 - len(found),
        )  # fmt: skip

    def __call__(self, given: Sequence[Any]) -> Any:
        env: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            if node.op != "placeholder":
                return env[node]
            lazy = self.traced.weights.get(node.name)
            return lazy.load() if lazy is not None else self.leaves[node.name](given)

        with torch.no_grad():
            for node in self.order:
                if node.op == "output":
                    results = fx.map_arg(node.args[0], value)
                elif node in self.kernels:
                    kernel, inputs = self.kernels[node]
                    env[node] = kernel(map(value, inputs))
                else:
                    env[node] = evaluate(node.target, node.args, node.kwargs, value)
                for source in self.last.get(node, ()):
                    env.pop(source, None)
        return torch.utils._pytree.tree_unflatten(list(results), self.spec)


def _threads(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < 4096:
        raise GristmillError(
            f"torch.compile backend gristmill: threads is {given!r}, expected a number, 0: all cores"
        )
    return given


def _stamp(parameter: nn.Parameter) -> tuple[int, int]:
    """Changes when the parameter is written to, or is another one."""
    return parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version


def _shape(given: Any) -> Any:
    return (tuple(given.shape), given.dtype, given.stride()) if isinstance(given, Tensor) else given


def _why_not(given: Sequence[Any]) -> str | None:
    for value in given:
        if not isinstance(value, Tensor):
            continue
        if value.device.type != "cpu":
            return f"it has a tensor on {value.device}, expected the CPU"
        if value.is_floating_point() and value.dtype != torch.float32:
            return f"it has a tensor of {str(value.dtype).removeprefix('torch.')}, expected float32"
    return None


class _Function(nn.Module):
    """Dynamo's graph as export wants it, without switches of the gradient mode: there are no gradients."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        graph = fx.Graph()
        output = graph.graph_copy(module.graph, {})
        graph.output(output)
        for node in reversed(graph.nodes):
            if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
                graph.erase_node(node)
        self.graph = fx.GraphModule(module, graph)

    def forward(self, *given: Any) -> Any:
        return self.graph(*given)


def _exported(module: fx.GraphModule, given: Sequence[Any]) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(_Function(module), tuple(given), strict=False).run_decompositions(
                {}
            )
    except Exception as error:  # the exporter raises whatever the graph's calls raise
        raise _LeftToTorch(f"it cannot be exported ({first_line(error)})") from error
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise _LeftToTorch("it writes into its inputs")
    return program


def _traced(
    program: torch.export.ExportedProgram, given: Sequence[Any]
) -> tuple[Traced, dict[str, Callable[[Sequence[Any]], Any]]]:
    """The graph with parameters as weights, and how the other inputs are taken from a call's."""
    graph, signature = program.graph_module.graph, program.graph_signature
    specs = [s for s in signature.input_specs if s.kind == torch.export.graph_signature.InputKind.USER_INPUT]
    numbers = {spec.arg.name: number for number, spec in enumerate(specs)}
    weights: dict[str, Lazy] = {}
    leaves: dict[str, Callable[[Sequence[Any]], Any]] = {}
    for node in graph.find_nodes(op="placeholder"):
        if node.name in numbers:
            number = numbers[node.name]
            if isinstance(given[number], nn.Parameter):
                weights[node.name] = _weight(f"parameter_{number}", given[number].detach())
            else:
                leaves[node.name] = operator.itemgetter(number)
            continue
        name = next(
            kind[node.name]
            for kind in (
                signature.inputs_to_parameters, signature.inputs_to_buffers,
                signature.inputs_to_lifted_tensor_constants,
            )
            if node.name in kind
        )  # fmt: skip
        weights[node.name] = _weight(name, held_tensor(program, name))
    return Traced(graph, weights, None), leaves


def _weight(name: str, tensor: Tensor) -> Lazy:
    return Lazy(tuple(tensor.shape), (name,), lambda: tensor, "checkpoint")


def _last_uses(order: Sequence[fx.Node], kernels: Mapping[fx.Node, Any]) -> dict[fx.Node, list[fx.Node]]:
    """What nobody needs any more, by the call after which that is so."""
    last: dict[fx.Node, fx.Node] = {}
    for node in order:
        for source in kernels[node][1] if node in kernels else node.all_input_nodes:
            last[source] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        if node.op != "output":
            found.setdefault(node, []).append(source)
    return found


def register() -> None:
    """Makes the name known to torch.compile where the package's entry points are not installed."""
    if NAME not in list_backends(exclude_tags=()):
        register_backend(backend, name=NAME)
