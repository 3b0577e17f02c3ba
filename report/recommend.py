"""The fastest point that keeps a promise, and what every other one was left out for.

A promise on perplexity is kept by the upper bound of the 95 % interval, as in the gate: an estimate below the
limit with too little text to be sure keeps nothing. Speed is that of decoding one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gristmill.compiler import statistics
from gristmill.report import choose
from gristmill.report.schema import Point, Report
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.report import size_text

LEAST_TOKENS = statistics.FEWEST_BLOCKS * statistics.BLOCK_TOKENS


@dataclass(frozen=True)
class Promise:
    """max_ppl_increase: relative (0.01: one percent); min_tok_s: decoded; max_size: bytes of the artifact."""

    max_ppl_increase: float
    min_tok_s: float | None = None
    max_size: int | None = None

    def __str__(self) -> str:
        parts = [f"perplexity +{_percent(self.max_ppl_increase)} at most"]
        parts += [f"{self.min_tok_s:g} tok/s at least"] if self.min_tok_s is not None else []
        parts += [f"{size_text(self.max_size)} at most"] if self.max_size is not None else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Breach:
    """What a point breaks. factor: how far beyond the limit it is, above 1."""

    text: str
    factor: float


@dataclass(frozen=True)
class Choice:
    """reasons: a line for the point, and one for every other."""

    point: Point
    reasons: tuple[str, ...]


def recommend(report: Report, promise: Promise) -> Choice:
    """Of gristmill's own points the fastest that breaks nothing. Raises GristmillError that names the closest
    where all break something."""
    own = [point for point in report.points if not choose.is_peer(point)]
    measured = [
        p for p in own if p.status == "ok" and p.accuracy and choose.decode_speed(report, p) and p.memory
    ]
    if not measured:
        failed = [f"{p.label}: {p.reason}" for p in own if p.reason]
        raise GristmillError(f"no point was measured ({failed[0] if failed else 'there is none'})")
    fewest = min(p.accuracy.tokens for p in measured if p.accuracy)
    if not statistics.are_enough(fewest):  # of a text that has no more
        raise GristmillError(_too_few(fewest))
    breaches = {point.id: broken(report, point, promise) for point in measured}
    fitting = [point for point in measured if not breaches[point.id]]
    if not fitting:
        raise GristmillError(_nothing_fits(measured, breaches, promise))
    speeds = {point.id: choose.decode_speed(report, point) or 0.0 for point in measured}
    best = max(fitting, key=lambda point: speeds[point.id])
    lines = [f"{best.label}: {_figures(report, best)}; the fastest of {len(fitting)} that keep {promise}"]
    for point in sorted(own, key=lambda p: -speeds.get(p.id, 0.0)):
        if point is not best:
            lines.append(f"not {point.label}: {_left_out(report, point, breaches)}")
    return Choice(best, tuple(lines))


def broken(report: Report, point: Point, promise: Promise) -> list[Breach]:
    """What a measured point breaks of a promise."""
    assert point.accuracy and point.memory, "a measured point"
    found, limit = [], promise.max_ppl_increase
    increase, speed = point.accuracy.ppl_increase, choose.decode_speed(report, point)
    assert speed, "a measured point"
    if increase.high > limit:
        text = f"perplexity up to {_signed(increase.high)} (estimate {_signed(increase.estimate)})"
        found.append(Breach(text, increase.high / limit if limit else float("inf")))
    if promise.min_tok_s is not None and speed < promise.min_tok_s:
        found.append(Breach(f"{speed:.4g} tok/s", promise.min_tok_s / speed))
    size = point.memory.artifact_bytes
    if promise.max_size is not None and size > promise.max_size:
        found.append(Breach(size_text(size), size / promise.max_size))
    return found


def refuse_few_tokens(tokens: int) -> None:
    """Raises GristmillError for a text on which an interval says nothing."""
    if tokens < LEAST_TOKENS:
        raise GristmillError(_too_few(tokens))


def _too_few(tokens: int) -> str:
    return (
        f"{tokens} tokens are too few to decide on a limit: give at least {LEAST_TOKENS} "
        "(--gate-tokens, --text)"
    )


def _nothing_fits(measured: list[Point], breaches: dict[str, list[Breach]], promise: Promise) -> str:
    def distance(point: Point) -> tuple[float, float]:
        factors = [breach.factor for breach in breaches[point.id]]
        return max(factors), sum(factors)

    closest = min(measured, key=distance)
    said = " and ".join(breach.text for breach in breaches[closest.id])
    return (
        f"no point keeps {promise}; the closest is {closest.label}, with {said}{_more_text(closest, promise)}"
    )


def _more_text(point: Point, promise: Promise) -> str:
    """How much text would decide, where the estimate is within the limit and its bound is not."""
    assert point.accuracy
    increase, tokens = point.accuracy.ppl_increase, point.accuracy.tokens
    needed: Callable[..., int | None] = statistics.tokens_to_decide
    count = (
        needed(increase, promise.max_ppl_increase, tokens)
        if increase.high > promise.max_ppl_increase
        else None
    )
    return f": about {count} tokens would decide (--gate-tokens, --text)" if count else ""


def _left_out(report: Report, point: Point, breaches: dict[str, list[Breach]]) -> str:
    if point.id not in breaches:
        return point.reason or "not measured"
    if breaches[point.id]:
        return " and ".join(breach.text for breach in breaches[point.id])
    return f"{choose.decode_speed(report, point):.4g} tok/s"


def _figures(report: Report, point: Point) -> str:
    assert point.accuracy and point.memory
    increase = point.accuracy.ppl_increase
    return (
        f"{choose.decode_speed(report, point):.4g} tok/s, {size_text(point.memory.artifact_bytes)}, "
        f"perplexity {_signed(increase.estimate)} ({_signed(increase.low)} to {_signed(increase.high)})"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _signed(share: float) -> str:
    return f"{100 * share:+.3g} %"
