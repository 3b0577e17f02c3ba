"""The one address before several replicas: it passes each request to one of them, and its answer on.

Nothing reaches a client before there is a part of the text to send. So a request whose replica is lost until
then is asked again of another; one of whose text something was sent ends with an error that says so. Keys and
limits of a request's size are the Gate's, as for a single process; all else the replica itself decides, by
the same application.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server.errors import RequestError, request_error, stopping
from gristmill.runtime.server.fleet import Ask, Fleet, ask_of
from gristmill.runtime.server.fleet_metrics import FleetCollector
from gristmill.runtime.server.formats import event
from gristmill.runtime.server.logs import log_event, logger, pass_on
from gristmill.runtime.server.metrics import Lossy, Measurements
from gristmill.runtime.server.replica import RECORD, Call
from gristmill.runtime.server.reply import CLIENT_GONE, Json, refusal, until_gone
from gristmill.runtime.server.settings import Settings

ATTEMPTS = 3  # replicas that one request may be lost with
WAIT_FOR_ANOTHER_S = 60.0  # that a request which was lost waits for a replica to be ready
RECORD_S = 5.0  # for what the log says, once a client has its answer
GUARD_S = 30.0  # after its deadline, that a replica has to end a request itself
POLL_S = 0.5
SILENT_S = 10.0  # without word from a replica, after which it gets nothing more
RETRY_AFTER_S = 5


class Lost(Exception):
    """The replica is gone, or cannot be reached."""


class Link(Protocol):
    """How replicas are reached. Both methods go to the replica that `fleet.place(ask.name, ...)` names, and
    raise Lost where it is gone. A link tells the fleet who is there."""

    def answer(self, ask: Ask, call: Call) -> AsyncGenerator[list[Message], None]: ...

    async def status(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        """A replica's id and its status."""

    async def problem(self) -> tuple[str | None, bool]:
        """What is wrong with replicas that do not start, and whether none will. Raises nothing."""

    async def stop(self) -> None: ...


