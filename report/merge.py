"""Rounds of one point's speed into its figures: medians, each figure over the rounds that have it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gristmill.report import storage
from gristmill.report.schema import Energy, Latency, Machine, Memory, SpeedPoint


@dataclass(frozen=True)
class Speed:
    """machine: None for a peer, which does not look at the roofs."""

    machine: Machine | None
    points: tuple[SpeedPoint, ...]
    latency: Latency | None
    load_seconds: float | None
    memory: Memory | None
    energy: Energy | None
    version: str = ""


def merge_rounds(rounds: Sequence[dict[str, Any]]) -> Speed:
    """rounds: what the tasks `speed` and `peer_speed` gave, the one that sampled memory first."""
    read = [_read(found) for found in rounds]
    first = read[0]
    return replace(
        first,
        machine=merge_machines(found.machine for found in read if found.machine),
        points=_points(read),
        latency=_latency([found.latency for found in read if found.latency]),
        energy=_energy([found.energy for found in read if found.energy]),
    )


def merge_machines(found: Iterable[Machine]) -> Machine | None:
    """The first with the median roofs of all."""
    machines = list(found)
    if not machines:
        return None
    roofs = ("read_bytes_s", "float_ops_s", "integer_ops_s")
    return replace(machines[0], **{r: statistics.median(getattr(m, r) for m in machines) for r in roofs})


def _read(found: dict[str, Any]) -> Speed:
    def value(name: str, kind: Any) -> Any:
        return None if found[name] is None else storage.value_of(found[name], kind, f"a stored {name}")

    return Speed(
        value("machine", Machine),
        value("points", tuple[SpeedPoint, ...]),
        value("latency", Latency),
        found["load_seconds"],
        value("memory", Memory),
        value("energy", Energy),
        found.get("version", ""),
    )


def _points(rounds: Sequence[Speed]) -> tuple[SpeedPoint, ...]:
    by_shape: dict[tuple[Any, ...], list[SpeedPoint]] = {}
    for point in (p for found in rounds for p in found.points):
        by_shape.setdefault((point.phase, point.rows, point.context, point.sequences), []).append(point)
    return tuple(_median_point(points) for points in by_shape.values())


def _median_point(points: list[SpeedPoint]) -> SpeedPoint:
    """tokens_s follows from the median seconds, so that the two agree."""
    first, seconds = points[0], statistics.median(p.seconds for p in points)
    shares = [p.roof_share for p in points if p.roof_share is not None]
    return replace(
        first,
        seconds=seconds,
        tokens_s=first.rows * first.sequences / seconds,
        roof_share=statistics.median(shares) if shares else None,
        rounds=sum(p.rounds for p in points),
    )


def _latency(found: list[Latency]) -> Latency | None:
    if not found:
        return None
    names = ("first_token", "inter_token_p50", "inter_token_p95", "inter_token_p99")
    return replace(found[0], **{n: statistics.median(getattr(x, n) for x in found) for n in names})


def _energy(found: list[Energy]) -> Energy | None:
    if not found:
        return None
    return replace(found[0], joules_per_token=statistics.median(e.joules_per_token for e in found))
