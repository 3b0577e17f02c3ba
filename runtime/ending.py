"""A run that ends soon after a signal, whatever its main thread is in.

Python runs a signal's handler between two of its own instructions, and one operation of torch may take
minutes. So a thread is told of signals as they come (signal.set_wakeup_fd): where the main thread has not
ended in time, or a second signal comes, it removes what is half written and ends the process.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 1.0  # for the main thread to end by itself
SHOW_CURSOR = b"\x1b[?25h"

unfinished: set[Path] = set()  # directories that must not outlive this process


@contextmanager
def ended_by_signals(grace_s: float = GRACE_S) -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise SystemExit, and after each of ENDING the process ends within grace_s
    seconds, with 128 and the signal's number as exit code. Elsewhere than in the main thread it does nothing.
    """
    if not _on_main_thread():
        yield
        return
    came, comes = socket.socketpair()
    comes.setblocking(False)
    before = signal.set_wakeup_fd(comes.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(came, grace_s), name="gristmill-ending", daemon=True).start()
    try:
        with termination_as_exit():
            yield
    finally:
        signal.set_wakeup_fd(before)
        comes.close()  # with which the thread ends


@contextmanager
def termination_as_exit() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise SystemExit, where nothing else handles them. Elsewhere than in the
    main thread it does nothing."""
    defaults = []
    if _on_main_thread():  # no other may
        defaults = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in defaults:
        signal.signal(number, _exit_by)
    try:
        yield
    finally:
        for number in defaults:
            signal.signal(number, signal.SIG_DFL)


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _exit_by(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _watch(came: socket.socket, grace_s: float) -> None:
    with came:
        first = _next_ending(came)
        if first is None:
            return
        came.settimeout(grace_s)
        with suppress(TimeoutError):
            if _next_ending(came) is None:
                return
    _end_now(first)


def _next_ending(came: socket.socket) -> int | None:
    """The next signal that ends a run, None where there is nothing to end any more. Raises TimeoutError."""
    while number := came.recv(1):
        if number[0] in ENDING:
            return number[0]
    return None


def _end_now(number: int) -> NoReturn:
    for path in list(unfinished):
        aside = path.with_name(f"{path.name.rpartition('-')[0]}-ended-{os.getpid()}")
        with suppress(OSError):  # it has moved to its place meanwhile, and is whole
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, SHOW_CURSOR + b"\n")
        if number == signal.SIGINT:
            os.write(2, b"interrupted\n")
    os._exit(128 + number)
