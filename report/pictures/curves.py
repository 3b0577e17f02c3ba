"""Speed over context, batch and prompt, the time to tokens, and time over work: lines of points."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from gristmill.report import choose, units
from gristmill.report.pictures.sketch import Sketch, logarithmic, plain_ticks, short, trimmed
from gristmill.report.plots import COLOURS, FONT, Drawing, line_style, marker_style
from gristmill.report.schema import PhaseWhy, Point, Report, SpeedPoint
from gristmill.report.tables import Column, Number, Row, Table, Text, cell, say


@dataclass(frozen=True)
class Line:
    point: Point
    xs: tuple[int, ...]
    ys: tuple[float, ...]


@dataclass(frozen=True)
class Kind:
    """One picture of lines. x, y: names of the axes; unit: of y."""

    id: str
    title: str
    x: str
    y: str
    unit: units.Unit
    read: Callable[[list[Line]], Text]
    logarithmic: bool = False


def sketches(report: Report) -> list[Sketch]:
    """Decode over context, decode over batch, prefill over prompt; for each device."""
    found = []
    for device in choose.devices(report):
        points = [point for point in choose.good(report) if point.device == device]
        for kind, lines in (
            (_CONTEXT, _lines(points, _is_decode_of_one, lambda s: s.context)),
            (_BATCH, _lines(points, _batch_at(points), lambda s: s.sequences)),
            (_PROMPT, _lines(points, lambda s: s.phase == "prefill" and s.context == 0, lambda s: s.rows)),
        ):
            if lines:
                found.append(line_sketch(report, kind, lines, device))
    return found


def _is_decode_of_one(speed: SpeedPoint) -> bool:
    return speed.phase == "decode" and speed.sequences == 1 and speed.rows == 1


def _batch_at(points: Sequence[Point]) -> Callable[[SpeedPoint], bool]:
    """Decodes at the context with most batch sizes."""
    seen = Counter(s.context for p in points for s in p.speed if s.phase == "decode" and s.sequences > 1)
    context = min(seen, key=lambda c: (-seen[c], c), default=-1)
    return lambda s: s.phase == "decode" and s.rows == 1 and s.context == context


def _lines(
    points: Sequence[Point], wanted: Callable[[SpeedPoint], bool], x: Callable[[SpeedPoint], int]
) -> list[Line]:
    """Lines of at least two places."""
    lines = []
    for point in points:
        found = sorted(
            {x(s): s.tokens_s for s in point.speed if wanted(s) and 0 < s.tokens_s < math.inf}.items()
        )
        if len(found) > 1:
            lines.append(Line(point, tuple(k for k, _ in found), tuple(v for _, v in found)))
    return lines


def line_sketch(report: Report, kind: Kind, lines: list[Line], device: str) -> Sketch:
    styles = choose.styles(report)
    return Sketch(
        id=f"{kind.id}-{device}",
        title=f"{kind.title}, {device}",
        reading=kind.read(lines),
        data=_table(kind, lines, device),
        paint=lambda drawing: _paint(drawing, kind, lines, styles),
        device=device,
        narrow=(372.0, 330.0 + 12 * len(lines)),
    )


def _table(kind: Kind, lines: list[Line], device: str) -> Table:
    xs = sorted({x for line in lines for x in line.xs})
    rows = tuple(
        Row((cell(line.point.label), *(cell(dict(zip(line.xs, line.ys)).get(x), kind.unit) for x in xs)))
        for line in lines
    )
    columns = (Column("point", numeric=False), *(Column(f"{x:,}") for x in xs))
    return Table(f"{kind.id}-{device}-data", f"{kind.title}, {device}: {kind.y} by {kind.x}", columns, rows)


def _paint(drawing: Drawing, kind: Kind, lines: list[Line], styles: dict[str, choose.Style]) -> None:
    axes = drawing.axes()
    for line in lines:
        style = styles[line.point.id]
        axes.plot(
            line.xs,
            line.ys,
            **{**marker_style(style), **line_style(style), "markersize": 6},
            label=line.point.label,
        )
        for x, y in zip(line.xs, line.ys):
            (dot,) = axes.plot([x], [y], marker="o", markersize=14, color=COLOURS["paper"], alpha=0.0)
            drawing.tip(
                dot,
                f"{line.point.label}, {kind.x} {x:,}: {units.text(y, kind.unit)} "
                f"{'tok/s' if kind.unit == 'tok/s' else ''}".rstrip(),
            )
    xs = sorted({x for line in lines for x in line.xs})
    if min(xs) > 0:
        logarithmic(axes, "x", _apart(xs, drawing))
    ys = [y for line in lines for y in line.ys]
    write = short if kind.unit == "tok/s" else trimmed(kind.unit)
    if min(ys) > 0 and max(ys) / min(ys) > (4 if kind.logarithmic else 20):
        logarithmic(axes, "y", write=write)
    else:
        axes.set_ylim(0, max(ys) * 1.08)
        plain_ticks(axes, "y", write)
    drawing.label(axes, kind.x, kind.y)
    drawing.legend(axes)


def _apart(xs: list[int], drawing: Drawing) -> list[int]:
    """As many of the places as have room for their numbers on a logarithmic axis."""
    room = (drawing.width - 70) / max(1e-9, math.log(xs[-1] / xs[0])) if xs[-1] > xs[0] else 1.0
    kept = [xs[-1]]
    for x in reversed(xs[:-1]):
        if room * math.log(kept[-1] / x) > 0.75 * FONT * (len(f"{x}") + 1):
            kept.append(x)
    return kept


def _ends(line: Line) -> float:
    return line.ys[-1] / line.ys[0]


def _read_context(lines: list[Line]) -> Text:
    best, worst = max(lines, key=_ends), min(lines, key=_ends)
    said = say(
        "From {} to {} tokens of context {} keeps {} of its speed",
        Number(best.xs[0], "count"),
        Number(best.xs[-1], "count"),
        best.point.label,
        Number(_ends(best), "share"),
    )
    if worst is not best:
        said = say("{}, {} {}", said, worst.point.label, Number(_ends(worst), "share"))
    return say("{}.", said)


def _read_gain(what: str) -> Callable[[list[Line]], Text]:
    def read(lines: list[Line]) -> Text:
        top, gain = max(lines, key=lambda line: max(line.ys)), max(lines, key=_ends)
        first = say("{} reaches {} tok/s", top.point.label, Number(max(top.ys), "tok/s"))
        name = "it" if gain is top else gain.point.label
        if _ends(gain) <= 1:
            return say("{}; none gains from {}.", first, what)
        second = say(
            "{} gains most from {}: {} from {} to {}",
            name,
            what,
            Number(_ends(gain), "factor"),
            Number(gain.xs[0], "count"),
            Number(gain.xs[-1], "count"),
        )
        return say("{}; {}.", first, second)

    return read


_CONTEXT = Kind(
    "context", "Decode over context", "tokens of context", "tok/s, one sequence", "tok/s", _read_context
)
_BATCH = Kind(
    "batch", "Decode over batch", "sequences", "tok/s, all sequences", "tok/s", _read_gain("a batch")
)
_PROMPT = Kind(
    "prompt", "Prefill over prompt", "tokens of prompt", "tok/s", "tok/s", _read_gain("longer prompts")
)


def growth_sketches(report: Report) -> list[Sketch]:
    """Time of the same forward with more and more rows: where it does not grow, it is overhead."""
    found = []
    for device in choose.devices(report):
        phases = [
            (p, why)
            for p in choose.good(report)
            if p.device == device
            for why in p.why
            if len(why.growth) > 1
        ]
        first: dict[str, tuple[Point, PhaseWhy]] = {}
        for point, why in phases:
            first.setdefault(point.id, (point, why))
        lines = [
            Line(point, tuple(g.rows for g in why.growth), tuple(g.seconds for g in why.growth))
            for point, why in first.values()
            if all(0 < g.seconds < math.inf for g in why.growth)
        ]
        if lines:
            name = next(iter(first.values()))[1].name
            kind = Kind(
                "growth",
                f"Time over work ({name})",
                "rows in one forward",
                "seconds",
                "seconds",
                partial(_read_growth, whys=first),
                logarithmic=True,
            )
            found.append(line_sketch(report, kind, lines, device))
    return found


FLAT = 1.1  # times as long counts as no longer


def _read_growth(lines: list[Line], whys: dict[str, tuple[Point, PhaseWhy]]) -> Text:
    """How many rows cost no more than one, of the point where that is most; its overhead."""
    most = max(lines, key=_free_rows)
    why = whys[most.point.id][1]
    return say(
        "{}: {} rows take {} the time of {}; overhead {} of {}; up to {} rows cost at most a tenth more.",
        most.point.label,
        Number(most.xs[-1], "count"),
        Number(_ends(most), "factor"),
        Number(most.xs[0], "count"),
        Number(why.overhead, "seconds"),
        Number(why.seconds, "seconds"),
        Number(_free_rows(most), "count"),
    )


def _free_rows(line: Line) -> int:
    return max(x for x, y in zip(line.xs, line.ys) if y <= FLAT * line.ys[0])
