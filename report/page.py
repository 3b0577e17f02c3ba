"""report.html, report.md and report.json of one Report.

The page is built from texts and tables whose numbers keep their values. Those that the report does not
hold itself (ratios in readings, rates) are added to it as `derived` before it is written, so every number of
the page is in report.json.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gristmill.report import choose, details, storage, summary, why
from gristmill.report.clean import clean, tidy
from gristmill.report.pictures import curves, latency, layers, memory, pareto, positions, roofline
from gristmill.report.pictures.sketch import Sketch
from gristmill.report.plots import draw, require_matplotlib
from gristmill.report.schema import Report
from gristmill.report.tables import (
    Block,
    Card,
    Code,
    Part,
    Picture,
    Section,
    Small,
    Text,
    blocks_in,
    slug,
    texts_of,
)

HTML_NAME, MARKDOWN_NAME = "report.html", "report.md"
DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Page:
    """report: as it is stored, with all that the page works out."""

    title: str
    report: Report
    facts: list[tuple[str, Text]]
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]


def write_report(report: Report, folder: Path) -> None:
    """Writes report.html, report.md and report.json into `folder`; each is replaced whole.

    Errors: GristmillError where matplotlib is missing or the folder cannot be written; no file is cut short.
    """
    require_matplotlib()
    page = build_page(report)
    texts = {
        storage.JSON_NAME: storage.to_json(page.report),
        MARKDOWN_NAME: _template("page.md.j2", autoescape=False, page=page),
        HTML_NAME: html_of(page),
    }
    storage.replace_files(Path(folder), texts)


def html_of(page: Page) -> str:
    script = (DATA / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (DATA / "page.css").read_text(encoding="utf-8")
    return _template(
        "page.html.j2", autoescape=True, page=page, script=script, script_hash=digest, style=style
    )


def build_page(report: Report) -> Page:
    """All that the page shows; its report holds every number of it."""
    report = replace(report, readings={}, derived={})
    shown: Report = tidy(report)
    page = Page(shown.title, report, summary.facts(shown), summary.cards(shown), _sections(shown))
    return replace(page, report=replace(report, readings=_readings(page), derived=_derived(page)))


def _sections(report: Report) -> tuple[Section, ...]:
    def pictures(*sketches: list[Sketch]) -> tuple[Block, ...]:
        return tuple(_draw(report, sketch) for some in sketches for sketch in some)

    found = (
        Section(
            "summary",
            "All points",
            "What each choice costs and gains.",
            (summary.table(report), *summary.gaps(report)),
        ),
        Section(
            "pareto",
            "Accuracy against cost",
            "Points that nothing beats in both lie on the dotted line.",
            pictures(pareto.sketches(report)),
        ),
        Section(
            "speed",
            "Speed",
            "Over context, batch and prompt, and as a caller sees it.",
            (*pictures(*_speed_sketches(report)), *details.speeds(report)),
        ),
        Section(
            "why",
            "Why it is as fast as it is",
            "Each kind of instruction beside its roofs, by the model time = max(bytes / read stream, "
            "operations / peak) + overhead.",
            (*pictures(roofline.sketches(report), curves.growth_sketches(report)), *why.blocks(report)),
        ),
        Section(
            "accuracy",
            "Where the errors are",
            "By layer, by position, and the tokens that suffer most.",
            (
                *pictures(layers.sketches(report), positions.sketches(report)),
                *details.last_words(report),
                *details.worst_tokens(report),
            ),
        ),
        Section(
            "memory",
            "Memory",
            "Of the file, the cache and the process.",
            (*pictures(memory.sketches(report)), *details.memory(report)),
        ),
        Section("energy", "Energy", "Only where the machine exposes it.", details.energy(report)),
        Section(
            "repeat",
            "Repeat it",
            "Each point alone, and the words that this page uses.",
            (summary.commands(report), summary.terms()),
        ),
    )
    return tuple(section for section in found if section.blocks)


def _speed_sketches(report: Report) -> list[list[Sketch]]:
    """By device, so that those of one stand together."""
    found = [*curves.sketches(report), *latency.sketches(report)]
    return [[sketch for sketch in found if sketch.device == device] for device in choose.devices(report)]


def _draw(report: Report, sketch: Sketch) -> Picture:
    id, said = slug(sketch.id), str(sketch.reading)
    wide, narrow = (
        draw(f"{id}-{name}", size, name == "narrow", sketch.title, said, sketch.paint)
        for name, size in (("wide", sketch.wide), ("narrow", sketch.narrow))
    )
    source = summary.source(report, sketch.command, sketch.device)
    data = replace(sketch.data, id=f"{id}-data")
    return Picture(id, sketch.title, sketch.reading, data, source, wide, narrow, sketch.half)


def _all_texts(page: Page) -> Iterator[tuple[str, Text]]:
    yield from ((f"head/{name}", text) for name, text in page.facts)
    for i, card in enumerate(page.cards):
        yield from ((f"best/{i}", text) for text in (card.why, *card.facts))
    for section in page.sections:
        for block in blocks_in(section.blocks):
            yield from texts_of(block)


def _readings(page: Page) -> dict[str, str]:
    pictures = (b for s in page.sections for b in blocks_in(s.blocks) if isinstance(b, Picture))
    best = {
        f"best/{i}": f"{card.why}: {card.name}; " + "; ".join(map(str, card.facts))
        for i, card in enumerate(page.cards)
    }
    return best | {picture.id: str(picture.reading) for picture in pictures}


def _derived(page: Page) -> dict[str, float]:
    """Name of its place -> value, of the numbers that the report does not hold already."""
    known = set(numbers_in(asdict(page.report)))
    found: dict[str, float] = {}
    for name, text in _all_texts(page):
        for number in text.numbers:
            if number.value not in known:
                found[_unused(name, found)] = number.value
    return found


def _unused(name: str, names: Container[str]) -> str:
    numbered = (f"{name}/{i}" for i in itertools.count(1))
    return next(n for n in itertools.chain((name,), numbered) if n not in names)


def numbers_in(value: Any) -> Iterator[float]:
    """Every number of a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _template(name: str, autoescape: bool, **values: Any) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DATA),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: (
            clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    environment.filters |= {"md": _markdown, "code": _code_span, "md_cell": _markdown_cell}
    return environment.get_template(name).render(**values)


def _markdown(text: Any) -> str:
    """Text that Markdown shows as it stands, on one line."""
    plain = " ".join(clean(str(text)).split())
    for character in "\\`*[]|":
        plain = plain.replace(character, "\\" + character)
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code_span(text: str) -> str:
    """Text as code inside of a table; a run of back quotes in it needs a longer one around."""
    plain = " ".join(clean(text).split()).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    return f"{fence} {plain} {fence}" if "`" in plain or not plain else f"{fence}{plain}{fence}"


def _markdown_cell(text: Text) -> str:
    return "".join(_markdown_part(part) for part in text.parts).strip()


def _markdown_part(part: Part) -> str:
    if isinstance(part, Code):
        return _code_span(part.text)
    if isinstance(part, Small):
        return f" ({_markdown_cell(part.text)})"
    return _markdown(f"x{part}x")[1:-1]
