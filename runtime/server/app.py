"""The routes. Everything that takes long is done elsewhere: threads read prompts, the engine decodes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server.engine import Engine
from gristmill.runtime.server.errors import RequestError, request_error
from gristmill.runtime.server.formats import ChatFormat, CompletionFormat, Format
from gristmill.runtime.server.gate import Gate
from gristmill.runtime.server.metrics import Collector, Lossy
from gristmill.runtime.server.protocol import (
    Answered,
    ChatRequest,
    CompletionRequest,
    ErrorBody,
    Model,
    Models,
    Sampling,
)
from gristmill.runtime.server.reply import Json, Reply, refusal
from gristmill.runtime.server.requests import (
    adapter_of,
    chat_sequences,
    completion_sequences,
)
from gristmill.runtime.server.settings import Settings
from gristmill.runtime.server.token_bytes import TokenBytes

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "The request is not as expected.", 401: "The API key is missing or wrong.",
        404: "There is no such model.", 408: "The body took too long.", 413: "The request is too long.",
        415: "The body is not JSON.", 429: "The queue is full; see Retry-After.",
        500: "The server failed.", 503: "The server is stopping, or the deadline passed in the queue.",
    }.items()
}  # fmt: skip
ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": Answered, "description": "The answer."}, **ERRORS}


class Server:
    """What the routes share."""

    def __init__(self, engine: Engine, settings: Settings):
        self.engine, self.settings = engine, settings
        self.created = int(time.time())
        artifact = engine.session.artifact
        self.fingerprint = "none" if artifact is None else artifact.content_id[:16]
        self.token_bytes = TokenBytes(engine.session.tokenizer)
        if settings.model in engine.session.adapters.all:
            raise GristmillError(
                f"an adapter has the model's name, {settings.model!r}; give it another one, or another "
                "--model-name"
            )

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        prompts = len(asked.prompts)
        if prompts == 0:
            raise RequestError(400, "prompt is an empty list, expected a text", "invalid_value", "prompt")
        return await self._reply(
            asked, request, CompletionFormat, prompts, completion_sequences, asked.prompt
        )

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        said = [message.model_dump(exclude_none=True) for message in asked.messages]
        return await self._reply(asked, request, ChatFormat, 1, chat_sequences, said)

    async def _reply(
        self, asked: Any, request: Request, format: Callable[..., Format], prompts: int,
        make: Callable[..., Any], prompt: Any,
    ) -> Response:  # fmt: skip
        engine, settings, scope = self.engine, self.settings, request.scope
        assert isinstance(asked, Sampling)
        if settings.log_prompts:
            scope["gristmill.record"]["prompt"] = prompt
        asked.refuse_unsupported()
        adapter = adapter_of(asked.model, engine.session, settings)
        if adapter is not None:
            scope["gristmill.record"]["adapter"] = adapter
        began: float = scope["gristmill.began"]
        making = partial(make, engine.session, asked, settings, began)
        ticket = await engine.open(prompts * asked.samples, making, began)
        made = format(adapter or settings.model, self.fingerprint, self.token_bytes)
        return Reply(
            ticket, made, engine, asked.samples, bool(asked.stream), asked.wants_usage, settings.log_prompts
        )

    def model(self, adapter: str | None = None) -> dict[str, Any]:
        """What /v1/models says of the model, or of it with an adapter."""
        found = {
            "id": adapter or self.settings.model, "object": "model", "created": self.created,
            "owned_by": "gristmill", "max_model_len": self.engine.session.max_len,
        }  # fmt: skip
        return found if adapter is None else {**found, "parent": self.settings.model}

    @property
    def models(self) -> list[dict[str, Any]]:
        return [self.model(), *map(self.model, self.engine.session.adapters.all)]


def create_app(engine: Engine, settings: Settings, log: Lossy, alone: bool = True) -> FastAPI:
    """The server as an ASGI application, which starts and stops the engine. alone: with the Gate before it,
    which else stands elsewhere, as does what starts the engine."""
    server = Server(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()

    app = FastAPI(
        title="gristmill", version=_version(), docs_url=None, redoc_url=None,
        lifespan=lifespan if alone else None,
        description="OpenAI-compatible completions of one model.",
    )  # fmt: skip
    if alone:
        app.add_middleware(Gate, engine=engine, settings=settings)
    _add_handlers(app)
    _add_generation(app, server)
    _add_models(app, server)
    _add_operation(app, engine, log)
    return app


def _add_generation(app: FastAPI, server: Server) -> None:
    @app.post("/v1/completions", responses=ANSWER, summary="Continue texts")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await server.complete(asked, request)

    @app.post("/v1/chat/completions", responses=ANSWER, summary="Answer in a conversation")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await server.chat(asked, request)


def _add_models(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models", responses={200: {"model": Models}, 401: ERRORS[401]}, summary="The models served")
    async def models() -> Response:
        return Json({"object": "list", "data": server.models})

    known: dict[int | str, dict[str, Any]] = {200: {"model": Model}, 401: ERRORS[401], 404: ERRORS[404]}

    @app.get("/v1/models/{model:path}", responses=known, summary="A model served, by its name")
    async def model(model: str) -> Response:
        return Json(server.model(adapter_of(model, server.engine.session, server.settings)))


def _add_operation(app: FastAPI, engine: Engine, log: Lossy) -> None:
    registry = CollectorRegistry()
    registry.register(Collector(engine, log))
    ProcessCollector(registry=registry)
    states: dict[int | str, dict[str, Any]] = {
        200: {"description": "Requests are taken."},
        503: {"description": "Not now; see `status`."},
    }

    @app.get("/health", responses=states, summary="Whether requests are taken")
    async def health() -> Response:
        return Json({"status": engine.state}, 200 if engine.ready else 503)

    @app.get("/metrics", summary="Measurements for Prometheus", responses={401: ERRORS[401]})
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _add_handlers(app: FastAPI) -> None:
    """Every error is an object as OpenAI's clients read it."""

    def respond(request: Request, error: RequestError) -> Response:
        request.scope["gristmill.record"]["code"] = error.code
        return refusal(error)

    @app.exception_handler(GristmillError)
    async def refused(request: Request, error: GristmillError) -> Response:
        return respond(request, request_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return respond(request, _explained(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        found = RequestError(error.status_code, str(error.detail), code)
        response = respond(request, found)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return respond(request, request_error(error))  # uvicorn logs where it came from


def _explained(error: RequestValidationError) -> RequestError:
    """The first thing that is wrong with a body, in a line."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error", ""))
        return RequestError(400, f"the body is not JSON: {reason}", "invalid_json")
    names = [str(part) for part in first["loc"] if part != "body"]
    where = ".".join(names[:4]) or "the body"
    several = {str(e["loc"][1]) for e in error.errors() if len(e["loc"]) > 2} if len(names) > 1 else set()
    if several == {"prompt"}:
        return RequestError(
            400, "prompt is not as expected: a text, token ids, or a list of either", "invalid_type", "prompt"
        )
    return RequestError(400, f"{where}: {first['msg']}", "invalid_type", names[0] if names else None)


def _version() -> str:
    try:
        return version("gristmill")
    except PackageNotFoundError:
        return "unknown"
