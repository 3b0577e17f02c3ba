"""Which weight matrices the rounding hurts: a strip of cells for each point, layers from left to right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from gristmill.report import choose, units
from gristmill.report.pictures.sketch import Sketch
from gristmill.report.plots import COLOURS, FONT, Drawing
from gristmill.report.schema import LayerError, Point, Report
from gristmill.report.tables import Column, Number, Row, Table, Text, cell, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRIPS = 6  # more are in the table
Cells = dict[tuple[str, int | None], LayerError]


def sketches(report: Report) -> list[Sketch]:
    points = [point for point in choose.good(report) if point.layer_errors]
    first: dict[str, Point] = {}  # of the points that run one artifact, on other devices
    for point in points:
        first.setdefault(point.artifact or point.id, point)
    distinct = list(first.values())
    if not distinct:
        return []
    shown = distinct[:STRIPS]
    height = 110.0 + sum(17.0 * len(_parts(point)) + 32.0 for point in shown)
    return [
        Sketch(
            id="layers",
            title="Error of each weight matrix",
            reading=_reading(distinct),
            data=_table(distinct),
            paint=lambda drawing: _paint(drawing, shown),
            half=False,
            wide=(1100.0, height),
            narrow=(372.0, height),
            device=shown[0].device,
        )
    ]


def _parts(point: Point) -> list[str]:
    """Of the layers, in the order of the program."""
    return list(dict.fromkeys(e.part for e in point.layer_errors if e.layer is not None))


def _layers(point: Point) -> list[int]:
    return sorted({e.layer for e in point.layer_errors if e.layer is not None})


def _outside(point: Point) -> list[LayerError]:
    """Matrices that belong to no layer: the head, the embedding."""
    return [e for e in point.layer_errors if e.layer is None]


def _cells(point: Point) -> Cells:
    return {(e.part, e.layer): e for e in point.layer_errors}


def _table(points: list[Point]) -> Table:
    layers = sorted({x for p in points for x in _layers(p)})
    columns = (
        Column("point", numeric=False),
        Column("part", numeric=False),
        Column("no layer"),
        *(Column(f"{layer}") for layer in layers),
    )
    rows = []
    for point in points:
        cells = _cells(point)
        for part in dict.fromkeys(e.part for e in point.layer_errors):
            found = [cells.get((part, layer)) for layer in (None, *layers)]
            rows.append(
                Row((cell(point.label), cell(part), *(cell(e.error if e else None, "error") for e in found)))
            )
    return Table("layers-data", "Relative squared error by part and layer", columns, tuple(rows))


def _reading(points: list[Point]) -> Text:
    """Which matrix is the worst, and whether in all points."""
    worst = {p.id: max(p.layer_errors, key=lambda e: e.error) for p in points}
    top = max(points, key=lambda p: worst[p.id].error)
    name = worst[top.id].name
    same = sum(e.name == name for e in worst.values())
    mean = sum(e.error for e in top.layer_errors) / len(top.layer_errors)
    said = say("{} is the worst with {} in {}", name, Number(worst[top.id].error, "error"), top.label)
    if mean > 0:
        said = say("{}, {} the mean of all its matrices", said, Number(worst[top.id].error / mean, "factor"))
    if len(points) > 1:
        said = say(
            "{}; it is the worst in {} of {} points",
            said,
            Number(same, "count"),
            Number(len(points), "count"),
        )
    return say("{}.", said)


def _paint(drawing: Drawing, points: list[Point]) -> None:
    colour, low, high = _colours(points)
    drawing.spread(0.09)
    ratios = [len(_parts(p)) for p in points]
    grid = drawing.figure.add_gridspec(len(points) + 1, 1, height_ratios=[*ratios, 0.8])
    for i, point in enumerate(points):
        _strip(drawing, drawing.bare(grid[i, 0]), point, colour, last=i == len(points) - 1)
    _scale(drawing, drawing.bare(grid[len(points), 0]), low, high, colour)


def _colours(points: list[Point]) -> tuple[Callable[[float], str], float, float]:
    """Error -> colour on a logarithmic scale from the 2nd percentile to the largest; its ends as log10."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    errors = [e.error for p in points for e in p.layer_errors if 0 < e.error < math.inf] or [1e-3, 1.0]
    low, high = np.log10(np.quantile(errors, 0.02)), math.log10(max(errors))
    shades = colormaps["viridis"]

    def colour(error: float) -> str:
        place = math.log10(error) if 0 < error < math.inf else (low if error <= 0 else high)
        return to_hex(shades(float(np.clip((place - low) / max(high - low, 1e-9), 0, 1))))

    return colour, float(low), high


def _strip(drawing: Drawing, axes: Axes, point: Point, colour: Callable[[float], str], last: bool) -> None:
    parts, layers, cells = _parts(point), _layers(point), _cells(point)
    for row, part in enumerate(parts):
        for column, layer in enumerate(layers):
            if found := cells.get((part, layer)):
                _box(drawing, axes, column, row, 1.0, point, found, colour(found.error))
    unit = max(1, len(layers)) / (9 if drawing.narrow else 26)  # width of a cell beside the layers
    start = len(layers) + unit / 2
    for row, found in enumerate(_outside(point)):
        _box(drawing, axes, start, row, unit, point, found, colour(found.error))
        axes.text(
            start + 1.2 * unit, row + 0.5, found.part, va="center", fontsize=FONT - 1, color=COLOURS["ink"]
        )
    axes.set_xlim(0, start + 3.2 * unit)
    axes.set_ylim(max(len(parts), len(_outside(point))), 0)
    axes.set_yticks([row + 0.5 for row in range(len(parts))], parts)
    step = max(1, math.ceil(len(layers) / (8 if drawing.narrow else 24)))
    ticks = [(i + 0.5, f"{x}") for i, x in enumerate(layers) if i % step == 0] if last else []
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    axes.set_title(drawing.fit(point.label, 60), loc="left", fontsize=FONT, color=COLOURS["ink"])
    if last:
        axes.set_xlabel("layer", fontsize=FONT, color=COLOURS["ink"], loc="left")


def _box(
    drawing: Drawing,
    axes: Axes,
    x: float,
    y: float,
    width: float,
    point: Point,
    found: LayerError,
    colour: str,
) -> None:
    from matplotlib.patches import Rectangle

    box = Rectangle((x, y), 0.95 * width, 0.94, facecolor=colour, linewidth=0)
    drawing.tip(axes.add_artist(box), f"{point.label}, {found.name}: {units.text(found.error, 'error')}")


def _scale(drawing: Drawing, axes: Axes, low: float, high: float, colour: Callable[[float], str]) -> None:
    from matplotlib.patches import Rectangle

    steps = 40
    for i in range(steps):
        value = low + (high - low) * (i + 0.5) / steps
        axes.add_artist(Rectangle((i, 0), 1.04, 1, facecolor=colour(10**value), linewidth=0))
    axes.set_xlim(0, steps if drawing.narrow else steps * 2.5)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_xticks([0, steps / 2, steps], [units.figures(10**v, 2) for v in (low, (low + high) / 2, high)])
    axes.set_title("relative squared error", loc="left", fontsize=FONT, color=COLOURS["ink"])
