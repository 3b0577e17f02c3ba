"""The page: valid, closed in itself, harmless whatever it shows, and true to report.json."""

from __future__ import annotations

import builtins
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from sample_report import FAILED, HOSTILE, sample_report

from gristmill.report import page as pages
from gristmill.report import storage
from gristmill.report.clean import clean
from gristmill.report.pictures import roofline
from gristmill.runtime.errors import GristmillError

VOID = {"meta", "link"}
OWN_DIGITS = {"1", "5", "95", "50", "99"}  # "top 1", "95 % interval", "p99"
SCALES = {
    "%": 0.01, "×": 1, "ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "B": 1, "J": 1,
    "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
}  # fmt: skip
PREFIXES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
SCALES |= {p + name: s for p, s in PREFIXES.items() for name in ("B/s", "op", "op/s")}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, *tags: str) -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                if child.tag in tags or not tags:
                    yield child
                yield from child.all(*tags)

    def texts(self, *without: str) -> Iterator[str]:
        for child in self.children:
            if isinstance(child, str):
                yield child
            elif child.tag not in without:
                yield from child.texts(*without)


class Strict(HTMLParser):
    """A tree of a document in which every element is closed where it must be."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes {self.open[-1].tag} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(text: str) -> Element:
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == [parser.root], parser.open[-1].tag
    return parser.root


@pytest.fixture(scope="module")
def html(page: Path) -> str:
    return (page / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(html: str) -> Element:
    return parse(html)


@pytest.fixture(scope="module")
def stored(page: Path) -> Any:
    return json.loads((page / "report.json").read_text())


def values_in(value: Any) -> Iterator[Any]:
    """Numbers and texts of a JSON value, keys too."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from values_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from values_in(item)
    else:
        yield value


def digits(text: str) -> set[str]:
    return {found.strip(".,") for found in re.findall(r"\d[\d.,]*", text)}


def check_ids(html: str, tree: Element) -> None:
    """Each is there once, is a name, and what refers to one finds it."""
    ids = [element.attributes["id"] for element in tree.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    assert not [id for id in ids if not re.fullmatch(r"[\w.-]+", id)]
    used = re.findall(r'(?:href="|url\()#([^")]+)', html)
    named = [e.attributes["aria-labelledby"].split() for e in tree.all() if "aria-labelledby" in e.attributes]
    assert {*used, *sum(named, [])} <= set(ids)


def test_ids_are_there_once_and_references_lead_somewhere(html: str, tree: Element) -> None:
    check_ids(html, tree)


def test_nothing_outside_is_asked_for(html: str, tree: Element) -> None:
    for element in tree.all():
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = element.attributes.get(name, "#")
            assert value.startswith(("#", "data:")), f"{element.tag} {name}={value}"
        assert element.tag not in ("iframe", "object", "embed", "form", "img", "base")
        assert not [name for name in element.attributes if name.startswith("on")]
    assert "@import" not in html
    policy = next(e.attributes["content"] for e in tree.all("meta") if "http-equiv" in e.attributes)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_hostile_texts_stay_texts(tree: Element) -> None:
    assert len(list(tree.all("script"))) == len(list(tree.all("style"))) == 1 and not list(tree.all("img"))
    text = "".join(tree.texts("script", "style"))
    assert "</script><img src=x onerror=alert(1)>|`$x$`‹U+001B›[31m‹U+202E› &amp;" in text, (
        "the reason of a failure"
    )
    assert "</script><img␣src=x␣onerror=alert(1)>|`$x$`‹U+001B›[31m‹U+202E›⏎⇥␣‹U+00A0›&amp;" in text, (
        "a token"
    )
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200b-\u200f\u2028-\u202e]", text)


def test_every_number_is_in_the_json(tree: Element, stored: Any) -> None:
    numbers = {value for value in values_in(stored) if isinstance(value, (int, float))}
    shown = list(tree.all("data"))
    assert len(shown) > 1000
    missing = [e.attributes["value"] for e in shown if float(e.attributes["value"]) not in numbers]
    assert not missing


