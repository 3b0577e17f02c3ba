"""Sends what a ticket brings: one JSON body, or server-sent events as the text comes.

Nothing is sent before the first news, so that whatever goes wrong until then has a status of its own. A
client that goes away ends its texts with the next step.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gristmill.runtime.decoding.chooser import Choice
from gristmill.runtime.server.engine import Answer, Engine, Ticket
from gristmill.runtime.server.errors import RequestError, request_error
from gristmill.runtime.server.formats import Format, event, usage_of
from gristmill.runtime.server.logs import logger

CLIENT_GONE = 499  # for the log; nobody reads it
STREAM_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}


class Json(Response):
    """Unlike Starlette's it escapes what is not ASCII: half a surrogate pair would not encode."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def refusal(error: RequestError) -> Json:
    """The response that says what is wrong."""
    return Json(error.body, error.status, error.headers)


class Reply(Response):
    """The answer to one request, sent as it comes. samples: choices of each prompt."""

    def __init__(
        self, ticket: Ticket, format: Format, engine: Engine, samples: int, stream: bool, with_usage: bool,
        log_prompts: bool,
    ):  # fmt: skip
        super().__init__()
        self._ticket, self._format, self._engine = ticket, format, engine
        self._samples, self._stream, self._with_usage = samples, stream, with_usage
        self._log_prompts = log_prompts
        self._said = [0] * len(ticket.answers)  # log-probabilities of each answer that were sent
        self._sent: list[bool] = [False] * len(ticket.answers)  # whether its last chunk was sent
        self._begun: list[bool] = [False] * len(ticket.answers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(until_gone(receive))
        watch.add_done_callback(self._ticket.leave)
        try:
            await self._something_to_send()
            if self._ticket.left:
                return
            if (error := self._error()) is not None:
                await refusal(error)(scope, receive, send)
            elif self._stream:
                await self._send_stream(send)
            else:
                await self._send_whole(scope, receive, send)
        finally:
            watch.remove_done_callback(self._ticket.leave)
            watch.cancel()
            self._ticket.close()
            self._note(scope["gristmill.record"])

    async def _something_to_send(self) -> None:
        """Returns with the first news of a stream, else at the end."""
        ticket = self._ticket
        await ticket.wait()
        while not (self._stream or ticket.finished or ticket.left or ticket.error):
            await ticket.wait()

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        answers = self._ticket.answers
        results = [answer.sequence.result for answer in answers]
        logprobs = [self._new_logprobs(index, answer) for index, answer in enumerate(answers)]
        usage = usage_of(results, self._samples)
        await Json(self._format.whole(results, logprobs, usage))(scope, receive, send)

    async def _send_stream(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for body in self._events():
            if self._ticket.left:
                return
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        """The bodies of a stream: all that is new at once, which may be several events."""
        ticket = self._ticket
        while True:
            error = self._error()
            new = b"".join([self._new_events(index) for index in range(len(ticket.answers))])
            if error is not None:
                yield new + event(error.body)
                return
            if all(self._sent):
                break
            if new:
                yield new
            await ticket.wait()
        if self._with_usage:
            usage = usage_of([answer.sequence.result for answer in ticket.answers], self._samples)
            new += event(self._format.usage_chunk(usage))
        yield new + b"data: [DONE]\n\n"

    def _new_events(self, index: int) -> bytes:
        answer = self._ticket.answers[index]
        finished = answer.finished  # before its text is taken: then that is all of it
        text = "".join(answer.sequence.take_pieces())
        logprobs = self._new_logprobs(index, answer)
        if self._sent[index] or not (text or logprobs or finished):
            return b""
        self._sent[index] = finished
        begin = b""
        if not self._begun[index]:
            self._begun[index] = True
            first = self._format.first(index)
            begin = event(first) if first is not None else b""
        more = {"usage": None} if self._with_usage else {}
        if not (logprobs or finished):
            return begin + self._format.piece(index, text, **more)
        result = answer.sequence.result if finished else None
        return begin + event(self._format.chunk(index, text, logprobs, result, **more))

    def _new_logprobs(self, index: int, answer: Answer) -> list[Choice]:
        """Those that were not sent; of the token that ended the text none is told."""
        found = answer.sequence.result.logprobs
        if found is None:
            return []
        begin, end = self._said[index], len(found)
        self._said[index] = end
        ends = answer.sequence.ending_ids
        return [choice for choice in found[begin:end] if choice.token not in ends]

    def _error(self) -> RequestError | None:
        """What the client is told instead of more text."""
        ticket = self._ticket
        if ticket.refusal is not None and ticket.cut_short:
            return ticket.refusal
        if (error := ticket.error) is not None:
            found = request_error(error)
            if found.status >= 500:
                logger.error("a text failed", exc_info=error)
            return found
        if ticket.came_too_late:
            return RequestError(
                503, "the request waited longer than its deadline; try again later", "deadline_exceeded",
                retry_after=self._engine.retry_after(),
            )  # fmt: skip
        return None

    def _note(self, record: dict[str, Any]) -> None:
        """What the log says of the request."""
        answers = self._ticket.answers
        results = [answer.sequence.result for answer in answers]
        record.update(
            id=self._format.id,
            stream=self._stream,
            prompt_tokens=sum(r.prompt_tokens for r in results[:: self._samples]),
            reused_tokens=sum(r.reused_tokens for r in results[:: self._samples]),
            completion_tokens=sum(len(r.token_ids) for r in results),
            ttft_s=round(min((r.ttft_s for r in results if r.token_ids), default=0.0), 4),
            finish_reasons=[r.finish_reason or "cancelled" for r in results],
        )
        if self._ticket.left:
            self._engine.measurements.disconnects += 1
            record["status"] = CLIENT_GONE
        if self._log_prompts:
            record["texts"] = [result.text for result in results]


async def until_gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
