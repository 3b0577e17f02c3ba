"""Signals that wait: Ctrl-C within a forward would leave the other ranks in the middle of theirs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WAITING = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Python's handlers of WAITING run when the block is done; elsewhere than in the main thread none run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    found: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in WAITING}
    before = {number: handler for number, handler in found.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda n, frame: came.append((n, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for signaled, frame in came:
            before[signal.Signals(signaled)](signaled, frame)