def test_what_is_not_marked_as_a_number_comes_from_the_json_too(tree: Element, stored: Any) -> None:
    values = list(values_in(stored))
    texts = "\n".join(" ".join(clean(value).split()) for value in values if isinstance(value, str))
    allowed = {f"{value:,}" for value in values if isinstance(value, int)} | OWN_DIGITS
    rest = set().union(*(digits(text) for text in tree.texts("data", "svg", "script", "style")))
    assert not {found for found in rest if found not in texts and found not in allowed}


def test_a_number_s_text_is_its_value_rounded(tree: Element) -> None:
    for element in tree.all("data"):
        value, said = float(element.attributes["value"]), element.text.replace("−", "-").replace(",", "")
        number, _, unit = said.partition("\u00a0")
        scale = SCALES[unit] if unit else 1
        unit_of_text = 10.0 ** -len(number.partition(".")[2].partition("e")[0]) * scale
        if "e" in number:
            unit_of_text *= 10.0 ** int(number.partition("e")[2])
        size = 10.0 ** (len(number.strip("+-").partition(".")[0]) - 3) * scale  # of the third figure
        assert abs(float(number) * scale - value) <= 0.51 * max(unit_of_text, size), (said, value)


def test_pictures_can_be_read_without_seeing_them(tree: Element) -> None:
    figures = list(tree.all("figure"))
    kinds = (
        "pareto",
        "context",
        "batch",
        "prompt",
        "latency",
        "roofline",
        "growth",
        "layers",
        "positions",
        "memory",
    )
    assert {f.attributes["id"].split("-")[0] for f in figures} == set(kinds)
    for figure in figures:
        reading = next(p for p in figure.all("p") if p.attributes.get("class") == "reading").text
        assert len(reading) > 20 and reading.endswith(".")
        pictures = list(figure.all("svg"))
        assert len(pictures) == 2, "for broad and for small screens"
        for svg in pictures:
            assert svg.attributes["role"] == "img"
            title, description = (next(svg.all(tag)).text for tag in ("title", "desc"))
            assert title and description == reading
        assert len(next(figure.all("table")).text) > 20
        assert "gristmill report tinyllama" in figure.text and "2026-11-24" in figure.text


def test_hover_texts_show_numbers_of_the_page(tree: Element, stored: Any) -> None:
    shown = set().union(*(digits(element.text) for element in tree.all("data")))
    names = "\n".join(value for value in values_in(stored) if isinstance(value, str))
    tips = [t.text for svg in tree.all("svg") for g in svg.all("g") for t in g.children
            if isinstance(t, Element) and t.tag == "title"]  # fmt: skip
    assert len(tips) > 500
    assert not {d for tip in tips for d in digits(tip) if d not in shown and d not in names}


def test_every_table_says_where_it_is_from(tree: Element) -> None:
    inside = {id(t) for parent in tree.all("figure", "details") for t in parent.all("table")}
    for group in tree.all("figure", "details"):
        if group.attributes.get("class") != "data":
            sources = [p for p in group.all("p") if p.attributes.get("class") == "source"]
            assert sources and "gristmill 0.1.0" in sources[0].text
    for div in tree.all("div"):
        table = next(div.all("table"), None)
        if div.attributes.get("class") == "table" and table and id(table) not in inside:
            assert "gristmill 0.1.0" in div.text or table.attributes["id"] == "terms"


def test_dominated_and_failed_points_are_marked(tree: Element) -> None:
    table = next(t for t in tree.all("table") if t.attributes.get("id") == "summary-table")
    rows = {next(r.all("th")).text: r for r in next(table.all("tbody")).all("tr")}
    assert len(rows) == 10
    assert "dominated" in rows["int4 rtn dominated"].attributes["class"]
    assert "pick" in rows["int4 gptq, KV int8 fastest dominated in size"].attributes["class"]
    assert "singular" in rows["int4 awq+gptq failed"].text
    gaps = next(t for t in tree.all("table") if t.attributes.get("id") == "gaps")
    assert gaps.text.count("peak memory: the peer runs in a process of its own") == 2


def test_markdown_says_the_same(page: Path, tree: Element) -> None:
    text = (page / "report.md").read_text(encoding="utf-8")
    shown = {element.text.replace("\u00a0", " ") for element in tree.all("data")}
    assert not {number for number in shown if number not in text}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block[:200]
    assert "<img" not in re.sub(r"(`+).*?\1", "", text), "outside of code"
    assert "\x1b" not in text and "\u202e" not in text


