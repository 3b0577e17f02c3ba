"""Resident memory of the process over time, from its start to the end of a generation."""

from __future__ import annotations

import math

from gristmill.report import choose, units
from gristmill.report.pictures.sketch import HALF, Sketch, plain_ticks
from gristmill.report.plots import COLOURS, Drawing, line_style
from gristmill.report.schema import MemorySample, Point, Report
from gristmill.report.tables import Column, Number, Row, Table, Text, cell, say

MIB = float(1 << 20)


def sketches(report: Report) -> list[Sketch]:
    found = []
    for device in choose.devices(report):
        points = [p for p in choose.good(report) if p.device == device and len(_samples(p)) > 1]
        if points:
            found.append(_sketch(report, device, points, len(choose.devices(report)) > 1))
    return found


def _samples(point: Point) -> tuple[MemorySample, ...]:
    samples = point.memory.over_time if point.memory else ()
    return tuple(s for s in samples if math.isfinite(s.seconds) and s.resident_bytes > 0)


def _sketch(report: Report, device: str, points: list[Point], several: bool) -> Sketch:
    styles = choose.styles(report)
    return Sketch(
        id=f"memory-{device}",
        title=f"Resident memory over time, {device}",
        reading=_reading(points),
        data=_table(device, points),
        paint=lambda drawing: _paint(drawing, points, styles),
        device=device,
        half=several,
        wide=HALF if several else (1100.0, 420.0),
        narrow=(372.0, 330.0 + 12 * len(points)),
    )


def _reading(points: list[Point]) -> Text:
    top, low = (pick(points, key=_peak) for pick in (max, min))
    if top is low:
        return say("{} reaches {}.", top.label, Number(_peak(top), "bytes"))
    return say(
        "{} reaches {}, {} only {}.",
        top.label,
        Number(_peak(top), "bytes"),
        low.label,
        Number(_peak(low), "bytes"),
    )


def _peak(point: Point) -> int:
    return max(sample.resident_bytes for sample in _samples(point))


def _table(device: str, points: list[Point]) -> Table:
    """The first and the last sample of every stage, and the most in it."""
    rows = []
    for point in points:
        stages: dict[str, list[MemorySample]] = {}
        for sample in _samples(point):
            stages.setdefault(sample.stage, []).append(sample)
        rows += [
            Row(
                (
                    cell(point.label),
                    cell(stage),
                    cell(some[0].seconds, "seconds"),
                    cell(some[0].resident_bytes, "bytes"),
                    cell(some[-1].seconds, "seconds"),
                    cell(some[-1].resident_bytes, "bytes"),
                    cell(max(s.resident_bytes for s in some), "bytes"),
                )
            )
            for stage, some in stages.items()
        ]
    columns = (
        Column("point", numeric=False),
        Column("stage", numeric=False),
        Column("begins", "at"),
        Column("resident", "then"),
        Column("ends", "at"),
        Column("resident", "then"),
        Column("most", "in it"),
    )
    return Table(f"memory-{device}-data", f"Resident memory by stage, {device}", columns, tuple(rows))


def _paint(drawing: Drawing, points: list[Point], styles: dict[str, choose.Style]) -> None:
    axes = drawing.axes()
    for point in points:
        samples, style = _samples(point), styles[point.id]
        axes.plot(
            [s.seconds for s in samples],
            [s.resident_bytes / MIB for s in samples],
            **line_style(style),
            marker=style.marker,
            markevery=[0],
            label=point.label,
        )
        starts = [
            s for before, s in zip((None, *samples), samples) if before is None or before.stage != s.stage
        ]
        for s in starts:
            (dot,) = axes.plot(
                [s.seconds],
                [s.resident_bytes / MIB],
                marker=style.marker,
                markersize=7,
                color=COLOURS[style.colour],
            )
            drawing.tip(
                dot,
                f"{point.label}, {s.stage} begins at {units.text(s.seconds, 'seconds')}: "
                f"{units.text(s.resident_bytes, 'bytes')}",
            )
    axes.set_ylim(0, max(_peak(p) for p in points) / MIB * 1.08)
    axes.set_xlim(0, None)
    plain_ticks(axes, "y")
    plain_ticks(axes, "x")
    drawing.label(axes, "seconds since the process began; marks: a stage begins", "resident, MiB")
    drawing.legend(axes)
