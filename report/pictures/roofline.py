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


def sketches(report: Report) -> list[Sketch]:
    found = []
    for device in choose.devices(report):
        dots = [dot for point in choose.good(report) if point.device == device for dot in _dots(point)]
        machine = report.machines.get(device)
        if dots and machine:
            found.append(_sketch(report, device, machine, dots))
    return found


def _dots(point: Point) -> Iterator[Dot]:
    for why in point.why:
        operations, read = (sum(getattr(k, name) for k in why.kinds) for name in ("operations", "bytes"))
        if operations and read and why.seconds:
            floor = sum(max(k.memory_floor, k.compute_floor) for k in why.kinds)
            share = floor / why.seconds
            yield Dot(
                point, why.name, _kind(why), operations / read, operations / why.seconds, share, why.verdict
            )
        for kind in why.kinds:
            if kind.kind == "attention" and kind.operations and kind.bytes and kind.seconds:
                rate = kind.operations / kind.seconds
                yield Dot(point, why.name, "attention", kind.intensity, rate, kind.roof_share, kind.verdict)


def _kind(why: PhaseWhy) -> str:
    return "prefill" if why.rows > 1 else ("decode of a batch" if why.sequences > 1 else "decode")


def _sketch(report: Report, device: str, machine: Machine, dots: list[Dot]) -> Sketch:
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
        reading=_reading(machine, dots),
        data=Table(f"roofline-{device}-data", f"Roofline, {device}", columns, rows),
        paint=lambda drawing: _paint(drawing, machine, dots, styles),
        device=device,
        half=False,
        wide=WIDE,
        narrow=NARROW,
    )


def _reading(machine: Machine, dots: list[Dot]) -> Text:
    """Where memory ends to be the roof, and how near decode and prefill come to theirs."""
    ridges = [
        Number(peak / machine.read_bytes_s, "ops/byte")
        for peak in (machine.float_ops_s, machine.integer_ops_s)
    ]
    said = [say("Reading sets the pace below {} operations per byte in floats, {} in integers", *ridges)]
    for kind in ("decode", "prefill"):
        some = [d for d in dots if d.kind == kind]
        if some:
            low, high = (pick(some, key=lambda d: d.roof_share) for pick in (min, max))
            span = say("{}", Number(high.roof_share, "share"))
            if low.roof_share < high.roof_share:
                span = say(
                    "{} ({}) to {} ({})",
                    Number(low.roof_share, "share"),
                    low.point.label,
                    span,
                    high.point.label,
                )
            said.append(say("{} reaches {} of its roof", kind, span))
    return say("{}.", join(said, "; "))


def _paint(drawing: Drawing, machine: Machine, dots: list[Dot], styles: dict[str, choose.Style]) -> None:
    from matplotlib.lines import Line2D

    axes = drawing.axes()
    ridge = machine.integer_ops_s / machine.read_bytes_s
    low = min([d.intensity for d in dots] + [ridge / 20]) / 2
    high = max([d.intensity for d in dots] + [ridge]) * 3
    axes.set_xlim(low, high)
    axes.set_ylim(min([d.rate for d in dots] + [low * machine.read_bytes_s]) / 2, machine.integer_ops_s * 2)
    logarithmic(axes, "x")
    logarithmic(axes, "y", write=trimmed("ops/s"))
    _roofs(drawing, axes, machine, low, high)
    for dot in dots:
        colour, hollow = COLOURS[styles[dot.point.id].colour], dot.kind == "attention"
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
    drawing.label(axes, "operations per byte", "operations per second")
    kinds = [k for k in _MARKERS if any(d.kind == k for d in dots)]
    handles = [
        Line2D(
            [],
            [],
            color=COLOURS["ink"],
            marker=_MARKERS[k],
            linestyle="none",
            markersize=8,
            markerfacecolor=COLOURS["paper"] if k == "attention" else COLOURS["ink"],
        )
        for k in kinds
    ]
    colours = {styles[d.point.id].colour: _family(d.point) for d in dots}
    handles += [Line2D([], [], color=COLOURS[c], linewidth=6, solid_capstyle="butt") for c in colours]
    drawing.legend_of(handles, [*kinds, *colours.values()])


def _family(point: Point) -> str:
    return "peers" if choose.is_peer(point) else point.weights.split(" ")[0]


def _roofs(drawing: Drawing, axes: Axes, machine: Machine, low: float, high: float) -> None:
    stream = machine.read_bytes_s
    for peak, name, dash in (
        (machine.integer_ops_s, "integer products", "solid"),
        (machine.float_ops_s, "float products", "dashed"),
    ):
        axes.plot([peak / stream, high], [peak, peak], color=COLOURS["muted"], linewidth=1.8, linestyle=dash)
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
    ridge = max(machine.integer_ops_s, machine.float_ops_s) / stream
    axes.plot([low, ridge], [low * stream, ridge * stream], color=COLOURS["muted"], linewidth=1.8)
    # An angle follows the line only when the axes have their final size: the text is turned after the layout.
    drawing.figure.draw_without_rendering()
    start, end = (axes.transData.transform((x, x * stream)) for x in (low, ridge))
    angle = math.degrees(math.atan2(end[1] - start[1], end[0] - start[0]))
    axes.annotate(
        f"memory {units.text(stream, 'bytes/s')}",
        (low, low * stream),
        (12, 16),
        rotation=angle,
        rotation_mode="anchor",
        textcoords="offset points",
        va="bottom",
        color=COLOURS["muted"],
        fontsize=FONT - 1,
        in_layout=False,
    )
