"""Runs the server: socket, connections that stand still, signals.

SIGTERM and SIGINT end it gently: what is under way has grace_s to end, what comes meanwhile is refused with
503, then what is left is told so. A second signal leaves the grace out.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server.app import create_app
from gristmill.runtime.server.engine import Engine
from gristmill.runtime.server.gate import Counting
from gristmill.runtime.server.logs import Log, log_event
from gristmill.runtime.server.metrics import Measurements
from gristmill.runtime.server.settings import Settings
from gristmill.runtime.session import Session

BACKLOG = 1024
KEEP_ALIVE_S = 30
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAST_WORDS_S = 5.0  # for telling those that are cut short
# Decoding and the event loop take turns at the interpreter: Python's own 5 ms are steps of a small model.
SWITCH_INTERVAL_S = 0.0005


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises GristmillError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise GristmillError(f"cannot listen at {host} port {port}: {error}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise GristmillError(
            f"cannot listen at {host} port {port}: {error.strerror}; choose another --port"
        ) from error
    return made


def serve(
    session: Session, settings: Settings, listening: socket.socket, log_path: str | None,
    announce: Callable[[], None],
) -> None:  # fmt: skip
    """Serves until a signal ends it. announce: called once connections are taken."""
    run(lambda log: make_server(session, settings, log, announce), listening, log_path)


def run(
    make: Callable[[Log], GentleServer], listening: socket.socket, log_path: str | None
) -> None:
    """Runs the server that `make` makes until a signal ends it."""
    log = Log(log_path)
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    server = make(log)
    try:
        asyncio.run(server.serve(sockets=[listening]))
    finally:
        sys.setswitchinterval(before)
        listening.close()
        log.close()
    if not server.started:
        raise GristmillError("the server did not start; its log says why")


def make_server(session: Session, settings: Settings, log: Log, announce: Callable[[], None]) -> GentleServer:
    """A server that `serve(sockets=[...])` runs."""
    engine = Engine(session, settings.max_queue, Measurements())
    return gentle(create_app(engine, settings, log), engine, settings, announce)


def gentle(
    app: ASGIApp, engine: Ending, settings: Settings, announce: Callable[[], None]
) -> GentleServer:
    """A server of `app`, behind which is `engine`."""
    config = uvicorn.Config(
        app, http=patient(settings.stall_s), ws="none", lifespan="on",
        log_config=None, access_log=False, server_header=False, proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=int(settings.stall_s) + 1,
    )  # fmt: skip
    return GentleServer(config, engine, settings.grace_s, announce)


class Ending(Counting, Protocol):
    """What a server ends before itself: an Engine, or several replicas."""

    @property
    def taken(self) -> int: ...

    def end_all(self) -> None: ...

    async def idle(self, timeout_s: float) -> bool: ...


class GentleServer(uvicorn.Server):
    """A uvicorn server that refuses and finishes before it closes."""

    def __init__(self, config: uvicorn.Config, engine: Ending, grace_s: float, announce: Callable[[], None]):
        super().__init__(config)
        self.engine = engine
        self._grace_s, self._announce = grace_s, announce
        self._hurry = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.end)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            log_event("listening", address=str(sockets[0].getsockname()) if sockets else "")
            self._announce()

    def end(self) -> None:
        """Begins a shutdown; the second call leaves out the grace."""
        if self._ending is not None:
            self._hurry.set()
            return
        self.engine.draining = True
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        log_event("stopping", under_way=self.engine.taken)
        hurry = asyncio.ensure_future(self._hurry.wait())
        idle = asyncio.ensure_future(self.engine.idle(self._grace_s))
        await asyncio.wait({hurry, idle}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        idle.cancel()
        left = self.engine.taken
        self.engine.end_all()
        await self.engine.idle(LAST_WORDS_S)
        log_event("stopped", cut_short=left)
        self.should_exit = True


def patient(stall_s: float) -> type[HttpToolsProtocol]:
    """A protocol that gives up a connection whose client sends no request or reads nothing for stall_s."""

    class Patient(HttpToolsProtocol):
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._watch()

        def on_headers_complete(self) -> None:
            self._unwatch()
            super().on_headers_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unwatch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            self._unwatch()
            self._stalled = self.loop.call_later(stall_s, self.transport.abort)

        def _unwatch(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

    return Patient
