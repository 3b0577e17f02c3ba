"""The decoding thread, and what the event loop sees of it.

One thread runs the scheduler's steps while there is anything to decode. After a step it hands over what is
new of all sequences in one call, and of texts that flow already only every 20 ms, less often with many: an
event for each token of a small model would cost more than its forward. Everything else here runs on the event
loop, so that counts and sets need no lock.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.decoding.sequence import Prompt, Sequence
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server.errors import RequestError, stopping
from gristmill.runtime.server.logs import logger
from gristmill.runtime.server.metrics import Measurements

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

INTERVAL_S = 0.02  # between pieces of a text
INTERVAL_PER_TEXT_S = 0.002  # sending a piece takes some 0.1 ms: so it stays a twentieth of the time
LONGEST_INTERVAL_S = 0.1
PREPARING_THREADS = 2  # read prompts and compile constraints
MOST_RETRY_S = 60


class Answer:
    """One sequence of a request. finished: its slot is free and all its text is there to take."""

    def __init__(self, ticket: Ticket, sequence: Sequence):
        self.ticket, self.sequence = ticket, sequence
        self.finished = False
        self.fresh = True  # nothing of it was handed over yet
        self.tokens = 0  # of it that were counted
        self.told_at = ticket.started

    @property
    def urgent(self) -> bool:
        """Whether a client waits for more than the next piece."""
        return self.fresh or self.sequence.done


class Ticket:
    """A request under way: its answers, and `news`, set whenever one of them has something new."""

    def __init__(self, sequences: list[Sequence], started: float):
        self.started = started
        self.answers = [Answer(self, sequence) for sequence in sequences]
        self.news = asyncio.Event()
        self.left = False  # the client is gone
        self.refusal: RequestError | None = None  # why the server ended it

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self.answers)

    @property
    def error(self) -> BaseException | None:
        """The first error of any answer."""
        return next((a.sequence.error for a in self.answers if a.sequence.error is not None), None)

    @property
    def cut_short(self) -> bool:
        """Whether any answer was or is about to be ended by `close`."""
        return any(
            a.sequence.cancelled and a.sequence.result.finish_reason in (None, "cancelled")
            for a in self.answers
        )

    @property
    def came_too_late(self) -> bool:
        """Whether any answer's time was over before it had a slot."""
        results = [answer.sequence.result for answer in self.answers if answer.finished]
        return any(result.finish_reason == "timeout" and not result.token_ids for result in results)

    def close(self) -> None:
        """Ends what is not finished with the next step."""
        for answer in self.answers:
            if not answer.finished:
                answer.sequence.cancelled = True

    def leave(self, *_: object) -> None:
        """The client is gone."""
        self.left = True
        self.close()
        self.news.set()

    async def wait(self) -> None:
        """Returns when there is something new."""
        await self.news.wait()
        self.news.clear()


