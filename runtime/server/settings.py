"""What an operator may set, and the keys that clients must show."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gristmill.runtime.decoding.options import check_integer, check_number
from gristmill.runtime.errors import GristmillError

KEYS_VARIABLE = "GRISTMILL_API_KEYS"
MAX_BODY_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Settings:
    """max_queue: sequences that may wait beside those in a slot. max_new_tokens: the most that a request may
    ask for; None: what the context leaves. max_body_bytes: of a request. deadline_s: from a request's arrival
    to the end of its text. grace_s: what a shutdown leaves to requests under way. stall_s: how long a client
    may take to send a request, and how long it may leave what was sent to it unread. keys: accepted API keys,
    none for open access. log_prompts: prompts and texts stand in the log."""

    model: str
    max_queue: int = 256
    max_new_tokens: int | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    deadline_s: float = 600.0
    grace_s: float = 30.0
    stall_s: float = 30.0
    keys: tuple[str, ...] = ()
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise GristmillError("the model's name is empty, expected some text")
        check_integer("max_queue", self.max_queue, 0, 1_000_000)
        if self.max_new_tokens is not None:
            check_integer("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        check_integer("max_body_bytes", self.max_body_bytes, 1024, 2**31 - 1)
        for name in ("deadline_s", "grace_s", "stall_s"):
            check_number(name, getattr(self, name), 0.0 if name == "grace_s" else 0.001, math.inf)


class Keys:
    """Compares keys by their hashes, all of them at every call: the time says nothing about any."""

    def __init__(self, keys: Iterable[str]):
        self._hashes = [_hash(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def accepts(self, authorization: str) -> bool:
        """Whether the value of an Authorization header is `Bearer` and one of the keys."""
        scheme, _, key = authorization.partition(" ")
        given = _hash(key.strip())
        equal = [hmac.compare_digest(given, known) for known in self._hashes]
        return any(equal) and scheme.lower() == "bearer"


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: str | None) -> tuple[str, ...]:
    """API keys from a file, one a line (# begins a comment), and from the environment, commas between them.

    Raises GristmillError where a file was named and holds none.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise GristmillError(f"{path} is not UTF-8 text; expected one API key on each line") from error
        found = [line.strip() for line in lines if not line.lstrip().startswith("#")]
        if not any(found):
            raise GristmillError(f"{path} holds no API key; expected one on each line")
        keys += found
    return tuple(dict.fromkeys(key for key in keys if key))
