"""Which weight matrices the rounding hurts: a strip of cells for each point, layers from left to right."""

from __future__ import annotations

import math

from gristmill.report import choose, units
from gristmill.report.pictures.sketch import Sketch
from gristmill.report.plots import COLOURS, FONT, Drawing
from gristmill.report.schema import LayerError, Point, Report
from gristmill.report.tables import Column, Number, Row, Table, Text, cell, join, say

STRIPS = 6  # more are in the table
Cells = dict[tuple[str, int | None], LayerError]


def sketches(report: Report) -> list[Sketch]:
    points = [point for point in choose.good(report) if point.layer_errors]
    distinct = list({(p.artifact or p.id): p for p in reversed(points)}.values())[::-1]  # one for all devices
    if not distinct:
        return []
    shown = distinct[:STRIPS]
    rows = sum(len(_parts(point)) for point in shown)
    columns = max(len(_layers(point)) for point in shown)
    step = min(30.0, max(15.0, 900.0 / (columns + 2)))
    return [
        Sketch(
            id="layers",
            title="Error of each weight matrix",
            reading=_reading(distinct),
            data=_table(distinct),
            paint=lambda drawing: _paint(drawing, shown),
            half=False,
            wide=(1100.0, 76.0 + 17.0 * rows + 36.0 * len(shown)),
            narrow=(372.0, 76.0 + 17.0 * rows + 36.0 * len(shown)),
            device=shown[0].device,
        )
    ] if step else []


def _parts(point: Point) -> list[str]:
    return list(dict.fromkeys(e.part for e in point.layer_errors))


def _layers(point: Point) -> list[int | None]:
    """In order; matrices outside of layers come last, as None."""
    found = {e.layer for e in point.layer_errors}
    return [*sorted(x for x in found if x is not None), *([None] if None in found else [])]


def _cells(point: Point) -> Cells:
    return {(e.part, e.layer): e for e in point.layer_errors}


def _table(points: list[Point]) -> Table:
    layers = sorted({x for p in points for x in _layers(p) if x is not None})
    columns = (Column("point", numeric=False), Column("part", numeric=False),
               *(Column(f"{layer}") for layer in layers), Column("outside"))  # fmt: skip
    rows = []
    for point in points:
        cells = _cells(point)
        for part in _parts(point):
            values = [cells.get((part, layer)) for layer in (*layers, None)]
            rows.append(Row((cell(point.label), cell(part), *(cell(v.error if v else None, "error") for v in values))))
    return Table("layers-data", "Relative squared error by part and layer", columns, tuple(rows))


def _reading(points: list[Point]) -> Text:
    said = []
    for point in points[:STRIPS]:
        worst = max(point.layer_errors, key=lambda e: e.error)
        mean = sum(e.error for e in point.layer_errors) / len(point.layer_errors)
        said.append(say("{}: worst is {} with {}, {} its mean", point.label, worst.name,
                        Number(worst.error, "error"), Number(worst.error / mean if mean else 1.0, "factor")))  # fmt: skip
    return say("{}.", join(said, "; "))


def _paint(drawing: Drawing, points: list[Point]) -> None:
    from matplotlib import colormaps

    errors = [e.error for p in points for e in p.layer_errors if e.error > 0 and math.isfinite(e.error)]
    low, high = (math.log10(min(errors)), math.log10(max(errors))) if errors else (0.0, 1.0)
    colours = colormaps["cividis"]

    def colour(error: float) -> str:
        from matplotlib.colors import to_hex

        if error <= 0:
            return to_hex(colours(0.0))
        return to_hex(colours(min(1.0, (math.log10(error) - low) / max(high - low, 1e-9)))) if error < math.inf else "red"

    ratios = [len(_parts(p)) + 0.4 for p in points]
    grid = drawing.figure.add_gridspec(len(points) + 1, 1, height_ratios=[*ratios, 0.7])
    for i, point in enumerate(points):
        _strip(drawing, grid[i, 0], point, colour, last=i == len(points) - 1)
    _scale(drawing, grid[len(points), 0], low, high, colour)


def _strip(drawing: Drawing, where, point: Point, colour, last: bool) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.patches import Rectangle

    axes = drawing.axes(*(), **{}) if where is None else _bare(drawing, where)
    parts, layers, cells = _parts(point), _layers(point), _cells(point)
    for row, part in enumerate(parts):
        for column, layer in enumerate(layers):
            if found := cells.get((part, layer)):
                x = column + (0.5 if layer is None else 0.0)
                box = axes.add_patch(Rectangle((x, row), 0.94, 0.94, facecolor=colour(found.error), linewidth=0))
                drawing.tip(box, f"{point.label}, {found.name}: {units.text(found.error, 'error')}")
    axes.set_xlim(0, len(layers) + 0.5)
    axes.set_ylim(len(parts), 0)
    axes.set_yticks([row + 0.5 for row in range(len(parts))], parts)
    inside = [x for x in layers if x is not None]
    step = max(1, math.ceil(len(inside) / (8 if drawing.narrow else 24)))
    ticks = [(i + 0.5, f"{x}") for i, x in enumerate(inside) if i % step == 0]
    if None in layers and not drawing.narrow:
        ticks.append((len(inside) + 1.0, "outside"))
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    axes.set_title(point.label, loc="left", fontsize=FONT, color=COLOURS["ink"])
    if last:
        axes.set_xlabel("layer", fontsize=FONT, color=COLOURS["ink"])


def _bare(drawing: Drawing, where):  # type: ignore[no-untyped-def]
    axes = drawing.figure.add_subplot(where)
    axes.set_facecolor("none")
    axes.tick_params(length=0, labelcolor=COLOURS["ink"], labelsize=FONT - 1)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _scale(drawing: Drawing, where, low: float, high: float, colour) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.patches import Rectangle

    axes = _bare(drawing, where)
    steps = 40
    for i in range(steps):
        value = low + (high - low) * (i + 0.5) / steps
        axes.add_patch(Rectangle((i, 0), 1.02, 1, facecolor=colour(10**value), linewidth=0))
    axes.set_xlim(0, steps if drawing.narrow else steps * 2.5)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_xticks([0, steps / 2, steps], [units.figures(10**v, 2) for v in (low, (low + high) / 2, high)])
    axes.set_title("relative squared error", loc="left", fontsize=FONT, color=COLOURS["ink"])
