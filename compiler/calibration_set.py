"""The texts that calibrated methods look at, as samples of token ids.

A sample is what the tokenizer puts before every text and then tokens of the text. Of a text with more room
than is asked for, samples are taken evenly spaced. Records of a JSONL file are joined until a sample is full;
conversations go through the chat template.

Where no text is given, Python's own library is read: sources where the gate would read code as well, else the
reference in pydoc's topics. It is on every machine that runs this, at the version that
the artifact's record names.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import GristmillError
from ..runtime.evaluation import read_text
from ..runtime.tokenizer import Tokenizer
from .gate import suiting_text

PIECE_CHARACTERS = 1 << 16  # encoded at once; tokenizers slow down on long texts
DEFAULT_CHARACTERS = 1 << 22
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_RECORDS = 4096


@dataclass(frozen=True)
class CalibrationSet:
    """samples: token ids, each at most ``length`` long; name: of the text, without directories."""

    name: str
    samples: list[list[int]]
    length: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.samples))

    @property
    def sha256(self) -> str:
        """Of all ids in order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(np.array([len(sample), *sample], "<i4").tobytes())
        return digest.hexdigest()


def calibration_set(source: str | None, tokenizer: Tokenizer, samples: int, length: int) -> CalibrationSet:
    """Samples of a text file, a JSONL file or a hub data set; None: the default text.

    Raises GristmillError for a text shorter than one sample.
    """
    prefix = tokenizer.prefix_ids
    room = length - len(prefix)
    if room < 2:
        raise GristmillError(
            f"samples of {length} tokens have no room for text; use --sample-length 16 or more"
        )
    name, streams = _streams(source, tokenizer)
    needed = samples * room
    windows = [
        ids[i : i + room] for ids in _joined(streams, needed) for i in range(0, len(ids) - room + 1, room)
    ]
    if not windows:
        raise GristmillError(
            f"{name} is shorter than one sample of {length} tokens; "
            "give a longer text or a smaller --sample-length"
        )
    step = max(1.0, len(windows) / samples)
    chosen = [windows[int(i * step)] for i in range(min(samples, len(windows)))]
    return CalibrationSet(name, [prefix + window for window in chosen], length)


Stream = Iterator[list[int]]


def _joined(streams: Sequence[Stream], needed: int) -> Iterator[list[int]]:
    """The ids of each stream; a single one is read to its end, further ones until enough is there."""
    total = 0
    for stream in streams:
        ids: list[int] = []
        for part in stream:
            ids += part
            if len(ids) > 16 * needed:  # enough to choose from
                break
        yield ids
        total += len(ids)
        if total > 16 * needed:
            return


def _streams(source: str | None, tokenizer: Tokenizer) -> tuple[str, list[Stream]]:
    """A name and, for each text, its ids piece by piece."""
    if source is None:
        return _default(tokenizer)
    path = Path(source)
    if path.suffix in (".jsonl", ".ndjson") and path.exists():
        return path.name, [_record_ids(_lines(path), tokenizer)]
    if path.exists() or not HUB_NAME.fullmatch(source):
        return path.name, [_pieces(read_text(source), tokenizer)]
    return source, [_record_ids(_hub_records(source), tokenizer)]


def _pieces(text: str, tokenizer: Tokenizer) -> Stream:
    """Ids of a text, encoded piece by piece; a piece ends at a line's end where there is one."""
    start = 0
    while start < len(text):
        end = min(len(text), start + PIECE_CHARACTERS)
        line = text.rfind("\n", start, end)
        end = end if end == len(text) or line <= start else line + 1
        yield tokenizer.encode(text[start:end], add_special_tokens=False)
        start = end


def _lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise GristmillError(
                        f"{path.name} line {number} is not JSON ({error.msg}); expected one object a line"
                    ) from None


def _record_ids(records: Iterator[Any], tokenizer: Tokenizer) -> Stream:
    for number, record in enumerate(records, 1):
        fields = record if isinstance(record, dict) else {"text": record}
        if isinstance(fields.get("messages"), list):
            yield tokenizer.encode_chat(fields["messages"], add_generation_prompt=False)
        elif isinstance(fields.get("text"), str):
            yield tokenizer.encode(fields["text"], add_special_tokens=False)
        else:
            raise GristmillError(
                f"record {number} has the fields {', '.join(map(str, fields)) or 'none'}; "
                "expected a text in 'text' or a conversation in 'messages'"
            )


def _hub_records(name: str) -> Iterator[Any]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise GristmillError(
            f"{name!r} is no file; to read it as a hub data set, install it with `pip install datasets`"
        ) from None
    try:
        stream = load_dataset(name, split="train", streaming=True)
        yield from (record for record, _ in zip(stream, range(HUB_RECORDS)))
    except Exception as error:  # the library raises whatever its readers and the network raise
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise GristmillError(f"the data set {name!r} cannot be read: {line}") from error


def _default(tokenizer: Tokenizer) -> tuple[str, list[Stream]]:
    name, _ = suiting_text(tokenizer)
    kind = name.removeprefix("gate_").removesuffix(".txt")
    text = _library_sources() if kind == "code" else _library_reference()
    return f"python-{platform.python_version()}-{kind}", [_pieces(text, tokenizer)]


def _library_sources() -> str:
    """Modules of Python's standard library, in the order of their names."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text("utf-8", errors="replace")
        parts.append(text)
        size += len(text)
        if size > DEFAULT_CHARACTERS:
            break
    return "".join(parts)


def _library_reference() -> str:
    from pydoc_data.topics import topics

    return "\n".join(str(topics[name]) for name in sorted(topics))
