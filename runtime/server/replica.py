"""One replica: an engine and the application over it, called with plain values instead of a socket.

A request comes in as its method, path, headers and body, and its answer goes out as the messages of ASGI that
the application sends, all that are there at once. The last one is what the log is to say of the request.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prometheus_client import ProcessCollector
from starlette.types import Message

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server.app import create_app
from gristmill.runtime.server.engine import Engine
from gristmill.runtime.server.fleet import Family
from gristmill.runtime.server.logs import LOGGERS, JsonLines
from gristmill.runtime.server.metrics import Collector, Measurements
from gristmill.runtime.server.settings import Settings

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

RECORD = "gristmill.record"  # the message with what the log says
MOST_LINES = 1000  # of the log, that wait to be fetched
FIRST_TOKEN_S = 600.0


@dataclass(frozen=True)
class Call:
    """A request, as the front has read it. age_s: since it arrived."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    age_s: float


class Replica:
    """Answers calls by an engine of its own. `start` before anything else, `stop` at the end."""

    def __init__(self, session: Session, settings: Settings):
        self.engine = Engine(session, settings.max_queue, Measurements())
        self._lines = _Lines()
        self._app = create_app(self.engine, replace(settings, keys=()), self._lines, alone=False)
        self._collectors = (Collector(self.engine, self._lines), ProcessCollector(registry=None))
        self._running: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Returns once a token was produced. Raises GristmillError where there is none."""
        self._lines.install()
        self.engine.start()
        ends = time.monotonic() + FIRST_TOKEN_S
        while self.engine.state == "starting" and time.monotonic() < ends:
            await asyncio.sleep(0.01)
        if not self.engine.ready:
            raise GristmillError(f"the first token failed: {self.engine.failure or 'it takes too long'}")

    async def stop(self) -> None:
        await self.engine.stop()
        self._lines.remove()

    async def answer(self, call: Call) -> AsyncGenerator[list[Message], None]:
        """The messages of the answer. Leaving the iterator is leaving the connection."""
        messages: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]
        out, news, gone = list[Message](), asyncio.Event(), asyncio.Event()

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            out.append(message)
            news.set()

        scope = _scope(call)
        task = asyncio.ensure_future(self._app(scope, receive, send))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: news.set())
        try:
            while not task.done():
                await news.wait()
                news.clear()
                if out:
                    yield [out.pop(0) for _ in range(len(out))]
            error = task.exception()
            if error is not None and not out:
                logging.getLogger(LOGGERS[0]).error("a request failed", exc_info=error)
            yield [*out, {"type": RECORD, "record": scope["gristmill.record"]}]
        finally:
            gone.set()

    def status(self) -> dict[str, Any]:
        """For Fleet.report, and `lines` of the log since the last call."""
        engine = self.engine
        running = engine.session._scheduler.running
        details = {
            "running": running, "queued": max(engine.taken - running, 0), "pid": os.getpid(),
            "host": socket.gethostname(),
        }  # fmt: skip
        return {
            "state": engine.state, "slots": engine.session.max_slots, "capacity": engine.capacity,
            "details": details, "families": self._families(), "lines": self._lines.take(),
        }  # fmt: skip

    def _families(self) -> list[Family]:
        return [
            (
                metric.name, metric.type, metric.documentation,
                [(sample.name, dict(sample.labels), float(sample.value)) for sample in metric.samples],
            )
            for collector in self._collectors
            for metric in collector.collect()
            if metric.samples
        ]  # fmt: skip


def _scope(call: Call) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": call.method, "scheme": "http", "path": call.path, "raw_path": call.path.encode(),
        "query_string": call.query, "root_path": "", "headers": list(call.headers), "client": None,
        "server": None, "state": {}, "gristmill.record": {},
        "gristmill.began": time.perf_counter() - call.age_s,
    }  # fmt: skip


class _Lines(logging.Handler):
    """Keeps lines of the log until the front fetches them. dropped: those it did not fetch in time."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.dropped = 0
        self._kept: collections.deque[str] = collections.deque(maxlen=MOST_LINES)
        self.setFormatter(JsonLines())

    def install(self) -> None:
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(self)
            logger.setLevel(logging.INFO)

    def remove(self) -> None:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.dropped += len(self._kept) == MOST_LINES
        self._kept.append(self.format(record))

    def take(self) -> list[str]:
        return [self._kept.popleft() for _ in range(len(self._kept))]
