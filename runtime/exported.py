"""A folder that `gristmill export` made for another runtime, opened as what a Session runs.

Its export.json lists the files with size and sha256, and says what wrote it; program.json is the artifact's,
with the limits and the cache types of the folder.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from gristmill.runtime.artifact import EXPORT, PROGRAM, Artifact, FileEntry, is_plain_name, parse_json
from gristmill.runtime.devices import EXPORTS
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program

EXPORT_KIND, EXPORT_FORMAT = "gristmill export", 1


def open_export(path: str | Path, to: str) -> Artifact:
    """Opens the folder at `path`, which must have been exported to `to`; sizes are checked here, hashes when
    a file is read. Raises GristmillError for anything else, and for an artifact."""
    root, file = Path(path), Path(path) / EXPORT
    how = f"write one with `gristmill export ARTIFACT --to {to} -o DIRECTORY`"
    if not file.is_file():
        raise GristmillError(f"{root} has no {EXPORT}: not an export to {to}; {how}")
    found = parse_json(file.read_bytes(), file)
    if found.get("kind") != EXPORT_KIND or found.get("to") != to:
        raise GristmillError(f"{root} is an export to {found.get('to')!r}, expected {to}; {how}")
    if found.get("format") != EXPORT_FORMAT:
        raise GristmillError(
            f"{file} has format {found.get('format')!r}, this gristmill reads {EXPORT_FORMAT}; export again"
        )
    files = found.get("files")
    if not isinstance(files, dict) or PROGRAM not in files:
        raise GristmillError(f"{file} lists no {PROGRAM}; export again")
    for name, entry in files.items():
        if not is_plain_name(name) or not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise GristmillError(f"{file}: {name!r} is no file with size and sha256; export again")
        if not (root / name).is_file() or (root / name).stat().st_size != entry["size"]:
            raise GristmillError(
                f"{root / name} is missing or has another size than {EXPORT} says; export again"
            )
    entries = {name: FileEntry(e["size"], e["sha256"]) for name, e in files.items()}
    return Artifact(root, found, entries, EXPORT, "export again")


def open_executor_of(
    device: str, folder: Artifact, program: Program, threads: int, max_len: int, max_slots: int
) -> Any:
    """The executor of a device in EXPORTS, whose libraries are imported now.

    What follows a colon in the device's name goes to it as `place`.
    """
    home = import_module(f"gristmill.runtime.{EXPORTS[device]}")
    _, _, place = device.partition(":")
    how = {"place": place} if place else {}
    return home.open_executor(folder, program, threads, max_len, max_slots, **how)
