"""One phase's verdict with its reason in a sentence, from what was measured of it."""

from __future__ import annotations

from collections.abc import Sequence

from gristmill.report.bottlenecks import Timed, verdicts
from gristmill.report.remedies import Phase, remedies, with_remedies
from gristmill.report.schema import Bottleneck, KindVerdict, PhaseWhy, ScalePoint
from gristmill.runtime.profile import Forward, Roofs
from gristmill.runtime.program import Program

MANY_SEQUENCES = 8  # that the remedy of more rows is computed for, and more where there are these already


def judged(
    program: Program, name: str, base: Timed, series: Sequence[Timed], growth: Sequence[Timed], roofs: Roofs,
    *, communication: float | None = None, integer: bool = True,
) -> PhaseWhy:  # fmt: skip
    """What bounds the forward ``base``.

    series: forwards with more or less work, see `verdicts`; growth: those of the curve; communication:
    seconds of transfers within the call; integer: whether narrow weights are multiplied as integers here.
    """
    kinds = verdicts(program, base, series, roofs)
    transfers = communication or 0.0
    around = max(0.0, base.seconds - sum(kind.seconds for kind in kinds) - transfers)
    parts = phase_parts(kinds, around, transfers)
    modelled = sum(kind.modelled for kind in kinds) + around + transfers
    phase = Phase(program, base.forward, kinds, roofs, around + transfers, integer)
    return PhaseWhy(
        name=name,
        rows=base.forward.rows,
        context=base.forward.context,
        sequences=base.forward.sequences,
        seconds=base.seconds,
        modelled=modelled,
        error=modelled / base.seconds - 1,
        verdict=max(parts, key=lambda part: parts[part]),
        reason=reason(base, kinds, parts, around, growth),
        overhead=parts["overhead"],
        communication=communication,
        kinds=with_remedies(phase),
        remedies=remedies(phase, MANY_SEQUENCES, {t.forward: t.seconds for t in growth}),
        growth=tuple(ScalePoint(rows_of(timed.forward), timed.seconds) for timed in growth),
        read_bytes_s=roofs.stream,
        float_ops_s=roofs.floats,
        integer_ops_s=roofs.integers,
    )


def rows_of(forward: Forward) -> int:
    return forward.rows * forward.sequences


def phase_parts(kinds: Sequence[KindVerdict], around: float, transfers: float) -> dict[Bottleneck, float]:
    """Seconds by what they are for; what a kind takes beside its overhead is for its higher floor."""
    parts: dict[Bottleneck, float] = {"compute": 0.0, "memory": 0.0, "communication": transfers}
    for kind in kinds:
        parts["compute" if _computes(kind) else "memory"] += kind.seconds - kind.overhead
    return {**parts, "overhead": sum(kind.overhead for kind in kinds) + around}


def reason(
    base: Timed, kinds: Sequence[KindVerdict], parts: dict[Bottleneck, float], around: float,
    growth: Sequence[Timed],
) -> str:  # fmt: skip
    """What takes how much of the time, the largest first, and how the time grows."""
    memory = [kind for kind in kinds if not _computes(kind)]
    compute = [kind for kind in kinds if _computes(kind)]
    read, done = sum(kind.bytes for kind in memory), sum(kind.operations for kind in compute)
    words = {
        "memory": f"reading {_amount(read)}B ({_ms(sum(kind.memory_floor for kind in memory))} at the roof)",
        "compute": f"{_amount(done)}op ({_ms(sum(kind.compute_floor for kind in compute))} at the peak)",
        "communication": "transfers between ranks, or host and device",
        "overhead": f"what does not grow with the work ({_ms(around)} of it around the instructions)",
    }
    ordered = sorted(parts, key=lambda part: -parts[part])
    said = [f"{_ms(parts[part])} {words[part]}" for part in ordered if parts[part] > 0]
    return "; ".join([f"of {_ms(base.seconds)}: {', '.join(said)}", *_grown(growth)])


def _computes(kind: KindVerdict) -> bool:
    return kind.compute_floor > kind.memory_floor


def _grown(growth: Sequence[Timed]) -> list[str]:
    if len(growth) < 2:
        return []
    first, last = growth[0], growth[-1]
    times = last.seconds / first.seconds
    return [f"{rows_of(last.forward)} rows take {times:.2f} times as long as {rows_of(first.forward)}"]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _amount(count: int) -> str:
    """With an SI prefix: "605 M"."""
    size = float(count)
    for prefix in ("", "k", "M", "G"):
        if size < 1000:
            return f"{size:.3g} {prefix}"
        size /= 1000
    return f"{size:.3g} T"
