"""What the server measures, for Prometheus.

Counts are kept in plain numbers and turned into metrics when asked for: what happens at every step may cost
a microsecond, not ten.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

from gristmill.runtime.decoding.sequence import Sequence

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from gristmill.runtime.server.engine import Engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
WINDOW_S = 10  # of tokens per second
FORGETS = 0.1  # weight of the latest request in the mean


class Buckets:
    """A histogram: counts of values up to each bound, and their sum."""

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """(upper bound, values up to it) of each bucket, and the sum of all values."""
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True)), self._sum


class Measurements:
    """Counts of one server; the event loop's, but for batch_rows, which the decoding thread adds to."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by endpoint and status
        self.finish_reasons: Counter[str] = Counter()
        self.generated_tokens = 0
        self.disconnects = 0
        self.ttft, self.inter_token, self.duration = Buckets(SECONDS), Buckets(SECONDS), Buckets(SECONDS)
        self.batch_rows = Buckets(ROWS)
        self.mean_request_s = 1.0
        self._recent: deque[list[float]] = deque()  # [second, tokens] of the last ones

    def tokens(self, count: int, now: float, before: float, first: bool) -> None:
        """Takes in `count` new tokens of an answer at `now`. before: when the last ones came, or when the
        request did. Tokens that come together share the time since then."""
        self.generated_tokens += count
        if first:
            self.ttft.add(now - before)
        else:
            self.inter_token.add((now - before) / count, count)
        second = float(int(now))
        if not self._recent or self._recent[-1][0] != second:
            self._recent.append([second, 0.0])
            while self._recent[0][0] < second - WINDOW_S:
                self._recent.popleft()
        self._recent[-1][1] += count

    def finished(self, sequence: Sequence, now: float) -> None:
        seconds = now - sequence.started
        self.duration.add(seconds)
        self.mean_request_s += FORGETS * (seconds - self.mean_request_s)
        failed = sequence.error is not None
        self.finish_reasons["error" if failed else str(sequence.result.finish_reason)] += 1

    def tokens_per_second(self) -> float:
        """Over the last whole seconds."""
        now = int(time.perf_counter())
        return sum(tokens for second, tokens in self._recent if now - WINDOW_S <= second < now) / WINDOW_S


class Lossy(Protocol):
    """A log. dropped: lines it lost."""

    dropped: int


class Collector:
    """The metrics of an engine, for a registry of prometheus_client."""

    def __init__(self, engine: Engine, log: Lossy):
        self._engine, self._log = engine, log

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        measured = self._engine.measurements
        requests = CounterMetricFamily(
            "gristmill_requests", "HTTP requests answered.", labels=["endpoint", "status"]
        )
        for (endpoint, status), count in list(measured.requests.items()):
            requests.add_metric([endpoint, str(status)], count)
        yield requests
        ends = CounterMetricFamily("gristmill_texts", "Texts ended, by why.", labels=["finish_reason"])
        for reason, count in list(measured.finish_reasons.items()):
            ends.add_metric([reason], count)
        yield ends
        for name, what, value in self._counters():
            yield CounterMetricFamily(f"gristmill_{name}", what, value=value)
        for name, what, value in self._gauges():
            yield GaugeMetricFamily(f"gristmill_{name}", what, value=value)
        for name, what, buckets in (
            ("time_to_first_token_seconds", "From a request's arrival to its first token.", measured.ttft),
            ("inter_token_seconds", "Between tokens, as handed to the client.", measured.inter_token),
            ("text_seconds", "From a request's arrival to the end of a text.", measured.duration),
            ("batch_rows", "Rows of each step.", measured.batch_rows),
        ):
            counts, total = buckets.cumulative()
            yield HistogramMetricFamily(f"gristmill_{name}", what, buckets=counts, sum_value=total)

    def _counters(self) -> Iterator[tuple[str, str, float]]:
        measured, statistics = self._engine.measurements, self._engine.session.statistics
        yield "generated_tokens", "Tokens generated.", measured.generated_tokens
        yield "prompt_tokens", "Tokens of prompts.", statistics.prompt_tokens
        yield "prefix_tokens", "Tokens of prompts taken over from other sequences.", statistics.reused_tokens
        yield "prefix_hits", "Prompts that began with rows of another sequence.", statistics.prefix_hits
        yield "drafted_tokens", "Tokens proposed by speculation.", statistics.drafted
        yield "accepted_tokens", "Proposed tokens that were right.", statistics.accepted
        yield "steps", "Forwards of the model.", statistics.steps
        yield "disconnects", "Clients that left before the end.", measured.disconnects
        yield "log_lines_dropped", "Lines that the log could not take.", self._log.dropped

    def _gauges(self) -> Iterator[tuple[str, str, float]]:
        engine, session = self._engine, self._engine.session
        running = session._scheduler.running
        used, kept = session._slots.rows()
        yield "running", "Sequences in a slot.", running
        yield "queued", "Sequences that wait for a slot.", max(engine.taken - running, 0)
        yield "capacity", "Sequences that may run or wait.", engine.capacity
        yield "slots", "Sequences that may run.", session.max_slots
        yield "tokens_per_second", "Tokens generated, mean of 10 s.", engine.measurements.tokens_per_second()
        yield "kv_rows", "Rows of the KV cache.", session.max_slots * session.max_len
        yield "kv_rows_in_use", "Rows of the KV cache that running sequences hold.", used
        yield "kv_rows_kept", "Rows of finished sequences, kept for prompts that begin alike.", kept
        yield "ready", "1 when requests are taken.", float(engine.ready)
