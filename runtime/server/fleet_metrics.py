"""The metrics of several replicas: under the names of a single process their sums, and each replica's with
`replica` in the name and as a label. A count of a replica that is gone stays in the sum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gristmill.runtime.server.metrics import Lossy

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from gristmill.runtime.server.fleet import Family
    from gristmill.runtime.server.front import Front

OWN = ("gristmill_requests", "gristmill_log_lines_dropped")  # that the front counts itself
PREFIX, EACH = "gristmill_", "gristmill_replica_"


class FleetCollector:
    """For a registry of prometheus_client."""

    def __init__(self, front: Front, log: Lossy):
        self._front, self._log = front, log

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        front = self._front
        requests = CounterMetricFamily(
            "gristmill_requests", "HTTP requests answered.", labels=["endpoint", "status"]
        )
        for (endpoint, status), count in list(front.measurements.requests.items()):
            requests.add_metric([endpoint, str(status)], count)
        yield requests
        for name, what, value in (
            ("log_lines_dropped", "Lines that the log could not take.", self._log.dropped),
            ("retries", "Requests asked again of another replica, since theirs was lost.", front.retries),
            ("replicas_lost", "Replicas that were there and are gone.", front.fleet.lost),
        ):
            yield CounterMetricFamily(PREFIX + name, what, value=value)
        yield GaugeMetricFamily(
            "gristmill_replicas_ready", "Replicas that take requests.", value=front.fleet.ready
        )
        sums, each = front.fleet.families()
        for name, kind, what, samples in sums:
            if name.startswith(PREFIX) and name not in OWN and not name.endswith("_ready"):
                yield _metric(name, kind, what, samples)
        yield GaugeMetricFamily(
            "gristmill_ready", "1 when requests are taken.", value=float(front.state == "ok")
        )
        yield from _each(each)


def _each(each: dict[str, list[Family]]) -> Iterator[Metric]:
    """One family for what all replicas measure."""
    made: dict[str, Metric] = {}
    for id, families in each.items():
        for name, kind, what, samples in families:
            if name in OWN:
                continue
            new = _renamed(name)
            metric = made.setdefault(new, _metric(new, kind, what, []))
            for sample, labels, value in samples:
                metric.add_sample(_renamed(sample), {**labels, "replica": id}, value)
    yield from made.values()


def _metric(name: str, kind: str, what: str, samples: list[tuple[str, dict[str, str], float]]) -> Metric:
    from prometheus_client.core import Metric

    metric = Metric(name, what, kind)
    for sample, labels, value in samples:
        metric.add_sample(sample, labels, value)
    return metric


def _renamed(name: str) -> str:
    return EACH + name.removeprefix(PREFIX)