def test_the_stored_report_gives_the_same_page(page: Path, tmp_path: Path) -> None:
    report = storage.read_report(page)
    assert report.readings and report.derived
    few = replace(report.points[0], accuracy=None, speed=(), latency=None, memory=None)
    some = replace(report, points=(few,), readings={}, derived={})
    pages.write_report(some, tmp_path / "a")
    pages.write_report(storage.read_report(tmp_path / "a"), tmp_path / "b")
    for name in ("report.html", "report.md", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("points", [(), (FAILED,)])
def test_a_report_with_nothing_to_draw_is_a_page(points: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pages.write_report(replace(sample_report(), points=points, machines={}, dominated={}), tmp_path)
    tree = parse((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not list(tree.all("figure"))
    assert "No rounded point was sure" in tree.text


def test_points_may_lack_all_but_their_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sample = sample_report()
    bare = replace(FAILED, status="ok", reason="")
    odd = replace(
        sample.points[3], id=f"x {HOSTILE}", label=HOSTILE, device="cuda:0 <b>", why=sample.points[3].why[:1]
    )
    pages.write_report(
        replace(sample, points=(bare, odd), machines={"cuda:0 <b>": sample.machines["cpu"]}), tmp_path
    )
    tree = parse((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(list(tree.all("script"))) == 1 and not list(tree.all("img", "b"))
    assert len(list(tree.all("figure"))) > 5
    check_ids((tmp_path / "report.html").read_text(encoding="utf-8"), tree)


def with_floats(value: Any, number: float) -> Any:
    """A dataclass with every float in it replaced."""
    if isinstance(value, float):
        return number
    if isinstance(value, tuple):
        return tuple(with_floats(item, number) for item in value)
    if isinstance(value, dict):
        return {key: with_floats(item, number) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: with_floats(getattr(value, f.name), number) for f in fields(value)})
    return value


@pytest.mark.parametrize("number", [0.0, float("inf"), float("nan")])
def test_odd_measurements_do_not_lose_the_page(number: float, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sample = sample_report()
    odd = replace(sample, points=(with_floats(sample.points[3], number),))
    pages.write_report(odd, tmp_path)
    parse((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(storage.read_report(tmp_path).points) == 1
    assert roofline.sketches(replace(sample, machines=with_floats(sample.machines, number))) == []


def test_the_roofline_has_the_attention_of_every_phase() -> None:
    """By the names that a profile gives the kinds: with the cache's type, and a window where it has one."""
    pytest.importorskip("matplotlib")
    sketch = roofline.sketches(sample_report())[0]
    parts = [str(row.cells[2]) for row in sketch.data.rows]
    assert parts.count("attention") == parts.count("all") > 0


def test_without_matplotlib_it_is_said_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(GristmillError, match=r"pip install 'gristmill\[report\]'"):
        pages.write_report(sample_report(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_draws_is_imported_when_it_draws(tmp_path: Path) -> None:
    code = (
        "import sys, gristmill.report.page; print({'matplotlib', 'torch', 'transformers'} & set(sys.modules))"
    )
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.stdout == "set()\n", done.stderr


def test_matplotlib_s_settings_are_left_alone(page: Path) -> None:
    import matplotlib

    assert matplotlib.rcParams["svg.hashsalt"] is None and matplotlib.rcParams["text.parse_math"]
    assert page.exists()


def luminance(colour: str) -> float:
    colour = "".join(2 * c for c in colour) if len(colour) == 3 else colour
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_texts_and_marks_stand_out_in_light_and_dark(scheme: int) -> None:
    style = (pages.DATA / "page.css").read_text()
    blocks = [
        dict(re.findall(r"--([\w-]+): #([0-9a-f]{3,6});", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    colours = blocks[scheme]
    assert set(blocks[0]) == set(blocks[1])
    pairs = (
        "ink paper, ink back, muted paper, muted back, muted shade, link back, good good-back, bad bad-back"
    )
    for text, back in (pair.split() for pair in pairs.split(", ")):
        assert contrast(colours[text], colours[back]) >= 4.5, (text, back)
    for mark in ("blue", "sky", "orange", "green", "red", "purple"):
        assert contrast(colours[mark], colours["paper"]) >= 3.0, mark
