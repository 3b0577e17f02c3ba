"""Attained rate over arithmetic intensity, under the roofs that were measured in the same run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gristmill.report import choose, units
from gristmill.report.pictures.sketch import Sketch, logarithmic
from gristmill.report.plots import COLOURS, FONT, Drawing
from gristmill.report.schema import KindVerdict, Machine, PhaseWhy, Point, Report
from gristmill.report.tables import Column, Number, Row, Table, Text, cell, say

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
        if operations and read:
            yield Dot(point, why.name, _kind(why), operations / read, operations / why.seconds, why.verdict)
        for kind in why.kinds:
            if kind.kind == "attention" and kind.operations and kind.bytes and kind.seconds:
                yield Dot(point, why.name, "attention", kind.intensity, attained(kind), kind.verdict)


def attained(kind: KindVerdict) -> float:
    """Operations per second."""
    return kind.operations / kind.seconds if kind.seconds else 0.0


def _kind(why: PhaseWhy) -> str:
    return "prefill" if why.rows > 1 else ("decode of a batch" if why.sequences > 1 else "decode")


def _sketch(report: Report, device: str, machine: Machine, dots: list[Dot]) -> Sketch:
    styles = choose.styles(report)
    columns = (Column("point", numeric=False), Column("phase", numeric=False), Column("of", numeric=False),
               Column("operations per byte"), Column("attained"), Column("of the roof"),
               Column("verdict", numeric=False))  # fmt: skip
    rows = tuple(
        Row((cell(d.point.label), cell(d.phase), cell("attention" if d.kind == "attention" else "all"),
             cell(d.intensity, "ops/byte"), cell(d.rate, "ops/s"), cell(d.rate / _roof(machine, d), "share"),
             cell(d.verdict)))
        for d in dots
    )  # fmt: skip
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


def _peak(machine: Machine, point: Point) -> float:
    """Integer weights are multiplied in integers, others in floats."""
    return machine.integer_ops_s if point.weights.startswith("int") else machine.float_ops_s


def _roof(machine: Machine, dot: Dot) -> float:
    return min(machine.read_bytes_s * dot.intensity, _peak(machine, dot.point))


def _reading(machine: Machine, dots: list[Dot]) -> Text:
    """The nearest and the farthest decode and prefill."""
    said = [say("memory gives {}, so below {} operations per byte reading sets the pace",
                Number(machine.read_bytes_s, "bytes/s"),
                Number(machine.integer_ops_s / machine.read_bytes_s, "ops/byte"))]  # fmt: skip
    for kind in ("decode", "prefill"):
        some = [d for d in dots if d.kind == kind]
        if some:
            near = max(some, key=lambda d: d.rate / _roof(machine, d))
            said.append(say("{} of {} reaches {} of its roof", kind, near.point.label,
                            Number(near.rate / _roof(machine, near), "share")))  # fmt: skip
    return say("{}.", say("; ".join(["{}"] * len(said)), *said))


def _paint(drawing: Drawing, machine: Machine, dots: list[Dot], styles: dict[str, choose.Style]) -> None:
    from matplotlib.lines import Line2D

    axes = drawing.axes()
    ridge = machine.integer_ops_s / machine.read_bytes_s
    low = min([d.intensity for d in dots] + [ridge / 20]) / 2
    high = max([d.intensity for d in dots] + [ridge]) * 3
    axes.set_xlim(low, high)
    axes.set_ylim(min([d.rate for d in dots] + [low * machine.read_bytes_s]) / 2, machine.integer_ops_s * 2)
    logarithmic(axes, "x")
    logarithmic(axes, "y")
    _roofs(drawing, axes, machine, low, high)
    for dot in dots:
        colour, hollow = COLOURS[styles[dot.point.id].colour], dot.kind == "attention"
        (mark,) = axes.plot([dot.intensity], [dot.rate], marker=_MARKERS[dot.kind], markersize=7 if hollow else 9,
                            color=colour, markerfacecolor=COLOURS["paper"] if hollow else colour,
                            markeredgewidth=1.5, linestyle="none", zorder=3)  # fmt: skip
        drawing.tip(mark, f"{dot.point.label}, {dot.phase}{', attention' if hollow else ''}: "
                          f"{units.text(dot.intensity, 'ops/byte')} operations per byte, "
                          f"{units.text(dot.rate, 'ops/s')}, {dot.verdict}-bound")  # fmt: skip
    drawing.label(axes, "operations per byte", "operations per second")
    axes.yaxis.set_major_formatter(lambda value, _: units.text(value, "ops/s").replace(".00", "").replace(".0", ""))
    kinds = [k for k in _MARKERS if any(d.kind == k for d in dots)]
    handles = [Line2D([], [], color=COLOURS["ink"], marker=_MARKERS[k], linestyle="none", markersize=8,
                      markerfacecolor=COLOURS["paper"] if k == "attention" else COLOURS["ink"]) for k in kinds]  # fmt: skip
    colours = {styles[d.point.id].colour: _family(d.point) for d in dots}
    handles += [Line2D([], [], color=COLOURS[c], linewidth=6, solid_capstyle="butt") for c in colours]
    drawing.legend_of(handles, [*kinds, *colours.values()])


def _family(point: Point) -> str:
    return "peers" if choose.is_peer(point) else point.weights.split(" ")[0]


def _roofs(drawing: Drawing, axes, machine: Machine, low: float, high: float) -> None:  # type: ignore[no-untyped-def]
    stream = machine.read_bytes_s
    for peak, name, dash in ((machine.integer_ops_s, "integer products", "solid"),
                             (machine.float_ops_s, "float products", "dashed")):  # fmt: skip
        axes.plot([peak / stream, high], [peak, peak], color=COLOURS["muted"], linewidth=1.8, linestyle=dash)
        axes.annotate(f"{name} {units.text(peak, 'ops/s')}", (high, peak), (-4, 4), textcoords="offset points",
                      ha="right", va="bottom", color=COLOURS["muted"], fontsize=FONT - 1)  # fmt: skip
    ridge = machine.integer_ops_s / stream
    axes.plot([low, ridge], [low * stream, ridge * stream], color=COLOURS["muted"], linewidth=1.8)
    axes.annotate(f"memory {units.text(stream, 'bytes/s')}", (low, low * stream), (8, 22 if drawing.narrow else 30),
                  textcoords="offset points", color=COLOURS["muted"], fontsize=FONT - 1)  # fmt: skip
