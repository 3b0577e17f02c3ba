"""Accuracy against speed and against size: what each step in accuracy costs or gains.

Accuracy is the divergence from the float model, by which points are called dominated: unlike an increase of
perplexity it has no noise below zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gristmill.report import choose, units
from gristmill.report.pictures.sketch import Sketch, place_labels, plain_ticks, short
from gristmill.report.plots import COLOURS, Drawing, marker_style
from gristmill.report.schema import Accuracy, Point, Report
from gristmill.report.summary import promise
from gristmill.report.tables import Column, Number, Row, Table, Text, cell, join, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Axis = Literal["speed", "size"]
SPREAD = 8  # the axis of accuracy is linear up to the power of ten below the largest over this


@dataclass(frozen=True)
class Spot:
    """x: tok/s or bytes."""

    point: Point
    x: float
    accuracy: Accuracy
    dominated: bool

    @property
    def kl(self) -> float:
        return self.accuracy.kl.estimate


def sketches(report: Report) -> list[Sketch]:
    """Against speed and against size, for each device with at least two measured points."""
    found = []
    axes: tuple[Axis, ...] = ("speed", "size")
    for device in choose.devices(report):
        for by in axes:
            spots = _spots(report, device, by)
            if len(spots) > 1:
                found.append(_sketch(report, device, by, spots))
    return found


def _spots(report: Report, device: str, by: Axis) -> list[Spot]:
    spots = []
    for point in choose.good(report):
        size = point.memory.artifact_bytes if point.memory else None
        x = choose.decode_speed(report, point) if by == "speed" else size
        if point.device == device and point.accuracy and x:
            kl = point.accuracy.kl
            if all(map(math.isfinite, (x, kl.estimate, kl.low, kl.high))):
                dominated = choose.is_dominated(report, point, by)
                spots.append(Spot(point, x, point.accuracy, dominated))
    return spots


def _sketch(report: Report, device: str, by: Axis, spots: list[Spot]) -> Sketch:
    name = "Accuracy against speed" if by == "speed" else "Accuracy against size"
    styles = choose.styles(report)
    return Sketch(
        id=f"pareto-{by}-{device}",
        title=f"{name}, {device}",
        reading=_reading(report, device, by, spots),
        data=_table(f"{name}, {device}", by, spots),
        paint=lambda drawing: _paint(drawing, by, spots, styles),
        device=device,
        wide=(540.0, 450.0),
        narrow=(372.0, 420.0),
    )


def _unit(by: Axis) -> units.Unit:
    return "tok/s" if by == "speed" else "bytes"


def _table(caption: str, by: Axis, spots: list[Spot]) -> Table:
    columns = (
        Column("point", numeric=False),
        Column("decode", "tok/s") if by == "speed" else Column("size", "on disk"),
        Column("KL", "nats per token"),
        Column("lowest", "of 95 %"),
        Column("highest", "of 95 %"),
        Column("perplexity", "increase"),
        Column("dominated", numeric=False),
    )
    rows = tuple(
        Row(
            (
                cell(s.point.label),
                cell(s.x, _unit(by)),
                cell(s.kl, "nats"),
                cell(s.accuracy.kl.low, "nats"),
                cell(s.accuracy.kl.high, "nats"),
                cell(s.accuracy.ppl_increase.estimate, "increase"),
                cell("yes" if s.dominated else "no"),
            ),
            ("dominated",) if s.dominated else (),
        )
        for s in spots
    )
    return Table("", caption, columns, rows)


def _reading(report: Report, device: str, by: Axis, spots: list[Spot]) -> Text:
    """The best point that keeps the promise, beside the reference, and what is dominated."""
    keep = [s for s in spots if choose.keeps_promise(s.point)]
    best = max(keep, key=lambda s: s.x if by == "speed" else -s.x, default=None)
    base = choose.reference(report, device)
    start = next((s for s in spots if base and s.point.id == base.id), None)
    lost = [cell(s.point.label) for s in spots if s.dominated]
    which = join(lost) if lost else say("none")
    return say("{}; dominated: {}.", _best(best, start, by), which)


def _best(best: Spot | None, start: Spot | None, by: Axis) -> Text:
    if best is None:
        return say("No rounded point is sure to keep perplexity within +{}", promise())
    more = Number(best.accuracy.ppl_increase.estimate, "increase")
    if start is None:
        what = "fastest" if by == "speed" else "smallest"
        return say("{} is the {} within +{} perplexity, at {}", best.point.label, what, promise(), more)
    factor = best.x / start.x if by == "speed" else start.x / best.x
    times = Number(factor, "factor")
    pattern = (
        "{} is {} as fast as {} at {} perplexity"
        if by == "speed"
        else "{} is {} smaller than {} at {} perplexity"
    )
    return say(pattern, best.point.label, times, start.point.label, more)


def _paint(drawing: Drawing, by: Axis, spots: list[Spot], styles: dict[str, choose.Style]) -> None:
    axes = drawing.axes()
    scale = 1.0 if by == "speed" else float(1 << 20)
    _scale_y(axes, spots)
    front = sorted((s.x / scale, s.kl) for s in spots if not s.dominated)
    look: dict[str, Any] = {"color": COLOURS["muted"], "linewidth": 1.2, "linestyle": "dotted", "zorder": 1}
    axes.plot([x for x, _ in front], [y for _, y in front], **look)
    for s in spots:
        _mark(drawing, axes, by, s, s.x / scale, styles[s.point.id])
    axes.set_xlim(0, max(s.x for s in spots) / scale * 1.12)
    plain_ticks(axes, "x")
    x = "decode, tok/s (better: right)" if by == "speed" else "size on disk, MiB (better: left)"
    drawing.label(axes, x, "divergence from float, KL in nats (better: down)")
    _legend(drawing)
    colours = {True: "muted", False: "ink"}
    labels = [(s.x / scale, s.kl, s.point.label, colours[s.dominated]) for s in spots]
    place_labels(drawing, axes, labels)


def _mark(drawing: Drawing, axes: Axes, by: Axis, spot: Spot, x: float, style: choose.Style) -> None:
    kl, more = spot.accuracy.kl, spot.accuracy.ppl_increase
    axes.plot([x, x], [kl.low, kl.high], color=COLOURS[style.colour], linewidth=1.4, alpha=0.6)
    (dot,) = axes.plot([x], [kl.estimate], **marker_style(style, hollow=spot.dominated), zorder=3)
    drawing.tip(
        dot,
        f"{spot.point.label}: {units.text(spot.x, _unit(by))}{' tok/s' if by == 'speed' else ''}, "
        f"KL {units.text(kl.estimate, 'nats')} "
        f"({units.text(kl.low, 'nats')} to {units.text(kl.high, 'nats')}), "
        f"perplexity {units.text(more.estimate, 'increase')}{', dominated' if spot.dominated else ''}",
    )


def _legend(drawing: Drawing) -> None:
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"color": COLOURS["muted"], "linewidth": 1.2, "markerfacecolor": COLOURS["paper"]}
    kinds: dict[str, tuple[Any, str]] = {
        "nothing beats these": ("dotted", ""),
        "dominated": ("none", "o"),
        "95 % interval": ("solid", ""),
    }
    handles = [Line2D([], [], linestyle=line, marker=mark, **look) for line, mark in kinds.values()]
    drawing.legend_of(handles, list(kinds))


def _scale_y(axes: Axes, spots: list[Spot]) -> None:
    """Linear near zero and logarithmic above, so that a thousandth and a tenth are both seen."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    high = max(max(s.accuracy.kl.high, s.kl) for s in spots)
    if high > 0:
        linear = 10.0 ** math.floor(math.log10(high / SPREAD))
        axes.set_yscale("symlog", linthresh=linear, linscale=1.0)
        places = (0, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100)
        axes.yaxis.set_major_locator(FixedLocator([p * linear for p in places if p * linear <= high * 1.3]))
        axes.set_ylim(-0.12 * linear, high * 1.35)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(short))
