"""A picture before it is drawn, and what several pictures draw alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gristmill.report import units
from gristmill.report.plots import COLOURS, FONT, Drawing
from gristmill.report.tables import Table, Text
from gristmill.report.units import Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HALF = (540.0, 400.0)
SMALL = (372.0, 360.0)


@dataclass(frozen=True)
class Sketch:
    """paint draws it; half: two stand side by side on a broad page; wide, narrow: sizes in user units."""

    id: str
    title: str
    reading: Text
    data: Table
    paint: Callable[[Drawing], None]
    command: str = ""
    device: str = ""
    half: bool = True
    wide: tuple[float, float] = HALF
    narrow: tuple[float, float] = SMALL


def short(value: float, _: Any = None) -> str:
    """A tick's number: 500, 2k, 1.5M, 0.01."""
    for limit, size, name in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / size:.3g}{name}"
    return f"{value:.4g}".replace("-", "−").replace("e−0", "e−")


def trimmed(unit: Unit) -> Callable[[float, Any], str]:
    """Writes a tick in `unit` without the zeros after its point: 10 ms."""

    def write(value: float, _: Any = None) -> str:
        return re.sub(r"\.0+(?=\D|$)|(\.\d*?[1-9])0+(?=\D|$)", r"\1", units.text(value, unit))

    return write


def logarithmic(
    axes: Axes, which: str, values: Iterable[float] = (), write: Callable[[float, Any], str] = short
) -> None:
    """A logarithmic x or y axis with plain numbers; values: ticks at these alone."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    ticks = sorted(set(values))
    few = low > 0 and high / low < 80
    axis.set_major_locator(
        FixedLocator(ticks) if ticks else LogLocator(subs=(1, 2, 5) if few else (1,), numticks=9)
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(write))


def plain_ticks(axes: Axes, which: str, write: Callable[[float, Any], str] = short, count: int = 6) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(write))


def place_labels(drawing: Drawing, axes: Axes, spots: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes (x, y, text, colour) beside each spot where it covers least: other spots, labels, the edge."""
    drawing.settle()
    dots = [axes.transData.transform((x, y)) for x, y, _, _ in spots]
    frame = axes.get_window_extent()
    taken: list[tuple[float, float, float, float]] = [(px - 7, py - 7, px + 7, py + 7) for px, py in dots]
    for i in sorted(range(len(spots)), key=lambda i: -dots[i][1]):
        x, y, text, colour = spots[i]
        text = drawing.fit(text, drawing.width / 2)
        width, height = 0.57 * FONT * len(text), FONT * 1.15
        best = min(
            _around(width, height), key=lambda at: _covered(_box(dots[i], at, width, height), taken, frame)
        )
        taken.append(_box(dots[i], best, width, height))
        ha = "left" if best[0] > 2 else ("right" if best[0] < -width + 2 else "center")
        shift = best[0] + {"left": 0.0, "right": width, "center": width / 2}[ha]
        axes.annotate(
            text,
            (x, y),
            (shift, best[1] + height / 2),
            textcoords="offset points",
            ha=ha,
            va="center",
            fontsize=FONT - 1,
            color=COLOURS[colour],
            annotation_clip=False,
            in_layout=False,
        )


def _around(width: float, height: float) -> list[tuple[float, float]]:
    """Where a label's lower left corner may be, from the spot."""
    gap = 9.0
    across = (gap, -width / 2, -width - gap)
    near = [
        (x, y) for x in across for y in (-height / 2, gap - 2, -height - gap + 2) if x != -width / 2 or y > -5
    ]
    under = [(-width / 2, -height - gap + 2)]
    far = [(x, y) for x in across for y in (gap + height, -2 * height - gap)]
    return [*near, *under, *far]


def _box(dot: Any, at: tuple[float, float], width: float, height: float) -> tuple[float, float, float, float]:
    return dot[0] + at[0], dot[1] + at[1], dot[0] + at[0] + width, dot[1] + at[1] + height


def _covered(box: tuple[float, float, float, float], taken: Iterable[tuple[float, ...]], frame: Any) -> float:
    """Area that a label would share with others, and that lies outside of the axes (twice as bad)."""
    shared = 0.0
    for other in taken:
        across = min(box[2], other[2]) - max(box[0], other[0])
        down = min(box[3], other[3]) - max(box[1], other[1])
        shared += max(0.0, across) * max(0.0, down)
    inside_x = max(0.0, min(box[2], frame.x1) - max(box[0], frame.x0))
    inside_y = max(0.0, min(box[3], frame.y1) - max(box[1], frame.y0))
    return shared + 2 * ((box[2] - box[0]) * (box[3] - box[1]) - inside_x * inside_y)
