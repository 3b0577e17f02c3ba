"""A plan in words: what fits, which format is the one to take, where the ridge is, what to believe."""

from __future__ import annotations

from collections.abc import Iterator

from gristmill.report.plan import Entry, Plan, most_exact_first
from gristmill.runtime.report import size_text

NO_MORE = 1.05  # times as fast: no reason to choose a format


def lines(plan: Plan) -> list[str]:
    """A sentence or two a line."""
    return [*_what_fits(plan), *_which(plan), *_ridges(plan), *_beliefs(plan)]


def sequences(count: int) -> str:
    return f"{count} sequence" if count == 1 else f"{count} sequences"


def _name(entry: Entry) -> str:
    return f"{entry.weights} with KV {entry.kv}"


def _what_fits(plan: Plan) -> Iterator[str]:
    asked = f"{sequences(plan.batch)} of {plan.context} positions"
    fitting = [entry for entry in plan.entries if entry.fits]
    if len(fitting) == len(plan.entries):
        yield f"Every format fits with {asked}."
    elif not fitting:
        least = min(plan.entries, key=lambda entry: entry.needed_bytes)
        yield (
            f"Nothing fits with {asked}: {_name(least)} is the smallest and needs "
            f"{size_text(least.needed_bytes)} of {size_text(plan.usable_bytes)}."
        )
    else:
        yield f"With {asked}, {_name(most_exact_first(fitting)[0])} is the most exact that fits."


def _which(plan: Plan) -> Iterator[str]:
    fitting = [entry for entry in plan.entries if entry.fits]
    if len(fitting) < 2:
        return
    fastest = max(fitting, key=lambda entry: entry.tok_s)
    exact = most_exact_first(fitting)[0]
    times = fastest.tok_s / exact.tok_s
    if times < NO_MORE:
        yield f"No format is expected to be more than {times - 1:.1%} faster than {_name(exact)}."
    else:
        yield (
            f"{_name(fastest)} is expected to be the fastest: {fastest.tok_s:.4g} tok/s, {times:.3g} times "
            f"{_name(exact)}."
        )
    most = max(fitting, key=lambda entry: (entry.max_batch, entry.bits_per_weight))
    yield f"{_name(most)} holds the most: {sequences(most.max_batch)} of {plan.context} positions."


def _ridges(plan: Plan) -> Iterator[str]:
    """For each number type that products are computed in."""
    for number in dict.fromkeys(entry.number for entry in plan.entries):
        entries = [entry for entry in plan.entries if entry.number == number]
        low, high = (f(entry.intensity for entry in entries) for f in (min, max))
        text = (
            f"Ridge: the roofs meet at {entries[0].ridge:.3g} operations per byte ({number}); decoding one "
            f"sequence does {low:.2g} to {high:.2g}"
        )
        ends = [entry for entry in entries if entry.break_even_roof is not None]
        if low >= entries[0].ridge:
            yield f"{text}, so that computing is the limit from the first sequence on."
        elif ends:
            first, last = (f(ends, key=lambda e: e.break_even_roof or 0) for f in (min, max))
            span = f"{first.break_even_roof} ({first.weights})"
            if last.break_even_roof != first.break_even_roof:
                span += f" to {last.break_even_roof} ({last.weights})"
            yield f"{text}, and reading weights is the limit up to a batch of {span}."
        else:
            yield f"{text}, and reading weights is the limit at any batch."
    attained = sorted({entry.break_even for entry in plan.entries if entry.break_even is not None})
    if attained:
        span = f"{attained[0]}" if len(attained) == 1 else f"{attained[0]} to {attained[-1]}"
        yield f"With what the kernels attain, computing takes over at a batch of {span}, by format."


def _beliefs(plan: Plan) -> Iterator[str]:
    kernels = plan.device.kernels
    yield f"Roofs: {plan.device.source}."
    yield f"Expectation: {kernels.source}."
    if plan.device.cache_bytes and any(e.read_bytes < 2 * plan.device.cache_bytes for e in plan.entries):
        yield (
            f"Formats that read less than {size_text(2 * plan.device.cache_bytes)} a token stay in the last "
            "cache wholly or in part, which no floor of memory counts."
        )
