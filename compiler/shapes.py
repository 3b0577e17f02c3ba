"""A program from a config alone: the model's shapes are known before any weight of it is.

The same trace, passes and lowering as a compile, over a checkpoint that has names and shapes only. What is
asked of weights while tracing is never more than that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..passes.graph import Traced
from ..runtime.errors import GristmillError
from ..runtime.program import Limits
from .checkpoint import Checkpoint
from .formats import Formats
from .load import load_config
from .lower import Lowered, lower
from .memory import plan_arena
from .names import NO_EXPERTS
from .options import CompileOptions
from .pipeline import narrow, plan_limits, rewrite
from .trace import trace


class ShapesOnly(Checkpoint):
    """A checkpoint of names and shapes; vectors, which are norms and biases, read as ones."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    @staticmethod
    def of(config: Any) -> ShapesOnly:
        """The parameters of the model that transformers makes of its config, a tied one once."""
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # it writes into configs
        except Exception as error:  # any part of a model's construction may refuse its configuration
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise GristmillError(f"the model cannot be built from its config ({reason})") from error
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        if any(".experts." in name for name in shapes):
            raise GristmillError(NO_EXPERTS)
        return ShapesOnly(shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        assert len(shape) == 1, f"a pass asked for the values of {name}, of which there are none"
        return torch.ones(shape)

    def same(self, first: str, second: str) -> bool:
        return self._shapes[first] == self._shapes[second]


@dataclass(frozen=True)
class Shape:
    """A model without weights, traced once for all formats: its transformers config, and its graph."""

    config: Any
    traced: Traced

    @staticmethod
    def of(directory: Path) -> Shape:
        """From a directory's config.json. Raises GristmillError as a compile does."""
        config = load_config(directory)
        options = CompileOptions.of()
        traced = trace(config, ShapesOnly.of(config), plan_limits(config, options).max_len)
        rewrite(traced, options)
        return Shape(config, traced)

    def limits(self, options: CompileOptions) -> Limits:
        """Shapes of the program as a compile with these options has them."""
        return narrow(plan_limits(self.config, options), self.traced)

    def lowered(self, options: CompileOptions) -> Lowered:
        """The program, its memory planned, and what its matrices and vectors are."""
        floats = options.activations == "f32"
        limits = self.limits(options)
        made = lower(self.traced, Formats.of(options).scheme, options.cache_format, limits, floats)
        plan_arena(made.program)
        return made
