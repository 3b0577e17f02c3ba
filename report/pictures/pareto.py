"""Accuracy against speed and against size: what each step in accuracy costs or gains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gristmill.report import choose, units
from gristmill.report.pictures.sketch import Sketch, place_labels, plain_ticks
from gristmill.report.plots import COLOURS, Drawing, marker_style
from gristmill.report.schema import Point, Report
from gristmill.report.summary import promise
from gristmill.report.tables import Column, Number, Row, Table, Text, cell, join, say

Axis = Literal["speed", "size"]
LINEAR = 0.01  # up to here the axis of accuracy is linear where errors spread far


@dataclass(frozen=True)
class Spot:
    point: Point
    x: float
    increase: float
    low: float
    high: float
    dominated: bool


def sketches(report: Report) -> list[Sketch]:
    """Against speed and against size, for each device with at least two measured points."""
    found = []
    for device in choose.devices(report):
        for by in ("speed", "size"):
            spots = _spots(report, device, by)  # type: ignore[arg-type]
            if len(spots) > 1:
                found.append(_sketch(report, device, by, spots))  # type: ignore[arg-type]
    return found


def _spots(report: Report, device: str, by: Axis) -> list[Spot]:
    spots = []
    for point in choose.good(report):
        size = point.memory.artifact_bytes if point.memory else None
        x = choose.decode_speed(report, point) if by == "speed" else size
        if point.device == device and point.accuracy and x:
            i = point.accuracy.ppl_increase
            dominated = choose.is_dominated(report, point, by)
            spots.append(Spot(point, x, i.estimate, i.low, i.high, dominated))
    return spots


def _sketch(report: Report, device: str, by: Axis, spots: list[Spot]) -> Sketch:
    name = "Accuracy against speed" if by == "speed" else "Accuracy against size"
    styles = choose.styles(report)
    return Sketch(
        id=f"pareto-{by}-{device}",
        title=f"{name}, {device}",
        reading=_reading(report, device, by, spots),
        data=_table(f"pareto-{by}-{device}-data", f"{name}, {device}", by, spots),
        paint=lambda drawing: _paint(drawing, by, spots, styles),
        device=device,
        wide=(540.0, 450.0),
        narrow=(372.0, 420.0),
    )


def _unit(by: Axis) -> units.Unit:
    return "tok/s" if by == "speed" else "bytes"


def _table(id: str, caption: str, by: Axis, spots: list[Spot]) -> Table:
    columns = (
        Column("point", numeric=False),
        Column("decode tok/s" if by == "speed" else "size on disk"),
        Column("perplexity"),
        Column("lowest"),
        Column("highest"),
        Column("dominated", numeric=False),
    )
    rows = tuple(
        Row(
            (
                cell(s.point.label),
                cell(s.x, _unit(by)),
                cell(s.increase, "increase"),
                cell(s.low, "increase"),
                cell(s.high, "increase"),
                cell("yes" if s.dominated else "no"),
            ),
            ("dominated",) if s.dominated else (),
        )
        for s in spots
    )
    return Table(id, caption, columns, rows)


def _reading(report: Report, device: str, by: Axis, spots: list[Spot]) -> Text:
    """The best point that keeps the promise, beside the reference, and what is dominated."""
    said = []
    keep = [s for s in spots if s.increase <= choose.PROMISE and not choose.is_peer(s.point)]
    base = choose.reference(report, device)
    start = next((s for s in spots if base and s.point.id == base.id), None)
    best = max(keep, key=lambda s: s.x if by == "speed" else -s.x, default=None)
    if best and start and best is not start:
        factor = best.x / start.x if by == "speed" else start.x / best.x
        said.append(
            say(
                "{} is {} as fast as {} at {} perplexity"
                if by == "speed"
                else "{} is {} smaller than {} at {} perplexity",
                best.point.label,
                Number(factor, "factor"),
                start.point.label,
                Number(best.increase, "increase"),
            )
        )
    elif best:
        said.append(
            say(
                "{} is the {} that keeps perplexity within {}",
                best.point.label,
                "fastest" if by == "speed" else "smallest",
                promise(),
            )
        )
    else:
        said.append(say("None keeps perplexity within {}", promise()))
    lost = [cell(s.point.label) for s in spots if s.dominated]
    said.append(say("dominated: {}", join(lost) if lost else say("none")))
    return say("{}.", join(said, "; "))


def _paint(drawing: Drawing, by: Axis, spots: list[Spot], styles: dict[str, choose.Style]) -> None:
    axes = drawing.axes()
    spread = max(s.increase for s in spots) > 2 * LINEAR
    scale = 1.0 if by == "speed" else float(1 << 20)
    _scale_y(axes, spots, spread)
    front = sorted((s for s in spots if not s.dominated), key=lambda s: s.x)
    axes.plot(
        [s.x / scale for s in front],
        [s.increase for s in front],
        color=COLOURS["muted"],
        linewidth=1.2,
        linestyle="dotted",
        zorder=1,
    )
    for s in spots:
        style = styles[s.point.id]
        axes.plot([s.x / scale] * 2, [s.low, s.high], color=COLOURS[style.colour], linewidth=1.4, alpha=0.6)
        (dot,) = axes.plot([s.x / scale], [s.increase], **marker_style(style, hollow=s.dominated), zorder=3)
        drawing.tip(
            dot,
            f"{s.point.label}: {units.text(s.x, _unit(by))}"
            f"{' tok/s' if by == 'speed' else ''}, perplexity {units.text(s.increase, 'increase')} "
            f"({units.text(s.low, 'increase')} to {units.text(s.high, 'increase')})"
            f"{', dominated' if s.dominated else ''}",
        )
    high = max(s.x for s in spots) / scale
    axes.set_xlim(0, high * 1.12)
    plain_ticks(axes, "x")
    better = "right" if by == "speed" else "left"
    x = "decode, tok/s" if by == "speed" else "size on disk, MiB"
    drawing.label(axes, f"{x} (better: {better})", "increase of perplexity (better: down)")
    place_labels(
        drawing,
        axes,
        [(s.x / scale, s.increase, s.point.label, "muted" if s.dominated else "ink") for s in spots],
    )
    handles = [
        axes.plot(
            [],
            [],
            color=COLOURS["muted"],
            linestyle=line,
            marker=mark,
            linewidth=1.2,
            markerfacecolor=COLOURS["paper"],
        )[0]
        for line, mark in (("dotted", ""), ("none", "o"), ("solid", ""))
    ]
    drawing.legend_of(handles, ["nothing beats these", "dominated", "95 % interval"])


def _scale_y(axes, spots: list[Spot], spread: bool) -> None:  # type: ignore[no-untyped-def]
    """Linear, or linear to 1 % and logarithmic from there, so that 0.1 % and 10 % are both seen."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(s.low for s in spots), max(s.high for s in spots)
    if spread:
        axes.set_yscale("symlog", linthresh=LINEAR, linscale=1.0)
        ticks = [
            v
            for v in (-0.01, -0.005, 0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100)
            if low * 1.2 - 0.003 <= v <= high * 1.3
        ]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.set_ylim(min(low, 0) - 0.003, high * 1.4)
        axes.axhline(LINEAR, color=COLOURS["grid"], linewidth=1.6)
    else:
        room = 0.1 * (high - low or 0.01)
        axes.set_ylim(min(low, 0) - room, high + room)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{100 * v:+.3g} %".replace("-", "−") if v else "0")
    )
