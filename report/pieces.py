"""Measured pieces of a sweep as files: what a killed run has done, the next one finds.

A piece is one JSON file, named by its kind and the hash of all that it depends on, and written to a temporary
name that is then renamed: it is there whole or not at all. Speeds depend on the run as well: they are taken
again by every run that is asked for, and kept within it.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.report.identity import digest
from gristmill.report.jobs import PATIENCE
from gristmill.runtime.errors import GristmillError

RUN = "run.json"
MOST_SECONDS = 24 * 3600.0  # that a run may have lain before its speeds are too old to be gone on with


@dataclass(frozen=True)
class Piece:
    """value: JSON; seconds: that it took; created: seconds since the epoch."""

    value: Any
    seconds: float
    created: float


@dataclass(frozen=True)
class Run:
    """One measuring of everything, over as many starts as it takes. started: seconds since the epoch."""

    id: str
    started: float
    fresh: bool = False
    done: bool = False
    resumed: bool = False


class Pieces:
    """The folder of pieces, held by one process at a time."""

    def __init__(self, folder: Path, patience: float = PATIENCE + 2) -> None:
        """patience: seconds to wait for another process. Raises GristmillError where that holds on."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            os.set_inheritable(self._lock, True)  # a task that outlives its sweep keeps the next one waiting
        except OSError as error:
            raise GristmillError(f"{folder} cannot be written ({error.strerror}); give another -o") from None
        until = time.monotonic() + patience
        while not self._locks():
            if time.monotonic() > until:
                os.close(self._lock)
                raise GristmillError(
                    f"{folder.parent}: another report is being made there; let it end, or give another -o"
                )
            time.sleep(0.05)

    def _locks(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def close(self) -> None:
        os.close(self._lock)

    def get(self, kind: str, key: dict[str, Any], since: float = 0.0) -> Piece | None:
        """A piece made since then, None where there is none. A damaged file is none."""
        found = _read(self._path(kind, key))
        if found is None or found.get("key") != _plain(key) or found["created"] < since:
            return None
        return Piece(found["value"], found["seconds"], found["created"])

    def put(self, kind: str, key: dict[str, Any], value: Any, seconds: float) -> Piece:
        """Raises GristmillError where the disk is full."""
        piece = Piece(_plain(value), seconds, time.time())
        entry = {"kind": kind, "key": _plain(key), "created": piece.created, "seconds": seconds}
        self._write(self._path(kind, key), {**entry, "value": piece.value})
        return piece

    def seconds(self, kind: str) -> list[float]:
        """What pieces of this kind took, for estimates."""
        entries = (_read(path) for path in self.folder.glob(f"{kind}-*.json"))
        return [float(entry["seconds"]) for entry in entries if entry is not None]

    def begin(self, fresh: bool, reuse: bool) -> Run:
        """The run to go on with, or a new one. reuse: one that is done will do.

        A new one forgets the speeds of those before it. Raises GristmillError where the disk is full.
        """
        entry = _read(self.folder / RUN, ("id", "started", "fresh", "done"))
        if entry is not None and time.time() - entry["started"] < MOST_SECONDS:
            fits = reuse if entry["done"] else entry["fresh"] == fresh
            if fits:
                return Run(entry["id"], entry["started"], entry["fresh"], False, True)
        run = Run(uuid.uuid4().hex[:12], time.time(), fresh)
        self._save(run)
        for path in self.folder.glob("*-*.json"):
            found = _read(path)
            if found is None or found["key"].get("run") not in (None, run.id):
                path.unlink(missing_ok=True)
        return run

    def finish(self, run: Run) -> None:
        self._save(Run(run.id, run.started, run.fresh, True))

    def _save(self, run: Run) -> None:
        entry = {"id": run.id, "started": run.started, "fresh": run.fresh, "done": run.done}
        self._write(self.folder / RUN, entry)

    def _path(self, kind: str, key: dict[str, Any]) -> Path:
        return self.folder / f"{kind}-{digest(key)}.json"

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(value, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise GristmillError(
                f"{path} cannot be written ({error.strerror or error}); make room and run it again: "
                "it goes on"
            ) from None


def _read(
    path: Path, needed: tuple[str, ...] = ("key", "value", "seconds", "created")
) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and all(name in found for name in needed) else None


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
