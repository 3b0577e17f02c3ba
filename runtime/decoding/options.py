"""What a caller may ask of a generation, checked before anything runs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from gristmill.runtime.errors import GristmillError

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class GenerationOptions:
    """temperature 0 is greedy; top_k 0, top_p 1 and repetition_penalty 1 are off. seed None draws a fresh
    one.

    Nothing is taken from the model's generation_config.json but the end-of-sequence ids; they end a text
    unless ignore_eos is set. lookup: propose tokens that followed the last few ones earlier in the text,
    which changes the speed and not the text; None: where a row's logits do not depend on the rows beside it.
    timeout_s: seconds from the call after which the text ends where it is.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    lookup: bool | None = None
    timeout_s: float | None = None

    @staticmethod
    def of(**values: Any) -> GenerationOptions:
        """Options from keywords. Raises GristmillError that names an unknown one and what is near it."""
        refuse_unknown(values, [field.name for field in fields(GenerationOptions)], "generate")
        stop = values.get("stop")
        values["stop"] = tuple(stop) if isinstance(stop, (list, tuple)) else () if stop is None else (stop,)
        options = GenerationOptions(**values)
        options._check()
        return options

    def _check(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        _number("temperature", self.temperature, 0.0, math.inf)
        if 0 < self.temperature < 1e-6:
            raise GristmillError(
                f"temperature is {self.temperature!r}, expected 0 (greedy) or a number from 0.000001"
            )
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf)
        if self.repetition_penalty == 0:
            raise GristmillError("repetition_penalty is 0, expected a number above 0 (1 is off)")
        if self.timeout_s is not None:
            _number("timeout_s", self.timeout_s, 0.0, math.inf)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise GristmillError(
                "stop holds something that is not text or is empty; expected one text or several"
            )


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises GristmillError for the first name of `given` that is not in `known`."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(known)}"
            raise GristmillError(f"{where} has no option {name!r}; {hint}")


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise GristmillError(f"{name} is {value!r}, expected an integer from {low} to {high}")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (low <= value <= high)
        or math.isinf(value)
    ):
        raise GristmillError(
            f"{name} is {value!r}, expected a number from {low:g}"
            + ("" if high == math.inf else f" to {high:g}")
        )
