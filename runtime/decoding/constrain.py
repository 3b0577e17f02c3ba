"""Texts that match a regex, are one of some choices, or are JSON of a schema: a mask over the next token.

llguidance (optional) follows the grammar byte by byte and says which tokens of the vocabulary can come next.
A mask is kept until the next token, and `prepare` has a thread compute it while the model runs.

Regexes are those of Rust: no look-around, no references back; \\d is [0-9], as a date or a number means it,
\\w and \\s know all of Unicode. JSON is written in one line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.runtime.errors import GristmillError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from llguidance import LLMatcher
    from llguidance._lib import JsonCompileOptions

KINDS = ("regex", "choices", "schema")
# Where any whitespace may stand, a model that likes it never gets to the end: here one space after a
# separator at most.
LAYOUT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
INSTALL = "pip install 'gristmill[constrain]'"


class Constrainer:
    """Compiles constraints for one tokenizer; making one takes about a second for a large vocabulary.

    tokenizer_json: tokenizer.json as in the artifact. eos_ids: what ends a text, allowed where the text may
    end. vocabulary: length of a row of logits, the tokenizer's size or more. Raises GristmillError where
    llguidance is missing or cannot use the tokenizer.
    """

    def __init__(self, tokenizer_json: bytes, eos_ids: Iterable[int], vocabulary: int):
        self._library = _llguidance()
        self.vocabulary = vocabulary
        self._pool: ThreadPoolExecutor | None = None
        self.eos_ids = np.array(sorted({token for token in eos_ids if token < vocabulary}), np.int64)
        try:
            plain = self._library.LLTokenizer(tokenizer_json.decode())
            ends = [token for token in self.eos_ids.tolist() if token < plain.vocab_size]
            self._ends = np.array(ends or plain.eos_tokens, np.int64)  # the library cannot do without one
            self._tokenizer = self._library.LLTokenizer(
                tokenizer_json.decode(), eos_token=self._ends.tolist()
            )
        except ValueError as error:
            raise GristmillError(
                f"this model's tokenizer cannot be used for constraints: {_reason(str(error))}"
            ) from error

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Of one thread, which computes masks ahead."""
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(1, "gristmill-masks")
        return self._pool

    def after_fork(self) -> None:
        """In a child process: the thread is not here."""
        self._pool = None

    def constraint(self, kind: str, what: Any) -> Constraint:
        """A constraint at its beginning. kind: "regex" (text), "choices" (texts) or "schema" (JSON Schema as
        text or as an object). Raises GristmillError for what cannot be compiled."""
        if kind not in KINDS:
            raise GristmillError(f"a constraint is {kind!r}, expected one of {', '.join(KINDS)}")
        try:
            matcher = self._library.LLMatcher(self._tokenizer, self._grammar(kind, what), log_level=0)
        except (TypeError, ValueError, RecursionError) as error:
            raise _refusal(kind, what, str(error)) from error
        if matcher.is_error():
            raise _refusal(kind, what, matcher.get_error())
        made = Constraint(self, matcher)
        if not made.finished:
            made.mask()  # refuses now what no text satisfies
        return made

    def _grammar(self, kind: str, what: Any) -> str:
        matcher = self._library.LLMatcher
        if kind == "choices":
            return str(matcher.grammar_from_lark(_one_of(what)))
        if kind == "regex":
            if not isinstance(what, str):
                raise GristmillError(f"a regex is {type(what).__name__}, expected text")
            what.encode()  # raises for a lone surrogate
            return str(matcher.grammar_from_lark(f"start: /{self._library.regex_to_lark(what, 'd')}/"))
        schema = json.loads(what if isinstance(what, str) else json.dumps(what))
        if not isinstance(schema, dict):
            raise GristmillError(f"a schema is {type(schema).__name__}, expected a JSON object")
        return str(matcher.grammar_from_json_schema(json.dumps(schema), overrides=LAYOUT))

    def widen(self, bits: bytes) -> np.ndarray:
        """The library's bitmask as [V] bool: False beyond the tokenizer's ids, all ends True where one is."""
        mask = np.zeros(self.vocabulary, bool)
        size = min(self._tokenizer.vocab_size, self.vocabulary)
        mask[:size] = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[:size]
        ends = self._ends[self._ends < self.vocabulary]
        may_end = bool(mask[ends].any())
        mask[ends] = False
        mask[self.eos_ids] = may_end
        return mask


class Constraint:
    """Where one text stands in its grammar."""

    def __init__(self, of: Constrainer, matcher: LLMatcher):
        self._of, self._matcher = of, matcher
        self._mask: np.ndarray | None = None
        self._ahead: Future[np.ndarray] | None = None  # the mask on its way, and in which process
        self._process = 0
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but an end can follow."""
        return self._ended or bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """Whether the text so far is complete."""
        return self._ended or bool(self._matcher.is_accepting())

    def prepare(self) -> None:
        """Has the mask computed by a thread; nothing but `mask` may be called until that has returned."""
        if self._mask is None and self._ahead is None:
            self._ahead, self._process = self._of.pool.submit(self._compute), os.getpid()

    def mask(self) -> np.ndarray:
        """[V] bool, True for what may come next: ends only where the text is complete. Not writeable."""
        if self._mask is None:
            ahead, self._ahead = self._ahead, None
            here = ahead is not None and self._process == os.getpid()  # else it was left behind by a fork
            self._mask = ahead.result() if ahead is not None and here else self._compute()
        return self._mask

    def _compute(self) -> np.ndarray:
        bits = self._matcher.compute_bitmask()
        self._refuse_broken()
        mask = self._of.widen(bits)
        mask.flags.writeable = False
        return mask

    def accept(self, token: int) -> None:
        """Takes in the next token. Raises GristmillError for one that `mask` excludes."""
        if not self.mask()[token]:
            raise GristmillError(f"token {token} does not follow by the constraint; choose with its mask")
        if token in self._of.eos_ids:
            self._ended = True
            return
        self._matcher.consume_token(token)
        self._refuse_broken()
        self._mask = None

    def copy(self) -> Constraint:
        """Another text at the same place: samples of one prompt compile once."""
        if self._ahead is not None:
            self.mask()  # nothing else may look at the matcher meanwhile
        other = Constraint(self._of, self._matcher.deep_copy())
        other._mask, other._ended = self._mask, self._ended
        return other

    def _refuse_broken(self) -> None:
        if self._matcher.is_error():
            raise GristmillError(
                f"the constraint cannot go on: {_reason(self._matcher.get_error())}; try another one"
            )


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise GristmillError(f"constraints need llguidance, which is not installed: {INSTALL}") from error
    return llguidance


def _one_of(choices: Any) -> str:
    """A grammar of these texts; Lark writes a string as JSON does."""
    if not isinstance(choices, (list, tuple)):
        raise GristmillError(f"choices is {type(choices).__name__}, expected a list of texts")
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise GristmillError("choices is empty or holds what is empty or no text; expected one text or more")
    "".join(choices).encode()  # raises for a lone surrogate
    return "start: " + " | ".join(json.dumps(choice) for choice in choices)


def _refusal(kind: str, what: Any, message: str) -> GristmillError:
    shown = what if isinstance(what, str) else json.dumps(what, default=repr)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return GristmillError(f"the {kind} {shown!r} cannot be used: {_reason(message)}")


def _reason(message: str) -> str:
    """One line of what may be many: the one that says error, else the first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason was given"]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return "no text of this model's tokens satisfies it" if reason == "NoExtensionBias" else reason
