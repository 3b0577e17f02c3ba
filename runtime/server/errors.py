"""Refusals of requests, as the error objects of OpenAI's interface."""

from __future__ import annotations

from typing import Any

from gristmill.runtime.errors import GristmillError

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
SERVER_ERROR = "server_error"
INVALID = "invalid_request_error"


class RequestError(GristmillError):
    """What a client is told instead of an answer. retry_after: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}"""
        kind = SERVER_ERROR if self.status >= 500 else TYPES.get(self.status, INVALID)
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code},
        }

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status in (408, 413):
            found["connection"] = "close"  # the rest of the body is not read
        return {**found, "www-authenticate": "Bearer"} if self.status == 401 else found


def request_error(error: BaseException) -> RequestError:
    """What a client is told of an error: a mistake of its own in words, anything else without a detail."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, GristmillError):
        return RequestError(400, str(error), "invalid_value")
    return RequestError(500, "the server failed on this request; its log says where", "internal_error")


def stopping() -> RequestError:
    return RequestError(503, "the server is shutting down; try again later", "shutting_down", retry_after=5)
