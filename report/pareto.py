"""Dominated points: another one costs no more accuracy, is no worse in the other respect, and better in one.

Accuracy is the mean KL divergence, which noise cannot turn negative as it can an increase of perplexity. A
point is held only against points on its own device: on another, speeds are of another machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gristmill.report import choose
from gristmill.report.schema import Point, Report

# A cost: less is better, None is not measured.
Cost = Callable[[Report, Point], float | None]


def seconds_per_token(report: Report, point: Point) -> float | None:
    """Of decoding one sequence, at the shape that choose.decode_shape names."""
    speed = choose.decode_speed(report, point)
    return 1 / speed if speed else None


def stored_bytes(report: Report, point: Point) -> float | None:
    return point.memory.artifact_bytes if point.memory else None


COSTS: dict[str, Cost] = {"speed": seconds_per_token, "size": stored_bytes}


def with_dominated(report: Report) -> Report:
    """The report with `dominated` filled in for each of COSTS."""
    return replace(report, dominated={name: dominated(report, cost) for name, cost in COSTS.items()})


def dominated(report: Report, cost: Cost) -> tuple[str, ...]:
    """Ids of the points that another one dominates; those without both figures are neither."""
    placed = [(p, p.accuracy.kl.estimate, cost(report, p)) for p in choose.good(report) if p.accuracy]
    known = [(point, error, price) for point, error, price in placed if price is not None]
    return tuple(
        point.id
        for point, error, price in known
        if any(
            other.device == point.device and e <= error and c <= price and (e, c) != (error, price)
            for other, e, c in known
        )
    )