class Engine:
    """Decodes for a server: a bounded queue before the session's scheduler, and the thread that drives it."""

    def __init__(self, session: Session, max_queue: int, measurements: Measurements):
        self.session, self.measurements = session, measurements
        self.capacity = session.max_slots + max_queue
        self.taken = 0  # of the capacity
        self.draining = False  # nothing new is taken
        self._ended = False  # nor is anything gone on with
        self.failure: str | None = None  # of the latest steps
        self._scheduler = session._scheduler
        self._alive: set[Answer] = set()
        self._changed: list[Answer] = []  # belongs to the decoding thread
        self._due = 0.0
        self._rows = 0
        self._work = threading.Event()
        self._closed = False
        self._pool = ThreadPoolExecutor(PREPARING_THREADS, "gristmill-prepare")
        self._thread = threading.Thread(target=self._run, name="gristmill-decode", daemon=True)

    # ---- on the event loop ----

    def start(self) -> None:
        """Starts decoding, with one token that shows that all is well."""
        self._loop = asyncio.get_running_loop()
        self._empty = asyncio.Event()
        self._thread.start()
        options = GenerationOptions(max_new_tokens=1, ignore_eos=True)
        sequence = Sequence(self.session, Prompt([0], options), time.perf_counter())
        self.taken += 1
        self._submit([sequence], time.perf_counter())

    @property
    def ready(self) -> bool:
        """Whether a token was produced, and requests are taken."""
        return self.state == "ok"

    @property
    def state(self) -> str:
        """ "starting", "ok", "failing" or "stopping"."""
        if self.draining:
            return "stopping"
        if self.failure is not None or not self._thread.is_alive():
            return "failing"
        return "ok" if self.measurements.generated_tokens else "starting"

    async def open(self, count: int, make: Callable[[], list[Sequence]], started: float) -> Ticket:
        """Has a thread make `count` sequences, and queues them.

        Raises RequestError where the queue is full or the server stops, and what `make` raises.
        """
        self._reserve(count)
        try:
            sequences = await self._loop.run_in_executor(self._pool, make)
            assert len(sequences) == count
            if self._ended:
                raise stopping()
        except BaseException:
            self._release(count)
            raise
        return self._submit(sequences, started)

    def end_all(self) -> None:
        """Ends every request under way, in words."""
        self.draining = self._ended = True
        for answer in list(self._alive):
            answer.ticket.refusal = stopping()
            answer.ticket.close()

    async def idle(self, timeout_s: float) -> bool:
        """Whether nothing is under way, waiting for that if need be."""
        self._empty.clear()
        if self.taken == 0:
            return True
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        return self.taken == 0

    async def stop(self) -> None:
        """Ends the threads; requests under way end first."""
        self.end_all()
        await self.idle(10.0)
        self._closed = True
        self._work.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.join, 10.0)

    def _reserve(self, count: int) -> None:
        if self.draining:
            raise stopping()
        if count > self.capacity:
            raise RequestError(
                400,
                f"{count} texts are asked for at once, this server takes {self.capacity}; ask for fewer",
                "too_many_choices",
                "n",
            )
        if self.taken + count > self.capacity:
            raise RequestError(
                429,
                f"{self.taken} texts run or wait, expected {self.capacity} at most; try again later",
                "queue_full",
                retry_after=self.retry_after(),
            )
        self.taken += count

    def retry_after(self) -> int:
        """Seconds until about a slot's turn is over."""
        expected = self.measurements.mean_request_s * self.taken / self.session.max_slots / 2
        return int(min(max(1.0, expected), MOST_RETRY_S))

    def _release(self, count: int) -> None:
        self.taken -= count
        if self.taken == 0:
            self._empty.set()

    def _submit(self, sequences: list[Sequence], started: float) -> Ticket:
        ticket = Ticket(sequences, started)
        for answer in ticket.answers:
            answer.sequence.notify = partial(self._changed.append, answer)
        self._alive.update(ticket.answers)
        try:
            self._scheduler.submit(sequences)
        except GristmillError as error:  # the session's own queue is shorter
            self._alive.difference_update(ticket.answers)
            self._release(len(sequences))
            raise RequestError(429, str(error), "queue_full", retry_after=self.retry_after()) from error
        self._work.set()
        return ticket

    def _deliver(self, answers: list[Answer], now: float) -> None:
        """Takes in what the decoding thread hands over."""
        for answer in answers:
            tokens = len(answer.sequence.result.token_ids)
            new, answer.tokens = tokens - answer.tokens, tokens
            if new:
                self.failure = None
                self.measurements.tokens(new, now, answer.told_at, first=new == tokens)
                answer.told_at = now
            if answer.finished and answer in self._alive:
                self._alive.discard(answer)
                self.measurements.finished(answer.sequence, now)
                self._release(1)
            answer.ticket.news.set()

    # ---- on the decoding thread ----

    def _run(self) -> None:
        while not self._closed:
            try:
                self._scheduler.run_until(self._nothing_left, self._after_step)
                self._hand_over(self._changed)  # where another thread drove meanwhile
            except Exception as error:
                # of the scheduler itself: requests end with it, the next ones are tried
                logger.exception("a step failed")
                self._fail_all(error)
            self._work.wait()
            self._work.clear()

    def _nothing_left(self) -> bool:
        return not (self._scheduler.running or self._scheduler.waiting)

    def _after_step(self) -> None:
        rows = self._scheduler.statistics.rows
        if rows > self._rows:
            self.measurements.batch_rows.add(rows - self._rows)
            self._rows = rows
        if not self._changed:
            return
        now = time.perf_counter()
        if now >= self._due:
            spread = INTERVAL_PER_TEXT_S * self._scheduler.running
            self._due = now + min(max(INTERVAL_S, spread), LONGEST_INTERVAL_S)
            self._hand_over(self._changed)
        elif urgent := [answer for answer in self._changed if answer.urgent]:
            self._hand_over(urgent)

    def _hand_over(self, answers: list[Answer]) -> None:
        news = list(dict.fromkeys(answers))
        for answer in news:
            answer.fresh = False
            answer.finished = answer.sequence.done  # between steps: its text is complete
        self._changed[:] = [] if answers is self._changed else [a for a in self._changed if a not in news]
        if news:
            with suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._deliver, news, time.perf_counter())

    def _fail_all(self, error: Exception) -> None:
        self.failure = type(error).__name__
        answers = list(self._alive)
        for answer in answers:
            answer.sequence.fail(error)
        try:
            self._scheduler.cancel([answer.sequence for answer in answers])
        except Exception:
            logger.exception("the slots of a failed step cannot be freed")
        self._hand_over([*self._changed, *answers])
