"""A TorchScript file as a source: torch's own converter makes a graph of it, which is traced as a module.

torch.jit.load runs no Python of the file's, only TorchScript. The converter is a private part of torch that
may go: where it is missing, or cannot convert something, the file is refused with what it was.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ...kernels import ops as _ops  # noqa: F401  (files may call gristmill's attention)
from ...runtime.errors import GristmillError
from ..trace import first_line
from .forward import Call, call_of, example_inputs
from .module import ModuleSource, graph_source

CONVERTER = "torch._export.converter"


def script_file(path: Path, example: Any = None, tokenizer: Any = None) -> ModuleSource:
    """Open a .pt file. Raises GristmillError for one that is not TorchScript, or cannot be converted."""
    if not path.is_file():
        raise GristmillError(f"{path}: no such file; expected a TorchScript file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:  # whatever damaged bytes lead the reader to
        raise GristmillError(
            f"{path}: not a TorchScript file ({first_line(error)[:120]}); expected what torch.jit.save "
            "wrote, or give the module itself to gristmill.compile"
        ) from error
    return script_source(module, path.name, example, tokenizer)


def script_source(module: Any, name: str, example: Any = None, tokenizer: Any = None) -> ModuleSource:
    """Convert a scripted or traced module. Raises GristmillError that names what cannot be converted."""
    module.eval()
    call = call_of(module, example) if example is not None else _call_of_schema(module, name)
    converted = _converted(module, name, call)
    return graph_source(converted, call, name, tokenizer, eager=module)


def _call_of_schema(module: Any, name: str) -> Call:
    """By the types of forward's arguments: the first tensor is token ids, a second one positions."""
    arguments = module.forward.schema.arguments[1:]
    tensors = [a for a in arguments if str(a.type) == "Tensor"]
    others = [a for a in arguments if str(a.type) != "Tensor" and not a.has_default_value()]
    if len(tensors) not in (1, 2) or others:
        asked = ", ".join(f"{a.name}: {a.type}" for a in arguments)
        raise GristmillError(
            f"{name}: forward({asked}) is not forward(tokens) or forward(tokens, positions); give example="
        )
    tokens, positions = (torch.zeros(1, 2, dtype=torch.long), torch.arange(2)[None])
    return call_of(module, (tokens, positions)[: len(tensors)])


def _converted(module: Any, name: str, call: Call) -> nn.Module:
    """The file's graph as a torch.fx module; its parameters under their own names."""
    try:
        from torch._export.converter import TS2EPConverter
    except ImportError as error:
        raise GristmillError(
            f"{name}: this torch {torch.__version__} has no {CONVERTER}, which reads TorchScript; give the "
            "module itself to gristmill.compile"
        ) from error
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return _convert(TS2EPConverter, module, call)
    except GristmillError:
        raise
    except Exception as error:  # the converter raises whatever it stumbles over
        raise GristmillError(f"{name}: torch cannot convert this TorchScript: {_reason(error)}") from error


class _Kept(Exception):
    """The converter's graph, before it would trace it with sizes of its own choice."""


def _convert(converter_type: Any, module: Any, call: Call) -> nn.Module:
    """The converter goes on to trace what it made; that is done here, with the number of tokens left open."""

    class Converter(converter_type):
        def retrace_as_exported_program(self, gm: Any, name_to_constant: Any) -> Any:
            raise _Kept(gm)

    tokens = example_inputs(call)
    given = [tokens[0][0] if call.positional[0].flat else tokens[0]]
    given += [t[0] if a.flat else t for a, t in zip(call.positional[1:], tokens[1:])]
    converter = Converter(module, tuple(given), None)
    buffers = {n: t for n, t in converter.name_to_buffer.items() if n not in converter.name_to_param}
    converter.name_to_param, converter.name_to_buffer = _tied(converter.name_to_param), buffers
    try:
        converter.convert()
    except _Kept as kept:
        graph: fx.GraphModule = kept.args[0]
        return graph
    raise AssertionError("the converter did not come to its graph")


def _tied(tensors: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """Parameters by name, one for all names of the same memory."""
    known: dict[Any, nn.Parameter] = {}
    found = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        found[name] = known.setdefault(key, nn.Parameter(tensor.detach(), requires_grad=False))
    return found


def _reason(error: Exception) -> str:
    """The operator that failed, and why: the causes carry it."""
    lines: list[str] = []
    current: BaseException | None = error
    while current is not None:
        line = first_line(current).removeprefix("TS2EPConverter failed for node ")
        if line not in lines:
            lines.append(line)
        current = current.__cause__
    return ": ".join(lines)[:300]
