"""Writing an artifact: everything goes to a temporary sibling directory, which is renamed when it is
complete.

An exception, Ctrl-C, SIGTERM or a full disk removes that directory. After SIGKILL it stays under a name that
nothing opens by accident, and the next compile to the same place clears it away: the directory is held by an
flock while its writer lives.

    with ArtifactWriter(out) as writer:
        weights = writer.declare_weights(specs)
        weights.write("embed.weight", array)  # in the declared order, in as many pieces as wanted
        writer.write_json("program.json", program)
        writer.seal(manifest)                 # from here on writer.path opens as an artifact: for the gate
        writer.write_json("evaluation.json", result)
        writer.commit(manifest)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from gristmill.runtime.artifact import (
    BLANK_HASH,
    FORMAT_VERSION,
    KIND,
    MANIFEST,
    PROGRAM,
    WEIGHTS,
    Artifact,
    FileEntry,
    content_id,
    is_plain_name,
    manifest_hash,
    open_artifact,
)
from gristmill.runtime.ending import termination_as_exit, unfinished
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.weights_file import TensorSpec, WeightsWriter

LOCKED_WITHIN_S = 60.0  # a writer locks its directory right after making it

_FORMAT_KEYS = ("kind", "format", "manifest_sha256", "content_id", "weights_header_sha256", "files")


class ArtifactWriter:
    """Writes the artifact directory `out`; see the module's text for the order of calls."""

    def __init__(self, out: str | Path, force: bool = False):
        self.out = Path(out).resolve()
        self.path = self.out.parent / f".{self.out.name}.tmp-{os.getpid()}"
        self._force = force
        self._files: dict[str, FileEntry] = {}
        self._weights: WeightsWriter | None = None
        self._weights_file: BinaryIO | None = None
        self._lock: int | None = None
        self._committed = False
        self._signals = ExitStack()

    def __enter__(self) -> ArtifactWriter:
        _check_target(self.out, self._force)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(self.out)
        try:
            self.path.mkdir()
            unfinished.add(self.path)
            self._lock = _lock_directory(self.path)
        except FileExistsError as error:
            raise GristmillError(f"{self.out} is being written by another compile; let it end") from error
        self._signals.enter_context(termination_as_exit())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._weights_file is not None:
                self._weights_file.close()
        except OSError:  # a full disk refuses the last buffered bytes as well; the file goes away below
            pass
        finally:
            if not self._committed:
                shutil.rmtree(self.path, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)
            unfinished.discard(self.path)
            self._signals.close()

    def declare_weights(
        self, specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None
    ) -> WeightsWriter:
        """Opens the weights file for exactly these tensors; `metadata` goes into its header."""
        assert WEIGHTS not in self._files, "the weights are complete"
        if self._weights_file is not None:
            self._weights_file.close()
        self._weights_file = (self.path / WEIGHTS).open("wb", buffering=1 << 20)
        self._weights = WeightsWriter(self._weights_file, specs, metadata)
        return self._weights

    def write_json(self, name: str, value: Any) -> None:
        """Writes file `name` as JSON: the same value gives the same bytes."""
        self.write_bytes(name, _encode_json(value))

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes file `name`, over an earlier one of that name."""
        assert is_plain_name(name) and name not in (MANIFEST, WEIGHTS), (
            f"{name!r} cannot be a file of an artifact"
        )
        (self.path / name).write_bytes(data)
        self._files[name] = FileEntry(len(data), hashlib.sha256(data).hexdigest())

    @property
    def files(self) -> dict[str, FileEntry]:
        """Size and hash of every file written so far; the weights appear once `seal` has closed them."""
        return dict(self._files)

    @property
    def size_bytes(self) -> int:
        return sum(entry.size for entry in self._files.values())

    def seal(self, manifest: dict[str, Any]) -> Path:
        """Closes the weights and writes the manifest: `path` is then an artifact, though not yet at its
        place.

        `manifest` holds the fields that are not the format's own: quantization (required), source, tools,
        limits, ...
        """
        assert not set(manifest) & set(_FORMAT_KEYS), (
            f"these manifest fields are the format's own: {_FORMAT_KEYS}"
        )
        assert isinstance(manifest.get("quantization"), dict), "the manifest needs the quantization record"
        assert PROGRAM in self._files and self._weights is not None, "an artifact needs a program and weights"
        self._close_weights(self._weights)
        fields = {
            "kind": KIND,
            "format": FORMAT_VERSION,
            "manifest_sha256": BLANK_HASH,
            "content_id": content_id(self._files, manifest["quantization"]),
            "weights_header_sha256": self._weights.header_sha256,
            **manifest,
            "files": {n: {"size": e.size, "sha256": e.sha256} for n, e in sorted(self._files.items())},
        }
        data = _encode_json(fields)
        own = f'"manifest_sha256": "{BLANK_HASH}"'.encode()
        data = data.replace(own, own.replace(BLANK_HASH.encode(), manifest_hash(data).encode()), 1)
        (self.path / MANIFEST).write_bytes(data)
        return self.path

    def commit(self, manifest: dict[str, Any]) -> Path:
        """Seals, flushes everything to the disk and moves the artifact to its place; returns that place."""
        self.seal(manifest)
        for name in (*self._files, MANIFEST):
            _fsync(self.path / name)
        _fsync(self.path)
        _check_target(self.out, self._force)
        _move_into_place(self.path, self.out)
        self._committed = True
        _fsync(self.out.parent)
        return self.out

    def commit_copy(self, source: Artifact) -> Path:
        """Makes the artifact a copy of another one, which is checked on the way; returns its place."""
        assert not self._files and self._weights is None, "something was written already"
        for name in (*source.files, MANIFEST):
            shutil.copyfile(source.path / name, self.path / name)
            _fsync(self.path / name)
        open_artifact(self.path).verify()
        _check_target(self.out, self._force)
        _move_into_place(self.path, self.out)
        self._committed = True
        _fsync(self.out.parent)
        return self.out

    def _close_weights(self, weights: WeightsWriter) -> None:
        if WEIGHTS not in self._files:
            assert self._weights_file is not None
            digest = weights.close()
            self._weights_file.close()
            self._files[WEIGHTS] = FileEntry(weights.size_bytes, digest)


def looks_like_artifact(path: Path) -> bool:
    """True for a directory that only an artifact can be, even a damaged one: what --force may replace."""
    names = [entry.name for entry in os.scandir(path) if entry.is_file()]
    folders = any(entry.is_dir() for entry in os.scandir(path))
    return not folders and (not names or (MANIFEST in names and (PROGRAM in names or WEIGHTS in names)))


def _check_target(out: Path, force: bool) -> None:
    if out == out.parent or not out.name:
        raise GristmillError(f"{out} cannot be replaced by an artifact; give a directory of its own")
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise GristmillError(f"{out} is a file; give the name of a directory to be made")
    if not looks_like_artifact(out):
        raise GristmillError(f"{out} exists and is not a gristmill artifact; remove it or give another name")
    if not force and any(out.iterdir()):
        raise GristmillError(f"{out} exists; use --force (force=True) to replace it")


def _clear_leftovers(out: Path) -> None:
    """Removes what killed compiles to `out` left, and puts back what one had moved aside."""
    for kind in ("old", "tmp"):
        for path in out.parent.glob(f".{_escape(out.name)}.{kind}-*"):
            if _is_alive(path):
                continue
            if kind == "old" and not out.exists():
                path.rename(out)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _is_alive(path: Path) -> bool:
    """True while the writer of `path` lives, here or (by its lock) in another container.

    Its process id alone proves nothing beyond the moments in which it holds no lock: another process may
    have that number by now.
    """
    pid = path.name.rpartition("-")[2]
    if not pid.isdigit():
        return True  # not one of ours
    try:
        os.close(_lock_directory(path))
    except OSError:
        return True
    if int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists():
        return False
    return ".old-" in path.name or time.time() - path.stat().st_mtime < LOCKED_WITHIN_S


def _lock_directory(path: Path) -> int:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _move_into_place(source: Path, out: Path) -> None:
    """Renames `source` to `out`; an artifact that is there goes aside first and comes back if that fails."""
    if not out.exists():
        source.rename(out)
        return
    aside = out.parent / f".{out.name}.old-{os.getpid()}"
    out.rename(aside)
    try:
        source.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _encode_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
