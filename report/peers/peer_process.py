"""A peer is measured in a process of its own, by a Python that has it; lines of JSON go in and out.

The peer's side tells first about itself, then answers requests:

    {"prompt": P, "context": C, "tokens": N}   tokens per second of a prefill of P, and of N decoded after C
                                               others; first_s: of the prefill; token_s: each of the N
    {"logits": [ids], "out": FILE}             [ids, vocabulary] f32 as FILE.npy, where it has them
    {"memory": true}                           resident and peak bytes

Only the standard library is imported here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO


class PeerStopped(RuntimeError):
    """The peer ended, or could not be started; the text says why as far as the peer did."""


@dataclass
class Engine:
    """A loaded peer. about: its version and what else it tells of itself; logits: (ids, file) writes them."""

    about: dict[str, Any]
    measure: Callable[..., dict[str, Any]]
    logits: Callable[[list[int], str], None] | None = field(default=None)


def prompt_ids(count: int) -> list[int]:
    """Token ids that every vocabulary of 500 or more has."""
    return [300 + i % 200 for i in range(count)]


def own_stdout() -> TextIO:
    """stdout for answers alone: what libraries print from now on goes to where errors go."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def serve(engine: Engine, out: TextIO | None = None) -> None:
    """The peer's side, until its stdin is closed. out: from `own_stdout`, before the engine was loaded."""
    out = out or own_stdout()
    _say(out, {**engine.about, "logits": engine.logits is not None})
    for line in sys.stdin:
        _say(out, _answer(engine, json.loads(line)))


def _answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    if "logits" in request:
        assert engine.logits, "this peer gives no logits"
        engine.logits(request["logits"], request["out"])
        return {}
    return memory() if "memory" in request else engine.measure(**request)


def memory() -> dict[str, Any]:
    """Resident and peak bytes of this process; None where the system does not say."""
    found: dict[str, Any] = {"resident_bytes": None, "peak_bytes": None}
    names = {"VmRSS:": "resident_bytes", "VmHWM:": "peak_bytes"}
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return found
    for words in (line.split() for line in lines):
        if words and words[0] in names:
            found[names[words[0]]] = int(words[1]) * 1024
    return found


def speeds(prompt: int, first_s: float, token_s: list[float]) -> dict[str, Any]:
    """The answer to a measurement from its times in seconds."""
    return {
        "prefill_tok_s": prompt / first_s,
        "decode_tok_s": len(token_s) / sum(token_s),
        "first_s": first_s,
        "token_s": token_s,
    }


def _say(out: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=out, flush=True)


def command_of(python: str, *arguments: str) -> list[str]:
    """What starts a peer's Python with the commands of this folder."""
    return [python, str(Path(__file__).resolve().parent), *arguments]


class Peer:
    """Our side. about: what the peer tells of itself, its version among it."""

    def __init__(self, command: list[str]):
        self.command = command
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
            )
        except OSError as error:
            raise PeerStopped(f"{command[0]} cannot be started: {error.strerror}") from None
        self.about = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise PeerStopped(
                f"{' '.join(self.command)} stopped with exit code {self.process.wait()}{self._said()}"
            )
        return dict(json.loads(line))

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # reading says why
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.read()

    def measure(self, prompt: int, context: int, tokens: int) -> dict[str, Any]:
        return self.ask({"prompt": prompt, "context": context, "tokens": tokens})

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):  # it has ended already, with a request unread
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def _said(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return f": {lines[-1][:300]}" if lines else ""
