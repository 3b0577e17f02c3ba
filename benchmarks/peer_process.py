"""A peer is measured in a process of its own, by a Python that has it; lines of JSON go in and out.

The peer's side tells first about itself, then answers {"prompt": P, "context": C, "tokens": N} with the
tokens per second of a prefill of P, and of N decoded after C others. Only the standard library is imported
here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def prompt_ids(count: int) -> list[int]:
    """Token ids that every vocabulary of 500 or more has."""
    return [300 + i % 200 for i in range(count)]


def serve(about: dict[str, Any], measure: Callable[..., dict[str, float]]) -> None:
    """The peer's side, until its stdin is closed."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(**json.loads(line))), flush=True)


class Peer:
    """Our side. about: what the peer tells of itself, its version among it."""

    def __init__(self, command: list[str]):
        self.command = command
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(self.command)} stopped with exit code {self.process.wait()}")
        return dict(json.loads(line))

    def measure(self, prompt: int, context: int, tokens: int) -> dict[str, Any]:
        assert self.process.stdin
        request = {"prompt": prompt, "context": context, "tokens": tokens}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
