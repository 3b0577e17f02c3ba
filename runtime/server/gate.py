"""What every request passes: API key, content type and size; and one line of the log when it is done."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gristmill.runtime.server.errors import RequestError
from gristmill.runtime.server.logs import log_event
from gristmill.runtime.server.metrics import Measurements
from gristmill.runtime.server.reply import CLIENT_GONE, refusal
from gristmill.runtime.server.settings import Keys, Settings

OPEN_PATHS = ("/health",)  # need no key
ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/openapi.json")
READ_ON = 16  # times the limit that is read, and thrown away, so that the client comes to read the refusal
MOST_PATH = 200  # characters in the log


class ClientGone(Exception):
    """The connection was closed before the request was complete."""


class Counting(Protocol):
    """What is behind the gate: an Engine, or several replicas. draining: nothing new is taken."""

    draining: bool
    measurements: Measurements


class Gate:
    """ASGI middleware. It reads a request's body before anything looks at it."""

    def __init__(self, app: ASGIApp, engine: Counting, settings: Settings):
        self._app, self._engine, self._settings = app, engine, settings
        self._keys = Keys(settings.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        record: dict[str, Any] = {"status": 0, "request": secrets.token_hex(8)}
        scope["gristmill.record"], scope["gristmill.began"] = record, began
        try:
            await self._pass(scope, receive, self._noting(send, record))
        except ClientGone:
            record["status"] = CLIENT_GONE
        except BaseException:
            record["status"] = record["status"] or 500
            raise
        finally:
            self._note(scope, record, time.perf_counter() - began)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._refuse_stranger(scope)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                receive = await self._with_body(scope, receive)
        except RequestError as error:
            scope["gristmill.record"]["code"] = error.code
            await refusal(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refuse_stranger(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN_PATHS:
            return
        if not self._keys.accepts(_header(scope, b"authorization")):
            raise RequestError(
                401,
                "the API key is missing or wrong, expected `Authorization: Bearer KEY`",
                "invalid_api_key",
            )

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that gives the whole body at once. Raises RequestError for one too long or too slow."""
        if _header(scope, b"content-type").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(
                415, "the request's content type is not application/json", "unsupported_media_type"
            )
        limit, length = self._settings.max_body_bytes, _header(scope, b"content-length")
        if length.isdecimal() and int(length) > READ_ON * limit:
            raise self._too_long(int(length))
        try:
            size, body = await asyncio.wait_for(_read(receive, limit), self._settings.stall_s)
        except asyncio.TimeoutError:
            raise RequestError(
                408, f"the request's body took longer than {self._settings.stall_s:g} s", "request_timeout"
            ) from None
        if size > limit:
            raise self._too_long(size)
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def whole() -> Message:
            return messages.pop() if messages else await receive()

        return whole

    def _too_long(self, size: int) -> RequestError:
        return RequestError(
            413, f"the request has {size} bytes or more, this server takes {self._settings.max_body_bytes}",
            "request_too_large",
        )  # fmt: skip

    def _noting(self, send: Send, record: dict[str, Any]) -> Send:
        """`send` that notes the status and adds the request's number."""

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", record["request"].encode())]
                if self._engine.draining:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        return noted

    def _note(self, scope: Scope, record: dict[str, Any], seconds: float) -> None:
        path = scope["path"]
        endpoint = path if path in ENDPOINTS else "/v1/models" if path.startswith("/v1/models/") else "other"
        self._engine.measurements.requests[endpoint, record["status"]] += 1
        client = scope.get("client")
        log_event(
            "request", method=scope["method"], path=path[:MOST_PATH], client=client[0] if client else None,
            seconds=round(seconds, 4), **record,
        )  # fmt: skip


async def _read(receive: Receive, limit: int) -> tuple[int, bytes]:
    """The body, and how long it is; of one beyond the limit the length alone, so far as it was read."""
    size, parts = 0, list[bytes]()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        size += len(message.get("body", b""))
        if size <= limit:
            parts.append(message.get("body", b""))
        else:
            parts.clear()
        if not message.get("more_body", False) or size > READ_ON * limit:
            return size, b"".join(parts)


def _header(scope: Scope, name: bytes) -> str:
    found = next((value for key, value in scope["headers"] if key == name), b"")
    return str(found.decode("latin-1"))
