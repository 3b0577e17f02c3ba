"""Attained rate over arithmetic intensity, under the roofs that were measured in the same run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gristmill.report import choose, units
from gristmill.report.pictures.sketch import Sketch, logarithmic, trimmed
from gristmill.report.plots import COLOURS, FONT, Drawing
from gristmill.report.schema import Machine, PhaseWhy, Point, Report
from gristmill.report.tables import Column, Number, Row, Table, Text, cell, join, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE, NARROW = (1100.0, 520.0), (372.0, 460.0)
_MARKERS = {"decode": "o", "decode of a batch": "s", "prefill": "^", "attention": "D"}


@dataclass(frozen=True)
class Dot:
    """A phase as a whole, or its attention alone."""

    point: Point
    phase: str
    kind: str
    intensity: float
    rate: float
    roof_share: float
    verdict: str


@dataclass(frozen=True)
class Roofs:
    """streams: bytes per second, peaks: operations per second, by name; at least one of each."""

    streams: dict[str, float]
    peaks: dict[str, float]

    @property
    def stream(self) -> float:
        return max(self.streams.values())

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


def sketches(report: Report) -> list[Sketch]:
    found = []
    for device in choose.devices(report):
        points = [point for point in choose.good(report) if point.device == device]
        dots = [dot for point in points for dot in _dots(point)]
        roofs = _roofs(report.machines.get(device), points)
        if dots and roofs:
            found.append(_sketch(report, device, roofs, dots))
    return found


CACHED = 1.25  # times the memory's stream: what is read as fast as that comes from a cache


def _roofs(machine: Machine | None, points: list[Point]) -> Roofs | None:
    """The machine's, and the stream of phases so small that they stay in its caches."""
    if machine is None:
        return None
    streams = {"memory": machine.read_bytes_s}
    cached = max((why.read_bytes_s for point in points for why in point.why), default=0.0)
    if cached > CACHED * machine.read_bytes_s:
        streams["caches"] = cached
    peaks = {"float products": machine.float_ops_s, "integer products": machine.integer_ops_s}
    streams, peaks = ({k: v for k, v in some.items() if 0 < v < math.inf} for some in (streams, peaks))
    return Roofs(streams, peaks) if streams and peaks else None


def _dots(point: Point) -> Iterator[Dot]:
    """Of all phases, and of the attention in them, that have operations, bytes and time."""
    for why in point.why:
        kinds = why.kinds
        operations, read = sum(k.operations for k in kinds), sum(k.bytes for k in kinds)
        floor = sum(max(k.memory_floor, k.compute_floor) for k in kinds)
        if operations and read and _is_positive(why.seconds):
            share = floor / why.seconds
            rate = operations / why.seconds
            yield Dot(point, why.name, _kind(why), operations / read, rate, share, why.verdict)
        for kind in kinds:  # of attention, one for each type and window of cache
            attends = kind.kind.startswith("attention") and kind.operations and kind.bytes
            if attends and _is_positive(kind.seconds):
                rate = kind.operations / kind.seconds
                yield Dot(point, why.name, "attention", kind.intensity, rate, kind.roof_share, kind.verdict)


def _is_positive(value: float) -> bool:
    return 0 < value < math.inf


def _kind(why: PhaseWhy) -> str:
    return "prefill" if why.rows > 1 else ("decode of a batch" if why.sequences > 1 else "decode")


def _sketch(report: Report, device: str, roofs: Roofs, dots: list[Dot]) -> Sketch:
    styles = choose.styles(report)
    columns = (
        Column("point", numeric=False),
        Column("phase", numeric=False),
        Column("of", numeric=False),
        Column("operations per byte"),
        Column("attained"),
        Column("of the roof"),
        Column("verdict", numeric=False),
    )
    rows = tuple(
        Row(
            (
                cell(d.point.label),
                cell(d.phase),
                cell("attention" if d.kind == "attention" else "all"),
                cell(d.intensity, "ops/byte"),
                cell(d.rate, "ops/s"),
                cell(d.roof_share, "share"),
                cell(d.verdict),
            )
        )
        for d in dots
    )
    return Sketch(
        id=f"roofline-{device}",
        title=f"Roofline, {device}",
        reading=_reading(roofs, dots),
        data=Table(f"roofline-{device}-data", f"Roofline, {device}", columns, rows),
        paint=lambda drawing: _paint(drawing, roofs, dots, styles),
        device=device,
        half=False,
        wide=WIDE,
        narrow=NARROW,
    )