class Front:
    """An ASGI application, and the engine of its Gate and GentleServer."""

    def __init__(self, link: Link, fleet: Fleet, settings: Settings, log: Lossy):
        self.link, self.fleet, self.settings = link, fleet, settings
        self.measurements = Measurements()
        self.draining = False
        self.problem: str | None = None  # with replicas that do not start
        self.failed: str | None = None  # why none will start
        self.on_failure: Callable[[], None] | None = None  # then
        self.retries = 0
        self._ended = False
        self._passing: set[_Passage] = set()
        self._watching: asyncio.Task[None] | None = None
        self._polls: dict[str, asyncio.Task[None]] = {}
        self._registry = CollectorRegistry()
        self._registry.register(FleetCollector(self, log))
        ProcessCollector(registry=self._registry)

    # ---- as an engine ----

    @property
    def taken(self) -> int:
        """Requests under way."""
        return len(self._passing)

    @property
    def state(self) -> str:
        """ "starting", "ok", "failing" or "stopping"."""
        if self.draining:
            return "stopping"
        if self.fleet.ready:
            return "ok"
        return "failing" if self.problem or self.fleet.lost else "starting"

    def end_all(self) -> None:
        """Ends every request under way, in words."""
        self.draining = self._ended = True
        for passage in list(self._passing):
            passage.refuse(stopping())

    async def idle(self, timeout_s: float) -> bool:
        """Whether nothing is under way, waiting for that if need be."""
        ends = time.monotonic() + timeout_s
        while self._passing and time.monotonic() < ends:
            await asyncio.sleep(0.02)
        return not self._passing

    def start(self) -> None:
        self._watching = asyncio.ensure_future(self._watch())

    async def stop(self) -> None:
        self.end_all()
        await self.idle(10.0)
        tasks = [task for task in (self._watching, *self._polls.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.link.stop()

    # ---- looking after replicas ----

    async def _watch(self) -> None:
        ready = -1
        while True:
            problem, none_will = await self.link.problem()
            if problem != self.problem and problem:
                log_event("replicas", problem=problem)
            self.problem = problem
            if none_will and self.failed is None and not self.draining:
                self.failed = problem
                if self.on_failure is not None:
                    self.on_failure()
            for id in self.fleet.ids or [""]:
                if id not in self._polls:
                    self._polls[id] = asyncio.ensure_future(self._poll(id))
            if self.fleet.ready != ready:
                ready = self.fleet.ready
                log_event("replicas", ready=ready, lost=self.fleet.lost)
            await asyncio.sleep(POLL_S)

    async def _poll(self, id: str) -> None:
        """Asks one replica, "" for any, how it is."""
        ask = Ask(pin=id)
        self.fleet.enter(ask)
        try:
            found, status = await asyncio.wait_for(self.link.status(ask), SILENT_S)
        except (asyncio.TimeoutError, Lost):  # one that is gone the link knows of
            self.fleet.report(id, None)
        except Exception as error:
            self.fleet.report(id, None)
            logger.error("a replica does not say how it is", exc_info=error)
        else:
            self.fleet.report(found, status)
            for line in status["lines"]:
                pass_on(line, replica=found)
        finally:
            self.fleet.end(ask)
            del self._polls[id]

    # ---- as an application ----

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            try:
                await self._answer(scope, receive, send)
            except RequestError as error:
                scope["gristmill.record"]["code"] = error.code
                await refusal(error)(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.startup":
                self.start()
            else:
                await self.stop()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/health" and scope["method"] == "GET":
            await self._health()(scope, receive, send)
        elif path == "/metrics" and scope["method"] == "GET":
            text = await asyncio.to_thread(generate_latest, self._registry)
            await Response(text, media_type=CONTENT_TYPE_LATEST)(scope, receive, send)
        else:
            await self._pass(scope, receive, send)

    def _health(self) -> Response:
        problem = {} if self.problem is None else {"problem": self.problem}
        body = {"status": self.state, **problem, "replicas": self.fleet.listed()}
        return Json(body, 200 if self.state == "ok" else 503)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.draining:
            raise stopping()
        if not self.fleet.ready:
            raise _no_replica(self.problem)
        call = await _call(scope, receive)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in call.headers}
        ask = ask_of(call.path, headers, call.body)
        passage = _Passage(self, ask, call, scope, send)
        self._passing.add(passage)
        self.fleet.enter(ask)
        try:
            await passage.run(receive)
        finally:
            self._passing.discard(passage)
            self.fleet.end(ask)

    async def another(self, until: float) -> None:
        """Returns when a replica is ready. Raises RequestError where none is in time."""
        until = min(until, time.perf_counter() + WAIT_FOR_ANOTHER_S)
        while not self.fleet.ready:
            if time.perf_counter() > until:
                raise _no_replica(self.problem)
            await asyncio.sleep(0.02)


class _Passage:
    """One request on its way to a replica, and its answer on the way back."""

    def __init__(self, front: Front, ask: Ask, call: Call, scope: Scope, send: Send):
        self._front, self._ask, self._call = front, ask, call
        self._scope, self._send = scope, send
        self._begun = False  # whether something was sent
        self._ended = False  # whether all was
        self._head: Message | None = None  # sent with the first part of the body
        self._refusal: RequestError | None = None
        self._task: asyncio.Task[None] | None = None

    def refuse(self, error: RequestError) -> None:
        """Ends it from outside."""
        self._refusal = error
        if self._task is not None:
            self._task.cancel()

    async def run(self, receive: Receive) -> None:
        self._task = asyncio.ensure_future(self._try_all())
        watch = asyncio.ensure_future(until_gone(receive))
        try:
            guard = self._until + GUARD_S - time.perf_counter()
            await asyncio.wait(
                {self._task, watch}, timeout=min(guard, 1e9), return_when=asyncio.FIRST_COMPLETED
            )
            if self._ended:  # what is left is the record
                await asyncio.wait({self._task}, timeout=RECORD_S)
            if not self._task.done():
                gone = watch.done() and not self._ended
                self._task.cancel()
                await asyncio.wait({self._task})
                if gone and self._refusal is None:
                    self._scope["gristmill.record"]["status"] = CLIENT_GONE
                    return
            await self._close(receive)
        finally:
            watch.cancel()
            self._task.cancel()

    @property
    def _until(self) -> float:
        """Its deadline, by time.perf_counter."""
        return float(self._scope["gristmill.began"] + self._front.settings.deadline_s)

    async def _close(self, receive: Receive) -> None:
        """Says what went wrong, if anything did, in the way that is still open."""
        assert self._task is not None
        error = self._refusal
        if error is None and self._task.cancelled():
            error = RequestError(
                503, "the request's deadline passed and its replica said nothing; try again later",
                "deadline_exceeded", retry_after=RETRY_AFTER_S,
            )  # fmt: skip
        elif error is None and (failure := self._task.exception()) is not None:
            error = request_error(failure)
            if error.status >= 500 and not isinstance(failure, RequestError):
                logger.error("a request failed", exc_info=failure)
        if error is None or self._ended:
            return
        self._scope["gristmill.record"]["code"] = error.code
        if not self._begun:
            await refusal(error)(self._scope, receive, self._send)
            return
        await self._send({"type": "http.response.body", "body": event(error.body), "more_body": False})

    async def _try_all(self) -> None:
        """Asks replicas until one answers."""
        lost = 0
        while True:
            try:
                if not await self._try():
                    return
            except Lost as error:
                if self._begun:
                    raise RequestError(
                        503, "the replica that wrote this text was lost; ask again for a new one",
                        "replica_lost", retry_after=RETRY_AFTER_S,
                    ) from error  # fmt: skip
                lost += 1
                if lost == ATTEMPTS:
                    raise RequestError(
                        503, f"{lost} replicas were lost while they had this request; it is not tried again",
                        "replica_lost", retry_after=RETRY_AFTER_S,
                    ) from error  # fmt: skip
                self._front.fleet.unload(self._ask)
                await self._front.another(self._until)
                self._front.retries += 1

    async def _try(self) -> bool:
        """Passes one replica's answer on; whether it had no room where another may have some."""
        self._head = None
        call, age = self._call, time.perf_counter() - self._scope["gristmill.began"]
        call = Call(call.method, call.path, call.query, call.headers, call.body, age)
        async with aclosing(self._front.link.answer(self._ask, call)) as answers:
            async for messages in answers:
                for message in messages:
                    if message["type"] == RECORD:
                        self._note(message["record"])
                    elif self._is_full_elsewhere(message):
                        return True
                    else:
                        await self._forward(message)
        if not self._ended:
            raise GristmillError("a replica ended its answer in the middle")
        return False

    def _note(self, record: dict[str, Any]) -> None:
        kept = self._scope["gristmill.record"]
        kept.update({name: value for name, value in record.items() if name not in ("status", "request")})
        kept["replica"] = self._ask.member

    def _is_full_elsewhere(self, message: Message) -> bool:
        """Whether this is a refusal for want of room, and not every replica has been asked."""
        member, refused_by = self._ask.member, self._ask.refused_by
        if message["type"] != "http.response.start" or message["status"] != 429 or member is None:
            return False
        if member in refused_by:  # there is no other one to be had
            return False
        refused_by.add(member)
        return self._front.fleet.has_others(refused_by)

    async def _forward(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            return
        more = message.get("more_body", False)
        if self._head is not None:
            head, self._head = self._head, None
            self._begun = True
            await self._send(head)
        self._ended = not more
        await self._send(message)


async def _call(scope: Scope, receive: Receive) -> Call:
    """The request, whose body the Gate has read."""
    body = b""
    if scope["method"] in ("POST", "PUT", "PATCH"):
        body = (await receive()).get("body", b"")
    query = scope.get("query_string", b"")
    return Call(scope["method"], scope["path"], query, list(scope["headers"]), body, 0.0)


def _no_replica(problem: str | None) -> RequestError:
    why = "" if problem is None else f" ({problem})"
    return RequestError(
        503, f"no replica is ready{why}; try again later", "no_replica", retry_after=RETRY_AFTER_S
    )
