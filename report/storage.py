"""report.json: a Report as JSON and back, exactly; keys that are not known and other formats are errors."""

from __future__ import annotations

import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from gristmill.report.schema import FORMAT, Report
from gristmill.runtime.errors import GristmillError

JSON_NAME = "report.json"
_ODD = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no such numbers


def to_json(report: Report) -> str:
    """The text of report.json; numbers that JSON lacks are the strings of `_ODD`."""
    return json.dumps(_plain(asdict(report)), indent=1, allow_nan=False) + "\n"


def from_json(text: str, name: str = JSON_NAME) -> Report:
    """The report that `to_json` wrote. name: of the file, for errors."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise GristmillError(f"{name} is not JSON ({error}); measure again, or take a whole copy") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        got = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise GristmillError(f"{name} has format {got!r}, this version reads {FORMAT}; measure again")
    report: Report = _read(value, Report, name)
    return report


def read_report(path: str | Path) -> Report:
    """The report at `path`: a report.json or the folder that holds one."""
    file = Path(path)
    file = file / JSON_NAME if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GristmillError(f"cannot read {file} ({error}); give a report.json or its folder") from error
    return from_json(text, str(file))


def replace_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes name -> text into `folder`: all to temporary files first, so each is the old or the new one."""
    ready: list[tuple[str, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            ready.append((_temporary(folder, name, text), folder / name))
        for temporary, target in ready:
            os.replace(temporary, target)
    except OSError as error:
        raise GristmillError(f"cannot write the report to {folder} ({error}); give another folder") from error
    finally:
        for temporary, _ in ready:
            Path(temporary).unlink(missing_ok=True)


def _temporary(folder: Path, name: str, text: str) -> str:
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return temporary


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _read(value: Any, kind: Any, where: str) -> Any:
    """An instance of the dataclass `kind` from a JSON object."""
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    known = {f.name: f for f in fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise GristmillError(f"{where} has the unknown key {unknown[0]!r}; expected {', '.join(known)}")
    needed = (n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING)
    missing = [name for name in needed if name not in value]
    if missing:
        raise GristmillError(f"{where} lacks {missing[0]!r}; measure again, or take a whole copy")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _convert(item, hints[name], f"{where}: {name}") for name, item in value.items()})


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else _convert(value, inner, where)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(where, value, "one of " + ", ".join(map(str, arguments)))
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        return tuple(_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        return {key: _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    return _read(value, hint, where) if is_dataclass(hint) else _scalar(value, hint, where)


def _scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is float and isinstance(value, str) and value in _ODD:
        return _ODD[value]
    allowed = (int, float) if hint is float else hint
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise _wrong(
            where, value, {float: "a number", int: "a whole number", str: "text"}.get(hint, str(hint))
        )
    return value


def _wrong(where: str, value: Any, expected: str) -> GristmillError:
    got = repr(value)
    return GristmillError(f"{where} is {got if len(got) < 60 else got[:57] + '...'}, expected {expected}")


def plain(value: Any) -> Any:
    """A dataclass of `schema` (or a tuple of them) as JSON has it."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return _plain(asdict(value))


def value_of(value: Any, kind: Any, where: str) -> Any:
    """What `plain` made, as `kind` again: a dataclass, or a tuple of one such as tuple[PhaseWhy, ...]."""
    return _convert(value, kind, where)
