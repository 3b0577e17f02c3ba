"""Texts as the JSON of OpenAI's two endpoints: whole, or in chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

from gristmill.runtime.decoding.chooser import Choice
from gristmill.runtime.decoding.sequence import Generation

TokenBytes = Callable[[int], bytes]
MARK = "\0text\0"
LEAST = -9999.0  # JSON has no infinity
FINISH = {"timeout": "length"}  # OpenAI's interface has no word for a text that ran out of time


class Format:
    """What is the same in every chunk of one answer. model: the name served; fingerprint: of the artifact."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, fingerprint: str, token_bytes: TokenBytes):
        self._bytes = token_bytes
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._common = {"created": int(time.time()), "model": model, "system_fingerprint": fingerprint}
        self._offsets: dict[int, int] = {}  # characters of each choice whose tokens were named
        self._frames: dict[int, list[bytes]] = {}  # of each choice, what stands around a piece of text

    def whole(self, results: Sequence[Generation], logprobs: Sequence[list[Choice]], usage: Any) -> Any:
        """The answer that is not streamed."""
        choices = [
            {**self._message(index, result.text, logprobs[index]), "index": index, **finish_of(result)}
            for index, result in enumerate(results)
        ]
        return self._body(self.whole_object, choices, usage=usage)

    def chunk(
        self, index: int, text: str, logprobs: list[Choice], result: Generation | None, **more: Any
    ) -> dict[str, Any]:
        """A piece of choice `index`; result: at its end."""
        choice = {"index": index, **self._delta(index, text, logprobs), **finish_of(result)}
        return self._body(self.chunk_object, [choice], **more)

    def piece(self, index: int, text: str, **more: Any) -> bytes:
        """The event of `chunk` for text alone, which nearly all pieces are."""
        if index not in self._frames:
            self._frames[index] = event(self.chunk(index, MARK, [], None, **more)).split(
                encode_basestring_ascii(MARK).encode()
            )
        before, after = self._frames[index]
        return before + encode_basestring_ascii(text).encode() + after

    def first(self, index: int) -> dict[str, Any] | None:
        """What stands before the first piece of a choice."""
        return None

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that asked for it."""
        return self._body(self.chunk_object, [], usage=usage)

    def _body(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, **self._common, "choices": choices, **more}

    def _message(self, index: int, text: str, logprobs: list[Choice]) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, index: int, text: str, logprobs: list[Choice]) -> dict[str, Any]:
        raise NotImplementedError


class CompletionFormat(Format):
    """/v1/completions"""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _message(self, index: int, text: str, logprobs: list[Choice]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(index, logprobs)}

    _delta = _message

    def _logprobs(self, index: int, choices: list[Choice]) -> dict[str, Any] | None:
        if not choices:
            return None
        offsets, at = [], self._offsets.get(index, 0)
        for choice in choices:
            offsets.append(at)
            at += len(self._bytes(choice.token).decode("utf-8", "replace"))
        self._offsets[index] = at
        return {
            "tokens": [self._text(choice.token) for choice in choices],
            "token_logprobs": [_number(choice.logprob) for choice in choices],
            "top_logprobs": [
                {self._text(i): _number(value) for i, value in reversed(c.top)} for c in choices
            ],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        """Names differ where tokens do, since `top_logprobs` is a mapping."""
        data = self._bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatFormat(Format):
    """/v1/chat/completions"""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return self._body(
            self.chunk_object, [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
        )

    def _message(self, index: int, text: str, logprobs: list[Choice]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(logprobs)}

    def _delta(self, index: int, text: str, logprobs: list[Choice]) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": self._logprobs(logprobs)}

    def _logprobs(self, choices: list[Choice]) -> dict[str, Any] | None:
        if not choices:
            return None
        content = [
            {
                **self._token(choice.token, choice.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in choice.top],
            }
            for choice in choices
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._bytes(token)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": _number(logprob)}


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _number(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)


def finish_of(result: Generation | None) -> dict[str, Any]:
    """Why a text ended; with "stop_reason", an extension, where "length" is short for the deadline."""
    if result is None:
        return {"finish_reason": None}
    reason = result.finish_reason or ""
    more = {"stop_reason": reason} if reason in FINISH else {}
    return {"finish_reason": FINISH.get(reason, reason), **more}


def usage_of(results: Iterable[Generation], samples: int) -> dict[str, Any]:
    """Tokens of all choices; a prompt counts once, however many `samples` it has."""
    results = list(results)
    firsts = results[::samples]
    prompt, completion = sum(r.prompt_tokens for r in firsts), sum(len(r.token_ids) for r in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(r.reused_tokens for r in firsts)},
    }
