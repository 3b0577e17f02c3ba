"""How long a caller waits: for the first token, and for each one after it."""

from __future__ import annotations

import math

from gristmill.report import choose, units
from gristmill.report.pictures.sketch import Sketch, plain_ticks
from gristmill.report.plots import COLOURS, FONT, Drawing, marker_style
from gristmill.report.schema import Latency, Point, Report
from gristmill.report.tables import Column, Number, Row, Table, cell, say


def sketches(report: Report) -> list[Sketch]:
    found = []
    for device in choose.devices(report):
        points = [point for point in choose.good(report) if point.device == device]
        waits = [(p, p.latency) for p in points if p.latency and _can_be_drawn(p.latency)]
        if waits:
            found.append(_sketch(report, device, waits))
    return found


def _can_be_drawn(wait: Latency) -> bool:
    times = (wait.inter_token_p50, wait.inter_token_p95, wait.inter_token_p99)
    return all(0 < time < math.inf for time in times)


def _sketch(report: Report, device: str, waits: list[tuple[Point, Latency]]) -> Sketch:
    styles = choose.styles(report)
    best, worst = (pick(waits, key=lambda w: w[1].inter_token_p50) for pick in (min, max))
    wide = max(waits, key=lambda w: w[1].inter_token_p99 / w[1].inter_token_p50)
    reading = say("{} gives a token every {}", best[0].label, Number(best[1].inter_token_p50, "seconds"))
    if len(waits) > 1:
        reading = say("{}, {} every {}", reading, worst[0].label, Number(worst[1].inter_token_p50, "seconds"))
    reading = say(
        "{}; {}p99 is {} its median.",
        reading,
        say("{} has the longest tail: ", wide[0].label) if len(waits) > 1 else say(""),
        Number(wide[1].inter_token_p99 / wide[1].inter_token_p50, "factor"),
    )
    columns = (
        Column("point", numeric=False),
        Column("prompt", "tokens"),
        Column("first token"),
        Column("p50"),
        Column("p95"),
        Column("p99"),
    )
    rows = tuple(
        Row(
            (
                cell(p.label),
                cell(w.prompt),
                cell(w.first_token, "seconds"),
                cell(w.inter_token_p50, "seconds"),
                cell(w.inter_token_p95, "seconds"),
                cell(w.inter_token_p99, "seconds"),
            )
        )
        for p, w in waits
    )
    height = 80.0 + 36 * len(waits)
    return Sketch(
        id=f"latency-{device}",
        title=f"Time between tokens, {device}",
        reading=reading,
        data=Table(
            f"latency-{device}-data", f"Time to the first token and between tokens, {device}", columns, rows
        ),
        paint=lambda drawing: _paint(drawing, waits, styles),
        device=device,
        wide=(540.0, max(height, 200.0)),
        narrow=(372.0, height),
    )


def _paint(drawing: Drawing, waits: list[tuple[Point, Latency]], styles: dict[str, choose.Style]) -> None:
    axes = drawing.axes()
    for row, (point, wait) in enumerate(waits):
        style = styles[point.id]
        ends = [1e3 * x for x in (wait.inter_token_p50, wait.inter_token_p95, wait.inter_token_p99)]
        axes.plot(ends[::2], [row, row], color=COLOURS[style.colour], linewidth=2)
        axes.plot(
            ends[1:], [row, row], color=COLOURS[style.colour], marker="|", markersize=11, linestyle="none"
        )
        (dot,) = axes.plot(ends[:1], [row], **marker_style(style))
        drawing.tip(
            dot,
            f"{point.label}: p50 {units.text(wait.inter_token_p50, 'seconds')}, "
            f"p95 {units.text(wait.inter_token_p95, 'seconds')}, "
            f"p99 {units.text(wait.inter_token_p99, 'seconds')}",
        )
        axes.annotate(
            drawing.fit(point.label, 40),
            (0, row),
            (4, 8),
            textcoords="offset points",
            fontsize=FONT - 1,
            color=COLOURS["ink"],
        )
    axes.set_yticks([])
    axes.set_ylim(len(waits) - 0.4, -0.9)
    axes.set_xlim(0, None)
    axes.spines["left"].set_visible(False)
    plain_ticks(axes, "x")
    drawing.label(axes, "milliseconds; mark: p50, bars: p95, p99", "")
