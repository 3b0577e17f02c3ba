"""One sequence on its way: its tokens, how many of them the cache holds, and the text they make."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gristmill.runtime.decoding.chooser import Choice, Chooser
from gristmill.runtime.decoding.lookup import Lookup
from gristmill.runtime.decoding.next_tokens import drawn
from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.decoding.pace import Acceptance
from gristmill.runtime.decoding.stops import StopStrings
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

PLAIN = GenerationOptions()
HOST_ONLY = (  # options that Draws does not have
    "min_p", "typical_p", "presence_penalty", "frequency_penalty", "no_repeat_ngram", "logit_bias",
    "min_new_tokens", "logprobs",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """What one sequence begins with and how it goes on; sequence: its number among the samples of a
    prompt."""

    ids: list[int]
    options: GenerationOptions
    seed: int | None = None
    sequence: int = 0


@dataclass
class Generation:
    """One continued prompt. finish_reason: "stop" (end of sequence or a stop string), "length", "timeout" or
    "cancelled"; None while it runs.

    token_ids: every new token, the ending one included; text: what they say, without stop string and special
    tokens. ttft_s: from the call to the first token. decode_tok_s: tokens per second after the first one (0
    if there was only one). reused_tokens: of the prompt, whose keys and values another sequence had left.
    logprobs: of each new token, where asked for; see Choice.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    reused_tokens: int = 0
    ttft_s: float = 0.0
    decode_tok_s: float = 0.0
    seed: int = 0
    logprobs: list[Choice] | None = None


class Sequence:
    """A prompt and what follows it. Whatever of its tokens is not in the cache is its next chunk; when the
    last one goes in, its logits come out and the next token is chosen: prefill and decode are the same
    step."""

    def __init__(self, session: Session, prompt: Prompt, started: float):
        options = self.options = prompt.options
        given = prompt.seed if prompt.seed is not None else options.seed
        seed = given if given is not None else secrets.randbits(63)
        self.result = Generation(prompt_tokens=len(prompt.ids), seed=seed)
        self.tokens = list(prompt.ids)
        self.cached = 0
        self.slot = -1
        self.adapter = session.adapters.number(options.adapter)
        self.owner = threading.get_ident()
        self.error: BaseException | None = None
        self.cancelled = False
        self.pieces: deque[str] = deque()  # text that nobody has taken yet
        self.notify: Callable[[], None] | None = None  # called after each new piece and at the end
        looks_up = getattr(session.executor, "rows_agree", True) if options.lookup is None else options.lookup
        self.lookup = Lookup(self.tokens) if looks_up else None
        self.draft_acceptance = Acceptance()
        self.started = started
        self.number = prompt.sequence
        self._chooser = Chooser(
            options,
            prompt.ids,
            seed,
            prompt.sequence,
            session.eos_ids,
            session.vocabulary,
            session._workspace,
        )
        self._constraint = session._constraint(options)
        # whether an executor that draws tokens itself knows all that is asked for
        self.drawable = self._constraint is None and all(
            getattr(options, name) == getattr(PLAIN, name) for name in HOST_ONLY
        )
        if options.logprobs is not None:
            self.result.logprobs = []
        self._limit = min(options.max_new_tokens, session.max_len - len(prompt.ids) + 1)
        self._decoder = _decoder(session, prompt)
        self._stops = StopStrings(options.stop)
        self._first_at = started

    @property
    def missing(self) -> int:
        """Tokens that the cache does not hold yet."""
        return len(self.tokens) - self.cached

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self._limit - len(self.result.token_ids)

    @property
    def ending_ids(self) -> frozenset[int]:
        """Token ids that end the text and are not part of it."""
        return self._chooser.ends

    @property
    def done(self) -> bool:
        return self.result.finish_reason is not None or self.error is not None

    @property
    def told(self) -> bool:
        """Whether it is done and all its text was taken."""
        return self.done and not self.pieces

    def take_pieces(self) -> Iterator[str]:
        """The text that nobody has taken yet."""
        while self.pieces:
            yield self.pieces.popleft()

    def end(self, reason: str) -> None:
        """Ends it where it stands; the text held back until now comes out."""
        if self.done:
            return
        if self._decoder:
            self._say(self._stops.push(self._decoder.flush()) + self._stops.flush())
            reason = "stop" if reason == "length" and self._stops.stopped else reason
        self.result.finish_reason = reason  # last: who sees it from another thread has all the text

    def fail(self, error: BaseException) -> None:
        self.error = error

    def verify(self, logits: np.ndarray, drafted: list[int]) -> int:
        """Takes in the tokens that follow from `logits` [1 + drafted, V], or that the executor drew from them
        [1 + drafted]: row i is the one after i drafted tokens, which counts as long as those are the tokens
        that were chosen. Returns how many were."""
        for accepted, row in enumerate(logits):
            choice = self._choose(row) if logits.ndim == 2 else Choice(drawn(row))
            self._append(choice)
            if self.done or accepted == len(drafted) or choice.token != drafted[accepted]:
                return accepted
        raise AssertionError("there is a row more than drafted tokens")

    def prepare(self) -> None:
        """Begins what the next choice needs beside logits, while those are computed."""
        if self._constraint:
            self._constraint.prepare()

    def guess(self, logits: np.ndarray, ahead: int) -> int:
        """The token that would be chosen from `logits` [V] of another model `ahead` tokens from here."""
        own = logits[: self._chooser.vocabulary]
        if own.size < self._chooser.vocabulary:
            own = np.pad(own, (0, self._chooser.vocabulary - own.size), constant_values=-np.inf)
        return self._chooser.token(own, len(self.tokens) - 1 + ahead)

    def _choose(self, logits: np.ndarray) -> Choice:
        mask = self._constraint.mask() if self._constraint else None
        return self._chooser.choose(logits, len(self.tokens) - 1, mask)

    def _append(self, choice: Choice) -> None:
        token = choice.token
        self.tokens.append(token)
        self.result.token_ids.append(token)
        if self.result.logprobs is not None:
            self.result.logprobs.append(choice)
        self._chooser.accept(token)
        if self._constraint:
            self._constraint.accept(token)
        self._time()
        if self._decoder and token not in self.options.stop_ids:
            self._say(self._stops.push(self._decoder.push(token)))
        finished = self._constraint is not None and self._constraint.finished
        if self._stops.stopped or token in self._chooser.ends or finished:
            self.end("stop")
        elif self.left <= 0:
            self.end("length")

    def _say(self, piece: str) -> None:
        if piece:
            self.result.text += piece
            self.pieces.append(piece)

    def _time(self) -> None:
        now = time.perf_counter()
        count = len(self.result.token_ids)
        if count == 1:
            self._first_at = now
            self.result.ttft_s = now - self.started
        else:
            self.result.decode_tok_s = (count - 1) / max(now - self._first_at, 1e-9)


def _decoder(session: Session, prompt: Prompt) -> StreamDecoder | None:
    if session.has_tokenizer:
        return StreamDecoder(session.tokenizer, prompt.ids, prompt.options.skip_special_tokens)
    if prompt.options.stop:
        raise GristmillError(
            "stop strings need a tokenizer, which this artifact does not hold; leave out stop"
        )
    return None
