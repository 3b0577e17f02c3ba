"""A server in a thread of the tests' process, and what it holds."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gristmill.runtime.server.logs import Log
from gristmill.runtime.server.settings import Settings
from gristmill.runtime.session import Session

for name in ("fastapi", "uvicorn", "httptools", "prometheus_client", "httpx", "openai"):
    pytest.importorskip(name, reason="serving needs gristmill[serve], its tests httpx and openai")

import httpx as httpx  # noqa: E402
import openai as openai  # noqa: E402

from gristmill.runtime.server.serve import GentleServer, bind, make_server  # noqa: E402

MODEL = "tiny"
TIMEOUT_S = 60.0


class Running:
    """A server that runs. url: without a slash at its end. ready: whether to wait until it takes requests."""

    def __init__(self, session: Session, settings: Settings, log_path: Path | str, ready: bool = True):
        self.session, self.log_path = session, log_path
        self.listening = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.log = Log(str(log_path))
        self._started = threading.Event()
        self._settings = settings
        self.server: GentleServer
        self._thread = threading.Thread(target=self._run, name="tested-server")
        self._thread.start()
        assert self._started.wait(TIMEOUT_S)
        if ready:
            wait_until(lambda: self.get("/health").status_code == 200)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.server = make_server(self.session, self._settings, self.log, self._started.set)
        await self.server.serve(sockets=[self.listening])

    def end(self) -> None:
        """What SIGTERM does."""
        self.loop.call_soon_threadsafe(self.server.end)

    def join(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        self.listening.close()
        self.log.close()

    @property
    def taken(self) -> int:
        """Sequences under way."""
        return self.server.engine.taken

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=TIMEOUT_S, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        given = {"content": body} if isinstance(body, (bytes, str)) else {"json": body}
        options.setdefault("headers", {"content-type": "application/json"})
        return httpx.post(self.url + path, timeout=TIMEOUT_S, **given, **options)

    def complete(self, prompt: Any = "ab", **options: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, "temperature": 0, **options})

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client, which tries nothing twice."""
        options.setdefault("api_key", "none")
        return openai.OpenAI(base_url=self.url + "/v1", max_retries=0, timeout=TIMEOUT_S, **options)

    def lines(self) -> list[dict[str, Any]]:
        """The log so far."""
        return [json.loads(line) for line in Path(self.log_path).read_text().splitlines()]

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(self.listening.getsockname(), timeout=TIMEOUT_S)


@contextmanager
def running(session: Session, log_path: Path | str, **settings: Any) -> Iterator[Running]:
    """A server over `session`, ended with the block, which then holds nothing any more."""
    server = Running(session, Settings(model=MODEL, **{"grace_s": 5.0, "stall_s": 5.0, **settings}), log_path)
    try:
        yield server
    finally:
        server.end()
        server.join()
    assert server.taken == 0 and nothing_runs(session)


def nothing_runs(session: Session) -> bool:
    scheduler = session._scheduler
    return not (scheduler.running or scheduler.waiting) and session._slots.free() == session.max_slots


def wait_until(ready: Callable[[], bool]) -> None:
    """Returns when `ready`; an assertion fails after a minute."""
    ends = time.monotonic() + TIMEOUT_S
    while not ready():
        assert time.monotonic() < ends, "waited for a minute"
        time.sleep(0.005)


def handles() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def threads() -> set[str]:
    """Names of the threads of a server; a session that computed masks keeps one for them."""
    names = {thread.name for thread in threading.enumerate()}
    return {n for n in names if n.startswith(("gristmill", "tested")) and "masks" not in n}


def raw(body: bytes, path: str = "/v1/completions", length: int | None = None) -> bytes:
    """A POST request as bytes."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body) if length is None else length}\r\n\r\n".encode() + body
