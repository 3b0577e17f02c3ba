"""What a page is made of: texts whose numbers keep their exact value, tables, notes and groups.

A number is never written into a string: it stays a `Number`, so the page can carry its value beside the
rounded text, and report.json can hold every one of them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from gristmill.report import units


@dataclass(frozen=True)
class Number:
    """value: exactly as in report.json; unit: how it is written."""

    value: float
    unit: units.Unit
    kind: ClassVar[str] = "number"

    def __str__(self) -> str:
        return units.text(self.value, self.unit)

    @property
    def exact(self) -> str:
        """As a program reads it."""
        return repr(self.value).replace("inf", "Infinity").replace("nan", "NaN")


@dataclass(frozen=True)
class Tag:
    """A mark beside a label. tone: good, plain, bad, or a bottleneck."""

    text: str
    tone: str = "plain"
    kind: ClassVar[str] = "tag"

    def __str__(self) -> str:
        return f"({self.text})"


@dataclass(frozen=True)
class Code:
    """Text that is shown as it stands: commands and tokens. tone: before, token, mark (sets it off);
    a command has none."""

    text: str
    tone: str = ""
    kind: ClassVar[str] = "code"

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Small:
    """What stands smaller on a line below: an interval, a reason."""

    text: Text
    kind: ClassVar[str] = "small"

    def __str__(self) -> str:
        return f" ({self.text})"


Part = str | Number | Tag | Code | Small


@dataclass(frozen=True)
class Text:
    """Parts in a row."""

    parts: tuple[Part, ...]

    @property
    def numbers(self) -> tuple[Number, ...]:
        """All of them, in the order in which they are read."""
        inside = (
            (p,) if isinstance(p, Number) else p.text.numbers if isinstance(p, Small) else ()
            for p in self.parts
        )
        return tuple(number for some in inside for number in some)

    def __str__(self) -> str:
        return "".join(str(part) for part in self.parts)


def say(pattern: str, *parts: Part | Text) -> Text:
    """`pattern` with each {} replaced by the next part: say("{} is fast", label)."""
    pieces = pattern.split("{}")
    assert len(pieces) == len(parts) + 1, f"{pattern!r} has {len(pieces) - 1} gaps, got {len(parts)} parts"
    found: list[Part] = [pieces[0]]
    for part, piece in zip(parts, pieces[1:]):
        found += [*(part.parts if isinstance(part, Text) else (part,)), piece]
    return Text(tuple(part for part in found if part != ""))


def slug(name: str) -> str:
    """`name` as an id of the page; what had to be changed gets a number so that no two become one."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode(errors='surrogatepass')):08x}"


def join(texts: list[Text], between: str = ", ") -> Text:
    return say(between.join(["{}"] * len(texts)), *texts) if texts else Text(())


def cell(value: float | str | Part | Text | None, unit: units.Unit = "count") -> Text:
    """A table's cell: a number in `unit`, a text, or a dash for what was not measured."""
    if value is None:
        return Text((units.MISSING,))
    if isinstance(value, Text):
        return value
    return Text((Number(value, unit) if isinstance(value, (int, float)) else value,))


@dataclass(frozen=True)
class Column:
    """explain: what the figures are, shown with the column's name."""

    title: str
    explain: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Row:
    """marks: dominated, failed, pick. The last of fewer cells than columns spans the rest."""

    cells: tuple[Text, ...]
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where figures come from: the command that repeats them; the machine, versions, the date."""

    command: str
    where: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    id: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    source: Source | None = None
    note: Text | None = None
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        for row in self.rows:
            assert 0 < len(row.cells) <= len(self.columns), f"{self.id}: {len(row.cells)} cells"


@dataclass(frozen=True)
class Note:
    text: Text
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Picture:
    """One figure. wide, narrow: the same as SVG, for broad and for small screens; data: its figures."""

    id: str
    title: str
    reading: Text
    data: Table
    source: Source
    wide: str
    narrow: str
    half: bool = False
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Group:
    """Blocks under a heading that folds. aside: beside it; source: of all tables in it."""

    id: str
    title: Text
    aside: Text
    blocks: tuple[Block, ...]
    open: bool = False
    source: Source | None = None
    kind: ClassVar[str] = "group"


@dataclass(frozen=True)
class Heading:
    """Of what follows inside of a group, with a sentence below it."""

    title: Text
    text: Text
    kind: ClassVar[str] = "heading"


@dataclass(frozen=True)
class Card:
    """A point worth taking: what it is best at, its name, its figures."""

    why: Text
    name: str
    facts: tuple[Text, ...]


Block = Table | Note | Picture | Group | Heading


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    lead: str
    blocks: tuple[Block, ...] = field(default=())


def blocks_in(blocks: tuple[Block, ...]) -> Iterator[Block]:
    """All blocks, those inside of groups too."""
    for block in blocks:
        yield block
        if isinstance(block, Group):
            yield from blocks_in(block.blocks)


def texts_of(block: Block) -> Iterator[tuple[str, Text]]:
    """(a name for it, text) of all that a block shows, without those of blocks inside."""
    if isinstance(block, Note):
        yield "note", block.text
    elif isinstance(block, Heading):
        yield "heading", block.title
        yield "heading", block.text
    elif isinstance(block, Group):
        yield block.id, block.title
        yield block.id, block.aside
    elif isinstance(block, Picture):
        yield f"{block.id}/reading", block.reading
        yield from texts_of(block.data)
    else:
        if block.note:
            yield f"{block.id}/note", block.note
        for i, row in enumerate(block.rows):
            for column, text in zip(block.columns, row.cells):
                yield f"{block.id}/{i}/{column.title}", text
