"""Requests and answers of OpenAI's interface, as far as this server takes and gives them.

A parameter that would change the answer and is not supported is refused; what does not touch the answer is
ignored. Names beyond OpenAI's are those of vLLM where it has them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gristmill.runtime.decoding.options import refuse_unknown
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server.errors import RequestError

MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256
HARMLESS = frozenset({  # they change where, when or how an answer is kept, not what it says
    "user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prediction", "parallel_tool_calls",
})  # fmt: skip
REFUSED = {  # parameter -> values that ask for nothing
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
Stop = str | list[str] | None


class Strict(BaseModel):
    """JSON's own types, no conversions; unknown names are kept, to be refused in words."""

    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(strict=True, populate_by_name=True)
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Strict):
    """What both endpoints take."""

    model: str | None = Field(
        None, description="A name that /v1/models gives, the model's or an adapter's; default: the model's."
    )
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, description="0 takes the most likely token; default 1.")
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1)
    stop: Stop = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, description="Token id to a bias from -100 to 100.")
    response_format: ResponseFormat | None = None
    top_k: int | None = Field(None, ge=-1, description="Extension: draw from so many; 0 and -1: from all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Extension.")
    typical_p: float | None = Field(None, gt=0, le=1, description="Extension.")
    repetition_penalty: float | None = Field(None, gt=0, description="Extension.")
    no_repeat_ngram: int | None = Field(None, ge=0, description="Extension.")
    min_tokens: int | None = Field(None, ge=0, description="Extension.")
    stop_token_ids: list[int] | None = Field(None, description="Extension.")
    ignore_eos: bool | None = Field(None, description="Extension.")
    skip_special_tokens: bool | None = Field(None, description="Extension.")
    regex: str | None = Field(None, description="Extension: the whole text matches it.")
    choices: list[str] | None = Field(None, description="Extension: the text is one of these.")

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def refuse_unsupported(self) -> None:
        """Raises RequestError for what would change the answer and is not known here."""
        given = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        for name, value in given.items():
            if name in HARMLESS or (name in REFUSED and value in REFUSED[name]):
                continue
            if name in REFUSED:
                raise RequestError(
                    400,
                    f"{name} is not supported by this server; leave it out",
                    "unsupported_parameter",
                    name,
                )
            try:
                refuse_unknown([name], type(self).model_fields, "the request")
            except GristmillError as error:
                raise RequestError(400, str(error), "unknown_parameter", name) from error
        self._refuse_mixed()

    def _refuse_mixed(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                400, "stream_options needs stream to be true", "invalid_value", "stream_options"
            )
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or any(len(stop) > MOST_STOP_CHARACTERS for stop in stops):
            raise RequestError(
                400,
                f"stop is too much, expected at most {MOST_STOPS} texts of {MOST_STOP_CHARACTERS} characters",
                "invalid_value",
                "stop",
            )


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, token ids, or a list of either."
    )
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return list(given)


class Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    type: str
    text: str | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates know it. Raises RequestError for what is no text."""
        unknown = [name for name, value in (self.model_extra or {}).items() if value not in (None, [])]
        if unknown:
            raise RequestError(
                400, f"a message's {unknown[0]} is not supported, expected role and content",
                "unsupported_parameter", "messages",
            )  # fmt: skip
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        if isinstance(self.content, str):
            return {"role": role, "content": self.content, **named}
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise RequestError(
                    400, f"a message holds a part of type {part.type!r}, this model reads text alone",
                    "unsupported_content", "messages",
                )  # fmt: skip
        return {"role": role, "content": "".join(part.text or "" for part in self.content), **named}


class ChatRequest(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def _refuse_mixed(self) -> None:
        super()._refuse_mixed()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs to be true", "invalid_value", "top_logprobs")
        asked = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(asked) > 1:
            raise RequestError(
                400,
                "max_tokens and max_completion_tokens differ; give one of them",
                "invalid_value",
                "max_tokens",
            )


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Answered(BaseModel):
    """An answer that is not streamed; choices differ between the endpoints."""

    id: str
    object: Literal["text_completion", "chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[dict[str, Any]]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: str | None = Field(None, description="Of an adapter: the model that it changes.")


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]