def _reading(roofs: Roofs, dots: list[Dot]) -> Text:
    """Where reading ends to be the roof, and how near decode and prefill come to theirs."""
    ridges = [
        say("{} ({})", Number(peak / roofs.stream, "ops/byte"), name) for name, peak in roofs.peaks.items()
    ]
    said = [say("Reading sets the pace below {} operations per byte", join(ridges))]
    for kind in ("decode", "prefill"):
        some = [d for d in dots if d.kind == kind]
        if some:
            low, high = (pick(some, key=lambda d: d.roof_share) for pick in (min, max))
            span = say("{}", Number(high.roof_share, "share"))
            if low.point is not high.point:
                span = say(
                    "{} ({}) to {} ({})",
                    Number(low.roof_share, "share"),
                    low.point.label,
                    span,
                    high.point.label,
                )
            said.append(say("{} reaches {} of its roof", kind, span))
    return say("{}.", join(said, "; "))


def _paint(drawing: Drawing, roofs: Roofs, dots: list[Dot], styles: dict[str, choose.Style]) -> None:
    axes = drawing.axes()
    ridge = roofs.peak / roofs.stream
    low = min([d.intensity for d in dots] + [ridge / 20]) / 2
    high = max([d.intensity for d in dots] + [ridge]) * 3
    bottom = min([d.rate for d in dots] + [low * stream for stream in roofs.streams.values()]) / 2
    axes.set_xlim(low, high)
    axes.set_ylim(bottom, max([d.rate for d in dots] + [roofs.peak]) * 2)
    logarithmic(axes, "x")
    logarithmic(axes, "y", write=trimmed("ops/s"))
    for dot in dots:
        _mark(drawing, axes, dot, COLOURS[styles[dot.point.id].colour])
    drawing.label(axes, "operations per byte", "operations per second")
    _legend(drawing, dots, styles)
    _peaks(axes, roofs, high)
    drawing.settle()  # the angle of what follows depends on the axes' size
    for name, stream in roofs.streams.items():
        _stream(axes, roofs, name, stream, low)


def _mark(drawing: Drawing, axes: Axes, dot: Dot, colour: str) -> None:
    hollow = dot.kind == "attention"
    (mark,) = axes.plot(
        [dot.intensity],
        [dot.rate],
        marker=_MARKERS[dot.kind],
        markersize=7 if hollow else 9,
        color=colour,
        markerfacecolor=COLOURS["paper"] if hollow else colour,
        markeredgewidth=1.5,
        linestyle="none",
        zorder=3,
    )
    drawing.tip(
        mark,
        f"{dot.point.label}, {dot.phase}{', attention' if hollow else ''}: "
        f"{units.text(dot.intensity, 'ops/byte')} operations per byte, "
        f"{units.text(dot.rate, 'ops/s')}, {dot.verdict}-bound",
    )


def _legend(drawing: Drawing, dots: list[Dot], styles: dict[str, choose.Style]) -> None:
    """Marks by phase, colours by weights."""
    from matplotlib.lines import Line2D

    kinds = [kind for kind in _MARKERS if any(d.kind == kind for d in dots)]
    handles = [
        Line2D(
            [],
            [],
            color=COLOURS["ink"],
            marker=_MARKERS[kind],
            linestyle="none",
            markersize=8,
            markerfacecolor=COLOURS["paper"] if kind == "attention" else COLOURS["ink"],
        )
        for kind in kinds
    ]
    colours = {styles[d.point.id].colour: _family(d.point) for d in dots}
    handles += [Line2D([], [], color=COLOURS[c], linewidth=6, solid_capstyle="butt") for c in colours]
    drawing.legend_of(handles, [*kinds, *colours.values()])


def _family(point: Point) -> str:
    return "peers" if choose.is_peer(point) else point.weights.split(" ")[0]


def _peaks(axes: Axes, roofs: Roofs, high: float) -> None:
    for name, peak in roofs.peaks.items():
        dash = "solid" if peak == roofs.peak else "dashed"
        start = peak / roofs.stream
        axes.plot([start, high], [peak, peak], color=COLOURS["muted"], linewidth=1.8, linestyle=dash)
        axes.annotate(
            f"{name} {units.text(peak, 'ops/s')}",
            (high, peak),
            (-4, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=COLOURS["muted"],
            fontsize=FONT - 1,
        )


def _stream(axes: Axes, roofs: Roofs, name: str, stream: float, low: float) -> None:
    """A slanted roof with its name along it."""
    ridge = roofs.peak / stream
    dash = "solid" if stream == roofs.stream else "dashed"
    axes.plot(
        [low, ridge], [low * stream, ridge * stream], color=COLOURS["muted"], linewidth=1.8, linestyle=dash
    )
    start, end = (axes.transData.transform((x, x * stream)) for x in (low, ridge))
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    along, beside = 14, 5
    axes.annotate(
        f"{name} {units.text(stream, 'bytes/s')}",
        (low, low * stream),
        (
            along * math.cos(angle) - beside * math.sin(angle),
            along * math.sin(angle) + beside * math.cos(angle),
        ),
        rotation=math.degrees(angle),
        rotation_mode="anchor",
        textcoords="offset points",
        va="bottom",
        color=COLOURS["muted"],
        fontsize=FONT - 1,
        in_layout=False,
    )
