"""From a request to sequences that the engine can run; done in a thread, since prompts may be long."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from gristmill.runtime.decoding.generate import samples
from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.decoding.sequence import Sequence
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server.errors import RequestError
from gristmill.runtime.server.protocol import ChatRequest, CompletionRequest, ResponseFormat, Sampling
from gristmill.runtime.server.settings import Settings
from gristmill.runtime.session import Session

COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat goes on as far as it may
BANNED = -100.0  # a bias that OpenAI's interface documents as a ban
RENAMED = {"min_tokens": "min_new_tokens", "stop_token_ids": "stop_ids"}
SAME = (
    "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop",
    "no_repeat_ngram", "ignore_eos", "skip_special_tokens", "regex", "choices", *RENAMED,
)  # fmt: skip


def completion_sequences(
    session: Session, request: CompletionRequest, settings: Settings, started: float
) -> list[Sequence]:
    """n sequences of each prompt. started: when the request arrived, by time.perf_counter."""
    options = _options(session, request, settings, request.logprobs)
    asked = request.max_tokens or COMPLETION_TOKENS
    prompts = [_ids(session, prompt) for prompt in request.prompts]
    return _sequences(session, prompts, options, settings, asked, started)


def chat_sequences(
    session: Session, request: ChatRequest, settings: Settings, started: float
) -> list[Sequence]:
    """n sequences of the conversation."""
    options = _options(session, request, settings, (request.top_logprobs or 0) if request.logprobs else None)
    ids = chat_ids(session, request)
    asked = request.max_completion_tokens or request.max_tokens
    return _sequences(session, [ids], options, settings, asked, started)


def chat_ids(session: Session, request: ChatRequest) -> list[int]:
    """The token ids of the conversation. Raises RequestError where the model has no chat template."""
    if session.tokenizer.chat_template is None:
        raise RequestError(
            400,
            "this model has no chat template; use /v1/completions with a plain prompt",
            "no_chat_template",
        )
    return session.tokenizer.encode_chat([message.plain() for message in request.messages])


def adapter_of(asked: str | None, session: Session, settings: Settings) -> str | None:
    """The adapter that a request's `model` names, None for the model. Raises RequestError for others."""
    if asked is None or asked == settings.model:
        return None
    if asked in session.adapters.all:
        return asked
    known = ", ".join(map(repr, (settings.model, *session.adapters.all)))
    raise RequestError(
        404, f"the model {asked!r} does not exist here, this server has {known}", "model_not_found", "model"
    )


def _ids(session: Session, prompt: str | list[int]) -> list[int]:
    return session.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


def _sequences(
    session: Session, prompts: list[list[int]], options: GenerationOptions, settings: Settings,
    asked: int | None, started: float,
) -> list[Sequence]:  # fmt: skip
    made = []
    for ids in prompts:
        ids = session._prompt_ids(ids) if len(ids) <= session.max_len else ids
        limit = _limit(session, len(ids), settings, asked)
        sized = replace(options, max_new_tokens=limit, min_new_tokens=min(options.min_new_tokens, limit))
        made += [Sequence(session, prompt, started) for prompt in samples(ids, sized)]
    return made


def _limit(session: Session, prompt_tokens: int, settings: Settings, asked: int | None) -> int:
    """The most new tokens. Raises RequestError where context or server do not allow what is asked."""
    room = session.max_len - prompt_tokens + 1  # the last token is never read back
    if room < 1 or (asked or 0) > room:
        wants = f" and {asked} new ones were asked for" if asked else ""
        raise RequestError(
            400, f"the context holds {session.max_len} tokens, the prompt has {prompt_tokens}{wants}; "
            "shorten the prompt or ask for fewer", "context_length_exceeded", "prompt",
        )  # fmt: skip
    most = settings.max_new_tokens or room
    if asked is not None and asked > most:
        raise RequestError(
            400, f"max_tokens is {asked}, this server allows {most}", "max_tokens_exceeded", "max_tokens"
        )
    return asked or min(most, room)


def _options(
    session: Session, request: Sampling, settings: Settings, logprobs: int | None
) -> GenerationOptions:
    """What is asked for, but for the number of new tokens, which depends on the prompt's."""
    given: dict[str, Any] = {
        RENAMED.get(name, name): value for name in SAME if (value := getattr(request, name)) is not None
    }
    if request.top_k is not None:
        given["top_k"] = max(request.top_k, 0)
    if request.seed is not None:
        given["seed"] = request.seed % 2**64  # OpenAI's may be negative
    return GenerationOptions.of(
        temperature=1.0 if request.temperature is None else request.temperature,
        n=request.samples,
        max_new_tokens=2**31 - 1,
        logit_bias=_bias(request.logit_bias),
        logprobs=logprobs,
        timeout_s=settings.deadline_s,
        adapter=adapter_of(request.model, session, settings),
        **given,
        **_schema(request.response_format),
    )


def _bias(given: dict[str, float] | None) -> dict[int, float]:
    found = {}
    for name, bias in (given or {}).items():
        if not (name.isascii() and name.isdigit()):
            raise RequestError(
                400, f"logit_bias names {name[:40]!r}, expected a token id", "invalid_value", "logit_bias"
            )
        if not abs(bias) <= -BANNED:
            raise RequestError(
                400,
                f"logit_bias of {name[:40]} is {bias}, expected -100 to 100",
                "invalid_value",
                "logit_bias",
            )
        found[int(name)] = -math.inf if bias == BANNED else bias
    return found


def _schema(format: ResponseFormat | None) -> dict[str, Any]:
    if format is None or format.type == "text":
        return {}
    if format.type == "json_object":
        return {"schema": {"type": "object"}}
    if format.json_schema is None or format.json_schema.schema_ is None:
        raise RequestError(
            400, 'response_format of type "json_schema" needs {"json_schema": {"schema": {...}}}',
            "invalid_value", "response_format",
        )  # fmt: skip
    schema = format.json_schema.schema_
    if schema is False:
        raise GristmillError("the schema is false, which no text satisfies")
    return {"schema": {} if schema is True else schema}
