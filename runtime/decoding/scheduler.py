"""All generations of a session as one batch: continuous batching with chunked prefill.

A step is one forward: of every running sequence the next tokens that the cache lacks, those that decode
first, prompts in the order they came. A freed slot goes to the sequence that has waited longest. There is no
thread of its own: of the callers that wait for tokens one drives, that is runs steps for all, until it has
what it waits for; then it hands over to the next.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gristmill.runtime.decoding.draft import Draft
from gristmill.runtime.decoding.next_tokens import run
from gristmill.runtime.decoding.pace import Acceptance, Pace
from gristmill.runtime.decoding.sequence import Sequence
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.slots import common_prefix

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

PROMPT_ROWS = 128  # of prompts in a step in which others decode: those wait for it
MOST_ROWS_WITH_DRAFTS = 8  # more rows of decoding cost so much that no token is proposed
WORTH_COPYING = 16  # rows of another slot: fewer are computed anew
WORTH_WAITING = 64  # rows that another prompt is computing now


@dataclass
class Statistics:
    """What a session has done so far. drafted, accepted: tokens proposed by speculation, and those of them
    that were right; reused_tokens: of prompts, taken over from other sequences, by so many prefix_hits;
    rows: of all steps; longest_wait_s: for a slot."""

    requests: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prefix_hits: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    rows: int = 0
    longest_wait_s: float = 0.0


@dataclass
class Chunk:
    """What one sequence has in a step: tokens that the cache lacks, and behind the last one drafted ones."""

    sequence: Sequence
    tokens: list[int]
    drafted: list[int] = field(default_factory=list)
    judge: Acceptance | None = None  # of those

    @property
    def rows(self) -> int:
        return len(self.tokens) + len(self.drafted)

    @property
    def wanted(self) -> int:
        """Rows whose logits are asked for, the last ones."""
        return 1 + len(self.drafted) if len(self.tokens) == self.sequence.missing else 0


@dataclass(eq=False)
class _Waiter:
    ready: Callable[[], bool]
    thread: int = field(default_factory=threading.get_ident)
    event: threading.Event = field(default_factory=threading.Event)
    drives: bool = False


class Scheduler:
    """See the module. max_waiting: sequences without a slot, beyond which more are refused."""

    def __init__(self, session: Session, max_waiting: int):
        self._session, self._max_waiting = session, max_waiting
        self._lock = threading.RLock()  # a forgotten stream may be cancelled by whoever holds it
        self._driving = False
        self._waiters: list[_Waiter] = []
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._pace = Pace()
        self.draft: Draft | None = None  # proposes tokens, see Session
        self.statistics = Statistics()

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Puts sequences behind those that wait. Raises GristmillError where those are too many already."""
        sequences = list(sequences)
        with self._lock:
            if len(self._waiting) >= self._max_waiting:
                raise GristmillError(
                    f"{len(self._waiting)} sequences wait for a slot, max_waiting is {self._max_waiting}; "
                    "try again later, or load with more max_slots or max_waiting"
                )
            self._waiting.extend(sequences)
            self.statistics.requests += len(sequences)

    def cancel(self, sequences: Iterable[Sequence]) -> None:
        """Ends those that are not done, and frees their slots: at once, or after the step that is under
        way."""
        for sequence in (sequences := list(sequences)):
            sequence.cancelled = True
        if not sequences:
            return
        with self._lock:
            if self._driving:
                return
            self._driving = True
        try:
            self._sweep()
        finally:
            self._hand_over()

    @property
    def waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences in a slot."""
        return len(self._running)

    def run_until(self, ready: Callable[[], bool], after_step: Callable[[], None] | None = None) -> None:
        """Returns when `ready`, which a step of this or of another thread brings about. after_step: called
        after each step of this thread."""
        if ready() or not self._take_the_reins(ready):
            return
        try:
            while not ready():
                self._step()
                if after_step is not None:
                    after_step()
                self._wake_the_ready()
        finally:
            self._hand_over()

    def after_fork(self) -> None:
        """In a child process: sequences of threads that are not here are gone."""
        self._lock, self._driving, self._waiters = threading.RLock(), False, []
        me = threading.get_ident()
        self._waiting = deque(s for s in self._waiting if s.owner == me)
        self._running = [s for s in self._running if s.owner == me]

    # ---- who drives ----

    def _take_the_reins(self, ready: Callable[[], bool]) -> bool:
        """Waits until `ready`, then returns False, or until this thread is to drive."""
        with self._lock:
            if not self._driving:
                self._driving = True
                return True
            waiter = _Waiter(ready)
            self._waiters.append(waiter)
        try:
            waiter.event.wait()
        except BaseException:
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            if waiter.drives:
                self._hand_over()
            raise
        return waiter.drives

    def _wake_the_ready(self) -> None:
        if not self._waiters:
            return
        with self._lock:
            for waiter in [w for w in self._waiters if w.ready()]:
                self._waiters.remove(waiter)
                waiter.event.set()

    def _hand_over(self) -> None:
        self._wake_the_ready()
        while True:
            with self._lock:
                if self._waiters:
                    waiter = self._waiters.pop(0)
                    waiter.drives = True
                    waiter.event.set()
                    return
                if not any(s.done or s.cancelled for s in [*self._running, *self._waiting]):
                    self._driving = False
                    return
            self._sweep()  # cancelled since the last step

    # ---- a step ----

    def _step(self) -> None:
        self._sweep()
        self._admit()
        chunks = [chunk for chunk in self._plan() if not chunk.sequence.done]
        chunks.sort(key=lambda chunk: chunk.sequence.adapter)  # rows of one adapter are multiplied together
        if chunks:
            self._forward(chunks)
        self._sweep_done()

    def _sweep(self) -> None:
        """Lets go of what is done, cancelled or out of time."""
        now = time.perf_counter()
        for sequence in [*self._running, *self._waiting]:
            timeout = sequence.options.timeout_s
            if sequence.cancelled:
                sequence.end("cancelled")
            elif timeout is not None and now - sequence.started > timeout:
                sequence.end("timeout")
        self._sweep_done()

    def _sweep_done(self) -> None:
        for sequence in [s for s in self._running if s.done]:
            self._let_go(sequence)
        for sequence in [s for s in list(self._waiting) if s.done]:  # others may be submitted meanwhile
            self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            kept = sequence.tokens[: sequence.cached] if sequence.error is None else []
            self._session._slots.give_back(sequence.slot, kept)
        else:
            self._waiting.remove(sequence)
        self.statistics.finished += 1
        self.statistics.generated_tokens += len(sequence.result.token_ids)
        if sequence.notify:
            sequence.notify()

    def _admit(self) -> None:
        """Gives slots to those that wait, unless another prompt is about to compute what they begin with."""
        for sequence in list(self._waiting):
            if self._running and not self._session._slots.free():
                return
            if self._computed_now(sequence):
                continue
            try:
                if not self._place(sequence):
                    return
            except Exception as error:  # no slot will ever be free, or its rows could not be had
                sequence.fail(error)
                self._let_go(sequence)
                continue
            self._waiting.remove(sequence)
            self._running.append(sequence)
            self._count(sequence)
            if not self._session.adapters.holds(sequence.adapter):
                sequence.fail(GristmillError(f"adapter {sequence.options.adapter!r} was unloaded meanwhile"))

    def _count(self, sequence: Sequence) -> None:
        statistics = self.statistics
        statistics.longest_wait_s = max(statistics.longest_wait_s, time.perf_counter() - sequence.started)
        statistics.prompt_tokens += sequence.result.prompt_tokens
        statistics.reused_tokens += sequence.result.reused_tokens
        statistics.prefix_hits += sequence.result.reused_tokens > 0

    def _computed_now(self, sequence: Sequence) -> bool:
        """Whether a running sequence has yet to compute many rows that this one needs too."""
        for other in self._running:
            if other.adapter != sequence.adapter:
                continue
            end = min(len(sequence.tokens) - 1, other.result.prompt_tokens)
            least = other.cached + WORTH_WAITING
            if end >= least and common_prefix(other.tokens[:end], sequence.tokens[:end]) >= least:
                return True
        return False

    def _place(self, sequence: Sequence) -> bool:
        """Finds a slot, with as many of the prompt's rows as another sequence has left."""
        slots, wanted = self._session._slots, sequence.tokens[:-1]
        source, length = slots.longest_kept(wanted, sequence.adapter)
        kept = slots.kept(source)
        for other in self._running:
            if other.adapter != sequence.adapter:
                continue
            shared = slots.reachable(other.slot, common_prefix(other.tokens[: other.cached], wanted))
            if shared > length:
                source, length, kept = other.slot, shared, ()
        whole = kept and (length == len(kept) or slots.free() == 1)  # nothing else is lost by going on there
        if whole and slots.take_kept(source, length, sequence.owner):
            sequence.slot = source
        else:
            slot = slots.take(False, False, sequence.owner, source, sequence.adapter)
            if slot is None:
                if not self._running:
                    slots.pause(self._stuck())
                return False
            sequence.slot = slot
            try:
                copied = length >= WORTH_COPYING and self._session._copy_slot(source, slot, length, kept=kept)
            except BaseException:
                slots.give_back(slot)
                raise
            if not copied:
                return True
        sequence.cached = sequence.result.reused_tokens = length
        return True

    def _stuck(self) -> list[int]:
        """Threads that wait for the one that drives."""
        with self._lock:
            return [waiter.thread for waiter in self._waiters]

    def _plan(self) -> list[Chunk]:
        """The next tokens of all: those that only decode first, then prompts, as far as the rows reach."""
        decoding = [s for s in self._running if s.missing == 1]
        prompts = [s for s in self._running if s.missing > 1]
        left = self._session.max_tokens
        chunks = [Chunk(s, s.tokens[-1:]) for s in decoding[: max(left - bool(prompts), 1)]]
        left -= len(chunks)
        if len(chunks) < len(decoding):  # more slots than rows: in turn
            turn = decoding[: len(chunks)]
            self._running = [*(s for s in self._running if s not in turn), *turn]
        if not prompts:
            self._propose(chunks)
        if chunks:
            left = min(left, PROMPT_ROWS)
        for sequence in prompts:
            if left > 0:
                tokens = sequence.tokens[sequence.cached : sequence.cached + left]
                chunks.append(Chunk(sequence, tokens))
                left -= len(tokens)
        return chunks

    def _propose(self, chunks: list[Chunk]) -> None:
        """Adds proposals to sequences that all decode: what followed earlier in the text, else a draft's."""
        most = min(MOST_ROWS_WITH_DRAFTS, self._session.max_tokens) // max(len(chunks), 1) - 1
        asked = []
        for chunk in chunks:
            sequence, room = chunk.sequence, min(most, chunk.sequence.left - 1)
            if sequence.lookup is not None:
                chunk.judge = sequence.lookup.acceptance
                chunk.drafted = sequence.lookup.propose(chunk.judge.length(self._pace, room))
            if not chunk.drafted and self.draft is not None:
                chunk.judge = sequence.draft_acceptance
                length = chunk.judge.length(self._pace, room, self.draft.seconds)
                if length:
                    asked.append((chunk, length))
        if self.draft is not None and asked:
            try:
                found = self.draft.propose([(chunk.sequence, length) for chunk, length in asked])
            except Exception as error:  # a draft is for speed: the text goes on without it
                self.draft = None
                warnings.warn(f"the draft is given up: {error}", RuntimeWarning, stacklevel=2)
                return
            for (chunk, _), drafted in zip(asked, found, strict=True):
                chunk.drafted = drafted

    def _forward(self, chunks: list[Chunk]) -> None:
        """Runs the chunks, and each sequence takes in what its logits say; an error is of those it
        concerns."""
        began = time.perf_counter()
        try:
            logits = self._run(chunks)
        except Exception as error:
            for chunk in chunks:
                chunk.sequence.fail(error)
            return
        self.statistics.steps += 1
        self.statistics.rows += sum(chunk.rows for chunk in chunks)
        if all(chunk.wanted for chunk in chunks) and len(chunks) == 1:
            self._pace.note(chunks[0].rows, time.perf_counter() - began)
        begin = 0
        for chunk in chunks:
            end = begin + chunk.wanted
            self._take_in(chunk, logits[begin:end])
            begin = end

    def _run(self, chunks: list[Chunk]) -> np.ndarray:
        tokens, positions, slots, rows = list[int](), list[int](), list[int](), list[int]()
        for chunk in chunks:  # lists: most steps are few rows
            begin, count = chunk.sequence.cached, chunk.rows
            tokens += chunk.tokens
            tokens += chunk.drafted
            positions += range(begin, begin + count)
            slots += [chunk.sequence.slot] * count
            rows += range(len(tokens) - chunk.wanted, len(tokens))
        wanted = [(c.sequence, c.wanted) for c in chunks]
        for sequence, count in wanted:
            if count:
                sequence.prepare()
        t, p, s, r = (np.array(values, np.int32) for values in (tokens, positions, slots, rows))
        return run(self._session, t, p, s, r, wanted)

    def _take_in(self, chunk: Chunk, logits: np.ndarray) -> None:
        sequence = chunk.sequence
        if not chunk.wanted:
            sequence.cached += len(chunk.tokens)
            return
        try:
            accepted = sequence.verify(logits, chunk.drafted)
        except Exception as error:
            sequence.fail(error)
            return
        sequence.cached += len(chunk.tokens) + accepted
        if chunk.drafted and chunk.judge is not None:
            chunk.judge.learn(len(chunk.drafted), accepted)
            self.statistics.drafted += len(chunk.drafted)
            self.statistics.accepted += accepted
        if sequence.notify and not sequence.done:
            sequence.notify()
