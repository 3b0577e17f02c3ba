"""Writing a directory that appears complete or not at all, in place of an earlier one only when asked; and
the files beside a graph that make it something a Session runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gristmill
from gristmill.runtime.artifact import (
    CHAT_TEMPLATE,
    EXPORT,
    GENERATION_CONFIG,
    PROGRAM,
    SPECIAL_TOKENS_MAP,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Artifact,
)
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.exported import EXPORT_FORMAT, EXPORT_KIND
from gristmill.runtime.program import Program

COPIED = (
    TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, "added_tokens.json", CHAT_TEMPLATE, GENERATION_CONFIG,
)  # fmt: skip
Progress = Callable[[str, float], None]
SESSION_FILES = {EXPORT, PROGRAM, *COPIED}


@contextmanager
def new_folder(out: str | Path, force: bool, is_export: Callable[[set[str]], bool]) -> Iterator[Path]:
    """A directory beside `out`, which takes its place when the block ends well.

    is_export: whether a directory with these names is an earlier export, which `force` may replace. Raises
    GristmillError where something else is there.
    """
    target = Path(out).resolve()
    _check_target(target, force, is_export)
    staging = target.parent / f".{target.name}.tmp-{os.getpid()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    staging.mkdir()
    try:
        yield staging
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _check_target(target: Path, force: bool, is_export: Callable[[set[str]], bool]) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise GristmillError(f"{target} is a file; give the name of a directory to be made")
    names = {path.name for path in target.iterdir()}
    if names and not force:
        raise GristmillError(f"{target} exists; use --force (force=True) to replace it")
    if names and not is_export(names):
        raise GristmillError(f"{target} exists and is not an export; remove it or give another name")


def write_session_files(
    folder: Path, opened: Artifact, program: Program, to: str, settings: dict[str, Any]
) -> None:
    """Tokenizer and the like, program.json, and at last export.json, which lists all files of the folder."""
    for name in COPIED:
        if name in opened.files and not (folder / name).exists():
            (folder / name).write_bytes(opened.read(name))
    (folder / PROGRAM).write_bytes(program.to_bytes())
    write_json(folder / EXPORT, {
        "kind": EXPORT_KIND, "format": EXPORT_FORMAT, "to": to, "gristmill": gristmill.__version__,
        "content_id": opened.content_id, "quantization": opened.manifest["quantization"],
        "settings": settings,
        "files": {path.name: _entry(path) for path in sorted(folder.iterdir())},
    })  # fmt: skip


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _entry(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}
