"""The generation loop: rows of several sequences in one forward, prompt chunks and single tokens alike.

A sequence is the list of its tokens and the number of them that are in the cache. Whatever is missing is its
next chunk; when the last token goes in, its logits come out and the next token is chosen. Prefill and decode
are the same step.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.decoding.sampling import Workspace, choose
from gristmill.runtime.decoding.stops import StopStrings
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from gristmill.runtime.session import Session


@dataclass(frozen=True)
class Prompt:
    """What one sequence begins with and how it goes on."""

    ids: list[int]
    options: GenerationOptions


@dataclass
class Generation:
    """One continued prompt. finish_reason: "stop" (end of sequence or a stop string) or "length"; None while
    it runs.

    token_ids: every new token, the ending one included; text: what they say, without stop string and special
    tokens. ttft_s: from the call to the first token. decode_tok_s: tokens per second after the first one (0
    if there was only one).
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    ttft_s: float = 0.0
    decode_tok_s: float = 0.0
    seed: int = 0


class Running:
    """A sequence on its way: its tokens, how many of them the cache holds, and its text."""

    def __init__(self, session: Session, prompt: Prompt, started: float):
        self.options = prompt.options
        seed = prompt.options.seed if prompt.options.seed is not None else secrets.randbits(63)
        self.result = Generation(prompt_tokens=len(prompt.ids), seed=seed)
        self.tokens = list(prompt.ids)
        self.cached = 0
        self.slot = -1
        self._started = started
        self._eos = frozenset() if prompt.options.ignore_eos else session.eos_ids
        self._limit = min(prompt.options.max_new_tokens, session.max_len - len(prompt.ids) + 1)
        self._decoder = _decoder(session, prompt)
        self._stops = StopStrings(prompt.options.stop)
        self._seen = (
            np.unique(np.array(prompt.ids))
            if prompt.options.repetition_penalty != 1.0
            else np.empty(0, np.int64)
        )
        self._workspace: Workspace | None = None
        self._first_at = started

    @property
    def missing(self) -> int:
        """Tokens that the cache does not hold yet."""
        return len(self.tokens) - self.cached

    def advance(self, logits: np.ndarray) -> str:
        """Chooses the token that follows from `logits` [V] and returns the text that it makes certain."""
        if self._workspace is None and self.options.temperature > 0:
            self._workspace = Workspace(logits.size)
        position = len(self.tokens) - 1
        token = choose(logits, self.options, self._seen, self.result.seed, 0, position, self._workspace)
        self.tokens.append(token)
        self.result.token_ids.append(token)
        if self.options.repetition_penalty != 1.0 and token not in self._seen:
            self._seen = np.append(self._seen, token)
        self._time()
        piece = self._stops.push(self._decoder.push(token)) if self._decoder else ""
        piece += self._finish(token)
        self.result.text += piece
        return piece

    def _finish(self, token: int) -> str:
        """Sets finish_reason if this was the last token; the text that was held back until now."""
        count = len(self.result.token_ids)
        if self._stops.stopped or token in self._eos:
            self.result.finish_reason = "stop"
        elif count >= self._limit:
            self.result.finish_reason = "length"
        if self.result.finish_reason is None:
            return ""
        rest = self._stops.push(self._decoder.flush()) + self._stops.flush() if self._decoder else ""
        if self._stops.stopped:
            self.result.finish_reason = "stop"
        return rest

    def _time(self) -> None:
        now = time.perf_counter()
        count = len(self.result.token_ids)
        if count == 1:
            self._first_at = now
            self.result.ttft_s = now - self._started
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


def step(session: Session, running: list[Running]) -> Iterator[tuple[Running, str]]:
    """One forward for all of `running`; yields those that got a token, with their new text."""
    batch = plan(running, session.max_tokens)
    counts = [count for _, count in batch]
    tokens = np.concatenate([np.array(s.tokens[s.cached : s.cached + n], np.int32) for s, n in batch])
    positions = np.concatenate([np.arange(s.cached, s.cached + n, dtype=np.int32) for s, n in batch])
    slots = np.repeat(np.array([s.slot for s, _ in batch], np.int32), counts)
    lasts = np.cumsum(counts) - 1
    ready = [(s, int(last)) for (s, n), last in zip(batch, lasts, strict=True) if n == s.missing]
    logits = session._run(tokens, positions, slots, np.array([last for _, last in ready], np.int32))
    for sequence, count in batch:
        sequence.cached += count
    for (sequence, _), row in zip(ready, logits, strict=True):
        yield sequence, sequence.advance(row)


def plan(running: list[Running], max_tokens: int) -> list[tuple[Running, int]]:
    """How many tokens of which sequence go next: those that only decode first, then prompts."""
    batch = []
    for sequence in sorted(running, key=lambda s: s.missing > 1):
        count = min(sequence.missing, max_tokens)
        if count:
            batch.append((sequence, count))
            max_tokens -= count
    return batch


def generate_all(session: Session, prompts: list[Prompt]) -> list[Generation]:
    """Runs all prompts as one batch, each in a slot of its own; a freed slot goes to the next prompt."""
    started = time.perf_counter()
    sequences = [Running(session, prompt, started) for prompt in prompts]
    waiting, running = deque(sequences), list[Running]()
    try:
        while waiting or running:
            _admit(session, waiting, running)
            for _ in step(session, running):
                pass
            for done in [s for s in running if s.result.finish_reason]:
                running.remove(done)
                session._slots.give_back(done.slot)
    finally:
        for sequence in running:
            session._slots.give_back(sequence.slot)
    return [sequence.result for sequence in sequences]


def _admit(session: Session, waiting: deque[Running], running: list[Running]) -> None:
    while waiting:
        slot = session._slots.take(wait=not running)
        if slot is None:
            return
        waiting[0].slot = slot
        running.append(waiting.popleft())


class Stream:
    """The text of one sequence as it comes; `result` is the Generation so far."""

    def __init__(self, session: Session, prompt: Prompt):
        self._session = session
        self._sequence = Running(session, prompt, time.perf_counter())
        self.result = self._sequence.result
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation where it stands."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        sequence, slots = self._sequence, self._session._slots
        slot = slots.take()
        assert slot is not None
        sequence.slot = slot
        try:
            while sequence.result.finish_reason is None:
                for _, piece in step(self._session, [sequence]):
                    if piece:
                        yield piece
        finally:
            slots.give_back(slot)
