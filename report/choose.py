"""Which of a report's many figures stand for a point: a decode speed, a prefill speed; the best points."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from gristmill.compiler.statistics import are_enough
from gristmill.report.schema import Point, Report, SpeedPoint

FLOATS = ("f32", "bf16", "f16")
PROMISE = 0.01  # the increase of perplexity that "without visible loss" allows


@dataclass(frozen=True)
class Shape:
    """Of a forward: see SpeedPoint."""

    rows: int
    context: int
    sequences: int


@dataclass(frozen=True)
class Pick:
    """A point worth taking. why: what it is the best at."""

    point: Point
    why: str


def good(report: Report) -> list[Point]:
    return [point for point in report.points if point.status == "ok"]


def devices(report: Report) -> list[str]:
    """Devices with at least one point that was measured, in the order of the points."""
    return list(dict.fromkeys(point.device for point in good(report)))


def is_peer(point: Point) -> bool:
    return not point.runtime.startswith("gristmill")


def shape_of(speed: SpeedPoint) -> Shape:
    return Shape(speed.rows, speed.context, speed.sequences)


def decode_shape(report: Report) -> Shape | None:
    """The decode of one sequence that most points share; of equals the shortest context."""
    return _common(report, lambda s: s.phase == "decode" and s.sequences == 1, lambda s: s.context)


def prefill_shape(report: Report) -> Shape | None:
    """The prefill from nothing that most points share; of equals the longest."""
    return _common(report, lambda s: s.phase == "prefill" and s.context == 0, lambda s: -s.rows)


def _common(
    report: Report, wanted: Callable[[SpeedPoint], bool], order: Callable[[Shape], int]
) -> Shape | None:
    counts = Counter(shape_of(s) for point in good(report) for s in point.speed if wanted(s))
    return min(counts, key=lambda shape: (-counts[shape], order(shape)), default=None)


def speed_at(point: Point, phase: str, shape: Shape | None) -> SpeedPoint | None:
    return next((s for s in point.speed if s.phase == phase and shape_of(s) == shape), None)


def decode_speed(report: Report, point: Point) -> float | None:
    """tok/s of one sequence at `decode_shape`."""
    found = speed_at(point, "decode", decode_shape(report))
    return found.tokens_s if found else None


def reference(report: Report, device: str) -> Point | None:
    """What others on `device` are compared with: gristmill's own point with unrounded weights."""
    own = [p for p in good(report) if p.device == device and not is_peer(p)]
    return next((p for name in ("f16", "bf16", "f32") for p in own if p.weights == name), None)


def picks(report: Report) -> list[Pick]:
    """On each device the fastest and the smallest of gristmill's rounded points that keep PROMISE.

    Of equally small ones the one that diverges least; one point that is both comes once.
    """
    found: list[Pick] = []
    for device in devices(report):
        keep = [p for p in good(report) if p.device == device and keeps_promise(p)]
        speeds = {p.id: decode_speed(report, p) or 0.0 for p in keep}
        fast = max((p for p in keep if speeds[p.id]), key=lambda p: speeds[p.id], default=None)
        sizes = {p.id: p.memory.artifact_bytes for p in keep if p.memory}
        small = min((p for p in keep if p.id in sizes), key=lambda p: (sizes[p.id], _kl(p)), default=None)
        if fast and fast is small:
            found.append(Pick(fast, "fastest and smallest"))
        else:
            found += [Pick(p, why) for p, why in ((fast, "fastest"), (small, "smallest")) if p]
    return found


def _kl(point: Point) -> float:
    return point.accuracy.kl.estimate if point.accuracy else math.inf


def keeps_promise(point: Point) -> bool:
    """Whether one of gristmill's rounded points keeps PROMISE with its whole interval, as the gate asks; on a
    text that is too short for an interval, none does."""
    if is_peer(point) or point.weights in FLOATS or point.accuracy is None:
        return False
    return are_enough(point.accuracy.tokens) and point.accuracy.ppl_increase.high <= PROMISE


def is_dominated(report: Report, point: Point, by: str) -> bool:
    """by: "speed" or "size"."""
    return point.id in report.dominated.get(by, ())


@dataclass(frozen=True)
class Style:
    """How a point looks in every picture. colour: a name of plots.COLOURS."""

    colour: str
    marker: str
    dash: str


_COLOUR = {"f32": "ink", "bf16": "ink", "f16": "ink", "int8": "blue", "fp8": "sky", "int4": "orange"}
_COLOUR |= {"int3": "green", "int2": "red"}
_MARKERS = "osD^vPX<>ph"


def styles(report: Report) -> dict[str, Style]:
    """Point's id -> style: colour by weights (peers: one of their own), marker by turn, dashes by cache."""
    found, drawn = {}, 0
    for point in report.points:
        colour = "purple" if is_peer(point) else _COLOUR.get(point.weights.split(" ")[0], "sky")
        dash = "dashed" if point.kv not in (*FLOATS, "") else "solid"
        marker = _MARKERS[drawn % len(_MARKERS)]
        found[point.id] = Style(colour, marker, "dashdot" if is_peer(point) else dash)
        drawn += point.status == "ok"
    return found
