"""How a module's forward is called: which argument holds token ids, which positions, and where logits are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...passes.graph import EXAMPLE_ROWS
from ...runtime.errors import GristmillError

TOKENS, POSITIONS = "tokens", "positions"
POSITION_NAMES = ("positions", "position_ids", "pos", "pos_ids", "input_pos", "position")


@dataclass(frozen=True)
class Argument:
    """A tensor argument: ``role`` is TOKENS or POSITIONS; ``flat``: it is [T] and not [1, T]."""

    role: str
    flat: bool = False


@dataclass(frozen=True)
class Call:
    """Arguments of forward, in order and by name; each an Argument or a constant to be passed as it is."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]

    @property
    def roles(self) -> list[str]:
        return [a.role for a in (*self.positional, *self.named.values()) if isinstance(a, Argument)]

    def run(self, module: Callable[..., Any], tokens: Tensor, positions: Tensor | None) -> Tensor:
        """The logits of one sequence: tokens, positions [1, T]. Raises GristmillError for another result."""
        given: dict[str, Tensor | None] = {TOKENS: tokens, POSITIONS: positions}

        def value(argument: Any) -> Any:
            if not isinstance(argument, Argument):
                return argument
            tensor = given[argument.role]
            assert tensor is not None, "a call without positions was asked for them"
            return tensor[0] if argument.flat else tensor

        result = module(*map(value, self.positional), **{k: value(v) for k, v in self.named.items()})
        return logits_of(result, tokens.shape[1])


class Rows(nn.Module):
    """A module as a function of tokens and, where it takes them, positions [1, T]; result [1, T, V]."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self._call = model, call

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return self._call.run(self.model, tokens, positions)


def call_of(module: nn.Module, example: Any = None) -> Call:
    """From example arguments, else from the signature of forward. Raises GristmillError for neither."""
    if example is None:
        return _by_signature(module)
    positional: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    if isinstance(example, Mapping):
        named = dict(example)
    elif isinstance(example, (tuple, list)):
        positional = tuple(example)
    else:
        positional = (example,)
    call = Call(
        tuple(_argument(f"argument {n}", value) for n, value in enumerate(positional)),
        {name: _argument(name, value) for name, value in named.items()},
    )
    return _told_apart(call, (*positional, *named.values()))


def _argument(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point() or value.dtype == torch.bool or value.dim() not in (1, 2):
        raise GristmillError(
            f"example: {name} is a tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}, "
            "expected token ids or positions [1, T] of int64"
        )
    if value.dim() == 2 and value.shape[0] != 1:
        raise GristmillError(f"example: {name} has {value.shape[0]} sequences, expected one: [1, T]")
    return Argument(TOKENS, value.dim() == 1)


def _told_apart(call: Call, values: Sequence[Any]) -> Call:
    """The first tensor is the token ids; a second one, 0, 1, 2 ..., the positions."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    if not tensors or len(tensors) > 2:
        raise GristmillError(
            f"example has {len(tensors)} tensors, expected token ids and perhaps positions, each [1, T]"
        )
    if len(tensors) == 1:
        return call
    count = tensors[1].shape[-1]
    if tensors[1].flatten().tolist() != list(range(count)) or count != tensors[0].shape[-1]:
        raise GristmillError(
            "example: its second tensor does not hold the positions 0, 1, 2 ... of its first; forward may "
            "take token ids and positions"
        )
    seen: list[int] = []

    def role(argument: Any) -> Any:
        if not isinstance(argument, Argument):
            return argument
        seen.append(1)
        return Argument((TOKENS, POSITIONS)[len(seen) - 1], argument.flat)

    return Call(tuple(map(role, call.positional)), {k: role(v) for k, v in call.named.items()})


def _by_signature(module: nn.Module) -> Call:
    """forward(tokens, ...) or forward(tokens, positions, ...), all other parameters with defaults."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not plain:
        raise GristmillError(
            f"{type(module).__name__}.forward takes no token ids; expected forward(tokens) or "
            "forward(tokens, positions), or give example="
        )
    named = {p.name: Argument(POSITIONS) for p in plain[1:] if p.name in POSITION_NAMES}
    missing = [p.name for p in plain[1:] if p.default is p.empty and p.name not in named]
    if missing:
        raise GristmillError(
            f"{type(module).__name__}.forward needs {missing[0]!r}, which is neither token ids nor "
            "positions; give example= with its value"
        )
    return Call((Argument(TOKENS),), named)


def logits_of(result: Any, rows: Any) -> Tensor:
    """The logits in what forward returned: a tensor, the first of a tuple, or an entry ``logits``."""
    found = result
    if isinstance(result, Mapping):
        found = result.get("logits", result)
    elif not isinstance(result, Tensor) and hasattr(result, "logits"):
        found = result.logits
    elif isinstance(result, (tuple, list)) and result:
        found = result[0]
    if not isinstance(found, Tensor):
        raise GristmillError(
            f"forward returned {type(result).__name__}, expected logits [1, T, vocabulary], a tuple that "
            "begins with them, or an entry named logits"
        )
    if found.dim() == 2:
        found = found[None]
    if found.dim() != 3 or found.shape[0] != 1 or not found.is_floating_point():
        raise GristmillError(
            f"forward returned a tensor {_extents(found)}, expected float logits [1, T, vocabulary]"
        )
    if isinstance(found.shape[1], int) and isinstance(rows, int) and found.shape[1] != rows:
        raise GristmillError(
            f"forward returned logits of {found.shape[1]} rows for {rows} tokens, expected one for each token"
        )
    return found


def _extents(tensor: Tensor) -> list[Any]:
    return ["T" if not isinstance(n, int) else n for n in tensor.shape]


def example_inputs(call: Call) -> tuple[Tensor, ...]:
    """Tokens, and positions where they are taken, for tracing: [1, EXAMPLE_ROWS]."""
    tokens = torch.ones(1, EXAMPLE_ROWS, dtype=torch.long)
    positions = torch.arange(EXAMPLE_ROWS)[None]
    return (tokens, positions) if POSITIONS in call.roles else (tokens,)
