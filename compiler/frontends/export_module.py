"""A module → its graph over rows, its weights left where they are.

What is exported is a copy whose parameters are allocated and never touched: the module itself stays in the
mode, type and place that it is in, and the graph is one of float32.
"""

from __future__ import annotations

import copy
import math
import traceback
import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ...passes.graph import Lazy, Traced, place
from ...runtime.errors import GristmillError
from ..trace import constant, first_line
from .forward import POSITIONS, TOKENS, Call, Rows, example_inputs
from .memory import MemoryCheckpoint

UNBOUNDED = 1 << 30  # positions: more than any model is asked for


def tracing_copy(module: nn.Module, name: str) -> nn.Module:
    """The module in eval mode with empty float32 parameters and its own buffers, in float32 on the CPU."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        kind = torch.float32 if parameter.is_floating_point() else parameter.dtype
        memo[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=kind), requires_grad=False)
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:  # a module may hold anything
        raise GristmillError(
            f"{name} cannot be copied for tracing ({first_line(error)}); keep what cannot be copied out of it"
        ) from error
    for part in copied.modules():
        for key, buffer in part._buffers.items():
            if buffer is not None:
                kind = torch.float32 if buffer.is_floating_point() else buffer.dtype
                part._buffers[key] = buffer.detach().to("cpu", kind)
    return copied.eval()


def export(module: nn.Module, call: Call, name: str) -> torch.export.ExportedProgram:
    """Export ``module``, a tracing copy, over [1, T] rows. Raises GristmillError that says what and where."""
    rows: Any = torch.export.Dim.DYNAMIC
    roles = (TOKENS, POSITIONS) if POSITIONS in call.roles else (TOKENS,)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                Rows(module, call),
                example_inputs(call),
                dynamic_shapes={r: {1: rows} for r in roles},
                strict=False,
            )
            program = exported.run_decompositions({})
    except GristmillError:
        raise
    except Exception as error:  # the exporter raises whatever the module's code raises
        raise GristmillError(f"{name} cannot be traced: {_reason(error)}{_where(error, module)}") from error
    for node in program.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise GristmillError(
                f"{name} cannot be traced: its shapes depend on the values of tensors (at {place(node)})"
            )
    written = sorted(program.graph_signature.buffers_to_mutate.values())
    if written:
        raise GristmillError(
            f"{name} writes into its buffer {written[0].removeprefix('model.')!r} while it runs (a KV "
            "cache?); give a forward without it: the cache is made by the compiler"
        )
    return program


def lift(
    program: torch.export.ExportedProgram, module: nn.Module, checkpoint: MemoryCheckpoint, config: Any
) -> Traced:
    """The exported graph with parameters as weights of the checkpoint; buffers are kept as they are."""
    graph, signature = program.graph_module.graph, program.graph_signature
    first = first_names(module)
    weights: dict[str, Lazy] = {}
    for node in graph.find_nodes(op="placeholder"):
        parameter = signature.inputs_to_parameters.get(node.name)
        if parameter is not None:
            name = parameter.removeprefix("model.")
            weights[node.name] = _stored(checkpoint, first.get(name, name))
        elif node.name in signature.inputs_to_buffers | signature.inputs_to_lifted_tensor_constants:
            weights[node.name] = constant(program, node)
    outputs = next(n for n in reversed(graph.nodes) if n.op == "output")
    outputs.args = ((outputs.args[0][0],),)
    return Traced(graph, weights, config, _most_rows(program, graph))


def first_names(module: nn.Module) -> dict[str, str]:
    """Name of a parameter → the first name of the same (tied) parameter."""
    seen: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: seen.setdefault(id(parameter), name) for name, parameter in named}


def _stored(checkpoint: MemoryCheckpoint, name: str) -> Lazy:
    return Lazy(checkpoint.shape(name), (name,), lambda: checkpoint.read(name), "checkpoint")


def _most_rows(program: torch.export.ExportedProgram, graph: fx.Graph) -> int | None:
    """How long a sequence the module itself takes: tables and assertions bound it."""
    tokens = next(n for n in graph.find_nodes(op="placeholder") if n.name == TOKENS)
    symbol = tokens.meta["val"].shape[1].node.expr
    bound: Any = program.range_constraints.get(symbol)
    if bound is None:
        return None
    try:
        upper = float(bound.upper)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(upper) if not math.isinf(upper) and upper < UNBOUNDED else None


def _reason(error: Exception) -> str:
    """What the exporter's error comes to, in a line."""
    text, kind = str(error), type(error).__name__
    if "DataDependent" in kind or "data-dependent" in text:
        return "its control flow or shapes depend on the values of tensors"
    if "specialized" in text or "Constraints violated" in text or "ConstraintViolation" in kind:
        return "its code fixes the number of tokens; take it from tokens.shape, never as a number"
    return first_line(error)


def _where(error: BaseException, module: nn.Module) -> str:
    """Place in the model and line of code of an error, as far as its traceback knows them."""
    names = {id(part): name for name, part in module.named_modules()}
    part, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in names:
            part = names[id(owner)] or part
            if frame.f_code.co_name != "_call_impl" and "/torch/" not in frame.f_code.co_filename:
                line = f"{frame.f_code.co_filename.rpartition('/')[2]}:{number}"
    told = ", ".join(text for text in (part, line) if text)
    return f" (at {told})" if told else ""
