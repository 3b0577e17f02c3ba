"""Accuracy by position in the context: whether errors add up as the cache fills."""

from __future__ import annotations

import math

from gristmill.report import choose, units
from gristmill.report.pictures.sketch import Sketch, logarithmic
from gristmill.report.plots import COLOURS, Drawing, line_style, marker_style
from gristmill.report.schema import Point, PositionBin, Report
from gristmill.report.tables import Column, Number, Row, Table, Text, cell, say

VISIBLE = 1e4  # a point whose divergence is smaller than the largest by more is in the table alone


def sketches(report: Report) -> list[Sketch]:
    points = [p for p in choose.good(report) if len(_bins(p)) > 1]
    top = max((b.kl for p in points for b in _bins(p)), default=0.0)
    shown = [p for p in points if any(b.kl > top / VISIBLE for b in _bins(p))]
    if not shown:
        return []
    styles = choose.styles(report)
    return [
        Sketch(
            id="positions",
            title="Divergence by position in the context",
            reading=_reading(shown),
            data=_table(points),
            paint=lambda drawing: _paint(drawing, shown, styles),
            device=shown[0].device,
            half=False,
            wide=(1100.0, 420.0),
            narrow=(372.0, 330.0 + 12 * len(shown)),
        )
    ]


def _bins(point: Point) -> tuple[PositionBin, ...]:
    bins = point.accuracy.by_position if point.accuracy else ()
    return tuple(b for b in bins if math.isfinite(b.kl))


def _growth(point: Point) -> float:
    bins = _bins(point)
    return bins[-1].kl / bins[0].kl if bins[0].kl > 0 else 0.0


def _reading(points: list[Point]) -> Text:
    most = max(points, key=_growth)
    bins = _bins(most)
    return say(
        "The divergence of {} changes most along the context: {} nats at positions {} to {}, {} at {} to {}.",
        most.label,
        Number(bins[0].kl, "nats"),
        Number(bins[0].first, "count"),
        Number(bins[0].last, "count"),
        Number(bins[-1].kl, "nats"),
        Number(bins[-1].first, "count"),
        Number(bins[-1].last, "count"),
    )


def _table(points: list[Point]) -> Table:
    columns = (
        Column("point", numeric=False),
        Column("from"),
        Column("to"),
        Column("tokens"),
        Column("KL, nats"),
        Column("nll more, nats"),
    )
    rows = tuple(
        Row(
            (
                cell(p.label),
                cell(b.first),
                cell(b.last),
                cell(b.tokens),
                cell(b.kl, "nats"),
                cell(b.nll_increase, "nats"),
            )
        )
        for p in points
        for b in _bins(p)
    )
    return Table("positions-data", "Divergence from the float model by position", columns, rows)


def _paint(drawing: Drawing, points: list[Point], styles: dict[str, choose.Style]) -> None:
    axes = drawing.axes()
    for point in points:
        bins, style = [b for b in _bins(point) if b.kl > 0], styles[point.id]
        middles = [(b.first + b.last) / 2 for b in bins]
        axes.plot(
            middles,
            [b.kl for b in bins],
            label=point.label,
            **{**marker_style(style), **line_style(style), "markersize": 6},
        )
        for x, b in zip(middles, bins):
            (dot,) = axes.plot([x], [b.kl], marker="o", markersize=14, color=COLOURS["paper"], alpha=0.0)
            drawing.tip(
                dot,
                f"{point.label}, positions {b.first:,} to {b.last:,}: "
                f"{units.text(b.kl, 'nats')} nats over {b.tokens:,} tokens",
            )
    logarithmic(axes, "y")
    drawing.label(axes, "position in the context", "KL divergence, nats per token")
    drawing.legend(axes)
