"""Generation for callers: prompts in, results or streams of text out; the scheduler does the work."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.decoding.sequence import Generation, Prompt, Sequence

if TYPE_CHECKING:
    from gristmill.runtime.decoding.scheduler import Scheduler
    from gristmill.runtime.session import Session


def generate_all(
    session: Session, prompts: list[Prompt], on_text: Callable[[int, str], None] | None = None
) -> list[Generation]:
    """Runs all prompts side by side. on_text: called in this thread with a result's number and new text of
    it; what it raises ends all of them. Raises the first error of any."""

    def news() -> bool:
        if any(s.error for s in sequences) or all(s.done for s in sequences):
            return True
        return on_text is not None and any(s.pieces for s in sequences)

    started = time.perf_counter()
    sequences = [Sequence(session, prompt, started) for prompt in prompts]
    scheduler = session._scheduler
    with _submitted(scheduler, sequences):
        while not all(sequence.done for sequence in sequences):
            scheduler.run_until(news)
            _raise_first(sequences)
            if on_text:
                _tell(sequences, on_text)
    return [sequence.result for sequence in sequences]


@contextmanager
def _submitted(scheduler: Scheduler, sequences: list[Sequence]) -> Iterator[None]:
    """Those that are not done at the end of the block are cancelled."""
    try:
        scheduler.submit(sequences)
        yield
    finally:
        scheduler.cancel([sequence for sequence in sequences if not sequence.done])


def samples(ids: list[int], options: GenerationOptions) -> list[Prompt]:
    """The n samples of a prompt, under one seed: they differ by their number."""
    seed = options.seed if options.seed is not None or options.n == 1 else secrets.randbits(63)
    return [Prompt(ids, options, seed, number) for number in range(options.n)]


def _tell(sequences: list[Sequence], on_text: Callable[[int, str], None]) -> None:
    for number, sequence in enumerate(sequences):
        for piece in sequence.take_pieces():
            on_text(number, piece)


def _raise_first(sequences: list[Sequence]) -> None:
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error


class Stream:
    """The text of one sequence as it comes; `result` is the Generation so far. As a context manager it ends
    with the block."""

    def __init__(self, session: Session, prompt: Prompt):
        self._scheduler = session._scheduler
        self._sequence = Sequence(session, prompt, time.perf_counter())
        self.result = self._sequence.result
        self._pieces = _pieces(self._scheduler, self._sequence)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the generation where it stands."""
        self._pieces.close()

    def cancel(self) -> None:
        """Ends the generation with its next step; takes no lock, so that a handler of a signal may call
        it."""
        self._sequence.cancelled = True


def _pieces(scheduler: Scheduler, sequence: Sequence) -> Generator[str, None, None]:
    """Does not hold the Stream, which can so be forgotten: its end ends the generation."""
    sequence.owner = threading.get_ident()
    with _submitted(scheduler, [sequence]):
        while not sequence.told:
            scheduler.run_until(lambda: bool(sequence.pieces) or sequence.done)
            yield from sequence.take_pieces()
        _raise_first([sequence])


class AsyncStream:
    """A Stream for `async for`: a thread drives the session while asynchronous generations run, all of them
    in one batch."""

    def __init__(self, session: Session, prompt: Prompt):
        self._scheduler = session._scheduler
        self._sequence = Sequence(session, prompt, time.perf_counter())
        self.result = self._sequence.result
        self._pieces = _async_pieces(self._scheduler, session._async_driver, self._sequence)

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        return await self._pieces.__anext__()

    async def aclose(self) -> None:
        """Ends the generation where it stands."""
        await self._pieces.aclose()


async def _async_pieces(
    scheduler: Scheduler, driver: AsyncDriver, sequence: Sequence
) -> AsyncGenerator[str, None]:
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        with suppress(RuntimeError):  # the loop was closed with the stream open
            loop.call_soon_threadsafe(news.set)

    sequence.notify = notify
    with _submitted(scheduler, [sequence]):
        driver.drive(sequence)
        while not sequence.told:
            await news.wait()
            news.clear()
            for piece in sequence.take_pieces():
                yield piece
        _raise_first([sequence])


class AsyncDriver:
    """The thread that drives while asynchronous sequences run; it ends when they have ended."""

    def __init__(self, session: Session):
        self._scheduler = session._scheduler
        self._lock = threading.Lock()
        self._sequences: list[Sequence] = []
        self._thread: threading.Thread | None = None

    def drive(self, sequence: Sequence) -> None:
        """Starts the thread where none runs."""
        with self._lock:
            self._sequences.append(sequence)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="gristmill-async", daemon=True)
                thread.start()
                self._thread = thread

    def after_fork(self) -> None:
        """In a child process: the thread is not here, nor what it drove."""
        self._lock, self._sequences, self._thread = threading.Lock(), [], None

    def _run(self) -> None:
        while current := self._left():
            try:
                self._scheduler.run_until(partial(_any_done, current))
            except BaseException as error:  # of the scheduler itself: all that it drives would wait for ever
                for sequence in current:
                    sequence.fail(error)
                self._scheduler.cancel(current)

    def _left(self) -> list[Sequence]:
        """Those that are not done; where there are none this thread is to end."""
        with self._lock:
            self._sequences = [sequence for sequence in self._sequences if not sequence.done]
            if not self._sequences:
                self._thread = None
            return self._sequences


def _any_done(sequences: list[Sequence]) -> bool:
    return any(sequence.done for sequence in sequences)
