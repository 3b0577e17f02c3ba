"""What a caller may ask of a generation, checked before anything runs."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gristmill.runtime.errors import GristmillError

MAX_SEED = 2**64 - 1
MAX_INTEGER = 2**31 - 1
MAX_SAMPLES = 4096
MAX_LOGPROBS = 20
MAX_BIAS = 1e6  # far beyond any logit, far from an overflow


@dataclass(frozen=True)
class GenerationOptions:
    """What to choose, how often, and where to end. Whatever a default leaves off is off.

    Drawing, where temperature is above 0 (0 is greedy): top_k (0 off), top_p (1 off), min_p (0 off) and
    typical_p (1 off), each of what the one before left, as in transformers; seed None draws a fresh one; n
    samples of one prompt, which are equal at temperature 0.

    Penalties: repetition_penalty (1 off) is for the tokens of prompt and text, as in transformers;
    presence_penalty and frequency_penalty (0 off, from -2 to 2) are for tokens of the new text alone, as
    OpenAI and vLLM define them: logit - presence - frequency * count. no_repeat_ngram: no n tokens in a row
    come twice, the prompt included. logit_bias: token id to what is added to its logit, -inf forbids it; kept
    as pairs in the order of ids.

    Ends: max_new_tokens, stop strings, the model's end-of-sequence ids unless ignore_eos is set, and
    stop_ids. Before min_new_tokens no ending id is chosen (a stop string ends a text all the same). Nothing
    else is taken from the model's generation_config.json.

    logprobs: None, or with each token its log-probability and those of that many of the most likely ones.

    Constraints, one at most, by the package llguidance: regex (of the whole new text), choices (texts, one of
    which it is), schema (JSON Schema as text or as an object; kept as text).

    Pace: lookup proposes tokens that followed the last few ones earlier in the text, which changes the speed
    and not the text; None: where a row's logits do not depend on the rows beside it. timeout_s: seconds from
    the call after which the text ends where it is.

    adapter: the name of the session's adapter that changes the model for this text, None: none does.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    regex: str | None = None
    choices: tuple[str, ...] = ()
    schema: str | None = None
    lookup: bool | None = None
    timeout_s: float | None = None
    logprobs: int | None = None
    adapter: str | None = None

    @staticmethod
    def of(**values: Any) -> GenerationOptions:
        """Options from keywords. stop and stop_ids: one or several; logit_bias: a mapping. Raises
        GristmillError that names an unknown one and what is near it."""
        refuse_unknown(values, [field.name for field in fields(GenerationOptions)], "generate")
        for name in ("stop", "stop_ids", "choices"):
            values[name] = _several(values.get(name))
        if isinstance(values.get("schema"), Mapping):
            values["schema"] = json.dumps(values["schema"], default=repr)
        values["logit_bias"] = _pairs(values.get("logit_bias"))
        options = GenerationOptions(**values)
        options._check()
        return options

    def _check(self) -> None:
        self._check_lengths()
        self._check_draws()
        self._check_penalties()
        self._check_constraints()
        if self.timeout_s is not None:
            check_number("timeout_s", self.timeout_s, 0.0, math.inf)
        if self.logprobs is not None:
            check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.adapter, (str, type(None))):
            raise GristmillError(f"adapter is {self.adapter!r}, expected the name of one that is loaded")

    @property
    def constraint(self) -> tuple[str, Any] | None:
        """The kind of constraint, and what it says."""
        given = (("regex", self.regex), ("choices", self.choices or None), ("schema", self.schema))
        return next(((kind, what) for kind, what in given if what is not None), None)

    def _check_constraints(self) -> None:
        for name in ("regex", "schema"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise GristmillError(f"{name} is {type(getattr(self, name)).__name__}, expected text")
        if (self.regex is not None) + bool(self.choices) + (self.schema is not None) > 1:
            raise GristmillError("regex, choices and schema exclude each other; give one of them")

    def _check_lengths(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens, 1, MAX_INTEGER)
        check_integer("min_new_tokens", self.min_new_tokens, 0, MAX_INTEGER)
        if self.min_new_tokens > self.max_new_tokens:
            raise GristmillError(
                f"min_new_tokens is {self.min_new_tokens}, expected at most max_new_tokens, "
                f"{self.max_new_tokens}"
            )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise GristmillError(
                "stop holds something that is not text or is empty; expected one text or several"
            )
        for token in self.stop_ids:
            check_integer("a token id in stop_ids", token, 0, MAX_INTEGER)

    def _check_draws(self) -> None:
        check_number("temperature", self.temperature, 0.0, math.inf)
        if 0 < self.temperature < 1e-6:
            raise GristmillError(
                f"temperature is {self.temperature!r}, expected 0 (greedy) or a number from 0.000001"
            )
        check_integer("top_k", self.top_k, 0, MAX_INTEGER)
        for name in ("top_p", "min_p", "typical_p"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        if self.typical_p == 0:
            raise GristmillError("typical_p is 0, expected a number above 0 (1 is off)")
        if self.seed is not None:
            check_integer("seed", self.seed, 0, MAX_SEED)
        check_integer("n", self.n, 1, MAX_SAMPLES)

    def _check_penalties(self) -> None:
        check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf)
        if self.repetition_penalty == 0:
            raise GristmillError("repetition_penalty is 0, expected a number above 0 (1 is off)")
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_integer("no_repeat_ngram", self.no_repeat_ngram, 0, MAX_INTEGER)
        for token, bias in self.logit_bias:
            check_integer("a token id in logit_bias", token, 0, MAX_INTEGER)
            if bias != -math.inf:
                check_number(f"logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS, " or -inf")


def _several(value: Any) -> tuple[Any, ...]:
    """One thing, several or none as a tuple."""
    return tuple(value) if isinstance(value, (list, tuple)) else () if value is None else (value,)


def _pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    """A mapping, or pairs, in the order of token ids; what is no id comes first and is refused later."""
    if isinstance(bias, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in bias):
        bias = dict(bias)
    if bias is not None and not isinstance(bias, Mapping):
        raise GristmillError(
            f"logit_bias is {type(bias).__name__}, expected a mapping of token ids to numbers, as {{50: -5}}"
        )
    return tuple(sorted((bias or {}).items(), key=lambda pair: pair[0] if isinstance(pair[0], int) else -1))


def refuse_unknown(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises GristmillError for the first name of `given` that is not in `known`."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(known)}"
            raise GristmillError(f"{where} has no option {name!r}; {hint}")


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    """Raises GristmillError for what is no integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise GristmillError(f"{name} is {value!r}, expected an integer from {low} to {high}")


def check_number(name: str, value: Any, low: float, high: float, also: str = "") -> None:
    """Raises GristmillError for what is no finite number from `low` to `high`; also: ends what it says."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not (low <= value <= high)
        or math.isinf(value)
    ):
        raise GristmillError(
            f"{name} is {value!r}, expected a number from {low:g}"
            + ("" if high == math.inf else f" to {high:g}")
            + also
        )
