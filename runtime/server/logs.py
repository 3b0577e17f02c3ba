"""A log of JSON lines that never holds up what it tells of.

Lines go through a bounded queue to a thread that writes them. A full disk, a reader of a pipe that stands
still or a queue that is full costs lines, which are counted, and nothing else.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import queue
import threading
import traceback
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from gristmill.runtime.errors import GristmillError

MOST_WAITING = 10_000
CLOSING_S = 2.0
logger = logging.getLogger("gristmill.server")
LOGGERS = (logger.name, "uvicorn.error")


class JsonLines(logging.Formatter):
    """{"time", "level", "event", ...}; fields of a record come as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if (
            record.exc_info and record.exc_info[1] is not None
        ):  # where, not what: a message may quote a prompt
            error = record.exc_info[1]
            line["exception"] = type(error).__name__
            frames = traceback.extract_tb(error.__traceback__)
            line["traceback"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line)


class _File:
    """Writes lines to a file descriptor, whole or not at all as far as the disk lets it. It is no handler:
    Python waits for those when it exits, and a write may never return."""

    def __init__(self, log: Log, path: str | None):
        self._log, self._lines = log, JsonLines()
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.dup(2) if path is None else os.open(path, flags, 0o640)
        except OSError as error:
            raise GristmillError(f"the log {path} cannot be opened: {error.strerror}") from error
        self._torn = False  # the last line was cut short

    def write(self, record: logging.LogRecord) -> None:
        data = (b"\n" if self._torn else b"") + self._lines.format(record).encode() + b"\n"
        try:
            written = os.write(self._descriptor, data)
        except OSError:
            self._log.dropped += 1
            return
        self._torn = written < len(data)
        self._log.dropped += self._torn

    def close(self) -> None:
        os.close(self._descriptor)


class _Queue(logging.handlers.QueueHandler):
    def __init__(self, log: Log, waiting: queue.Queue[Any]):
        super().__init__(waiting)
        self._log = log

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # for a thread of this process, which formats it

    def handleError(self, record: logging.LogRecord) -> None:
        self._log.dropped += 1


class Log:
    """Where the server's loggers write while it is open. path: None for stderr. dropped: lost lines."""

    def __init__(self, path: str | None):
        self.dropped = 0
        self._closed = False
        self._file = _File(self, path)
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(MOST_WAITING)
        self._handler = _Queue(self, self._waiting)
        self._thread = threading.Thread(target=self._write, name="gristmill-log", daemon=True)
        self._thread.start()
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(self._handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False

    def close(self) -> None:
        """Writes what waits, as far as it can be written soon, and ends the thread."""
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
        self._handler.close()
        self._closed = True
        with suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSING_S)
        self._thread.join(CLOSING_S)

    def _write(self) -> None:
        while not (self._closed and self._waiting.empty()):
            record = self._waiting.get()
            if record is not None:
                self._file.write(record)
        self._file.close()


def pass_on(line: str, **fields: Any) -> None:
    """A line that another process's JsonLines has made, into this one's log; fields: added to it."""
    found = json.loads(line)
    level = logging.getLevelName(found.pop("level").upper())
    found["said"] = found.pop("time")  # this one's own is a moment later
    logger.log(level, found.pop("event"), extra={"fields": {**found, **fields}})


def log_event(event: str, **fields: Any) -> None:
    """One line of the server's log."""
    logger.info(event, extra={"fields": fields})
