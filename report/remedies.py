"""What would help a forward, and by how much: the model of report/bottlenecks.py with other work.

A kind of instruction that attains some share of its roof is taken to attain the same share of what its roof
would be then, so its time changes by the ratio of the modelled times. Each gain is of that remedy alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from gristmill.report.bottlenecks import Work, works
from gristmill.report.schema import KindVerdict, Remedy
from gristmill.runtime.profile import Forward, Roofs, kind_of, work
from gristmill.runtime.program import CacheSpec, Program, Segment, segment_row_bytes

GROUP = 128  # columns that share a scale in the formats that are proposed
MANY = 1.005  # a gain below this is none


@dataclass(frozen=True)
class Phase:
    """What a remedy is computed for. outside: seconds of a forward around its instructions, communication
    included; integer: whether narrow weights are multiplied as integers here."""

    program: Program
    forward: Forward
    kinds: Sequence[KindVerdict]
    roofs: Roofs
    outside: float
    integer: bool = True

    @property
    def seconds(self) -> float:
        return sum(kind.seconds for kind in self.kinds) + self.outside


def remedies(
    phase: Phase, most_sequences: int = 8, measured: Mapping[Forward, float] = MappingProxyType({})
) -> tuple[Remedy, ...]:
    """For the whole phase, the largest gain first; gains of one half percent or less are left out. measured:
    seconds of forwards that some remedy may lead to."""
    found = [
        more_rows(phase, most_sequences, measured),
        *(_of(phase, change, phase.kinds) for change in changes(phase)),
        graph_replay(phase),
    ]
    return tuple(sorted((r for r in found if r.gain > MANY), key=lambda remedy: -remedy.gain))


def with_remedies(phase: Phase) -> tuple[KindVerdict, ...]:
    """The kinds, each with what would help the phase through it alone."""
    found = []
    for kind in phase.kinds:
        each = [_of(phase, change, [kind]) for change in changes(phase)]
        helping = sorted((r for r in each if r.gain > MANY), key=lambda remedy: -remedy.gain)
        found.append(replace(kind, remedies=tuple(helping)))
    return tuple(found)


@dataclass(frozen=True)
class Change:
    """seconds: of a kind once it is made; rule: in words."""

    name: str
    rule: str
    seconds: Callable[[KindVerdict], float]


def changes(phase: Phase) -> list[Change]:
    """Those that are made to instructions: narrower weights, a narrower cache, fusion."""
    found = [_weights(phase, name) for name in ("int8", "int4")]
    found += [_cache(phase), _fusion(phase)]
    return found


def more_rows(phase: Phase, most_sequences: int, measured: Mapping[Forward, float]) -> Remedy:
    """More sequences in a decode, more rows in a prefill: tokens per second against now."""
    forward = phase.forward
    if forward.rows > 1:
        more, times = replace(forward, rows=2 * forward.rows), 2.0
        what = f"{more.rows} rows"
    else:
        count = max(2 * forward.sequences, most_sequences)
        more, times = replace(forward, sequences=count), count / forward.sequences
        what = f"{count} sequences"
    todo = works(phase.program, more)
    total = phase.outside
    for kind in phase.kinds:
        by_row = kind.kind.startswith("attention") and forward.rows == 1  # see `bottlenecks.comparable`
        overhead = kind.overhead * (times if by_row else 1.0)
        total += _scaled(kind, todo[kind.kind], phase.roofs, overhead)
    rule = (
        f"{what} at once: weights are read once for all of them, operations and cache rows grow with them; "
        f"{_milliseconds(total)} by the model instead of {_milliseconds(phase.seconds)}"
    )
    if more in measured:
        found = times * phase.seconds / measured[more]
        rule += f"; measured: {_milliseconds(measured[more])}, a gain of {found:.2f}"
    return Remedy("more rows", times * phase.seconds / total, rule)


def graph_replay(phase: Phase) -> Remedy:
    """What lies between and around the instructions falls away."""
    left = phase.seconds - phase.outside
    rule = f"{_milliseconds(phase.outside)} around the instructions gone: one launch for all of them"
    return Remedy("graph replay", phase.seconds / left if left > 0 else 1.0, rule)


def _of(phase: Phase, change: Change, kinds: Sequence[KindVerdict]) -> Remedy:
    saved = sum(kind.seconds - change.seconds(kind) for kind in kinds)
    left = phase.seconds - saved
    return Remedy(change.name, phase.seconds / left if left > 0 else 1.0, change.rule)


def _weights(phase: Phase, format: str) -> Change:
    """Matrices whose rows take more bytes than this format's would; operations become integer ones."""
    program = copy.copy(phase.program)
    program.weights = {
        name: [_narrower(segment, format) for segment in segments]
        for name, segments in phase.program.weights.items()
    }
    changed = {name for name, segments in program.weights.items() if segments != phase.program.weights[name]}
    rule = f"weights of more bits as {format} in groups of {GROUP}"
    rule += ", multiplied as integers" if phase.integer else ""
    return _work_change(phase, f"{format} weights", rule, program, changed)


def _cache(phase: Phase) -> Change:
    program = copy.copy(phase.program)
    program.caches = [_narrower_cache(cache) for cache in phase.program.caches]
    return _work_change(phase, "int8 KV", "keys and values of more bits as int8", program, set())


def _work_change(phase: Phase, name: str, rule: str, program: Program, changed: set[str]) -> Change:
    """Kinds keep their names: the work is counted on a program with other formats, instruction for
    instruction."""
    now, then = _by_old_name(phase, phase.program, set()), _by_old_name(phase, program, changed)

    def seconds(kind: KindVerdict) -> float:
        same = then[kind.kind] == now[kind.kind]
        return kind.seconds if same else _scaled(kind, then[kind.kind], phase.roofs, kind.overhead)

    return Change(name, rule, seconds)


def _by_old_name(phase: Phase, program: Program, integer: set[str]) -> Mapping[str, Work]:
    """Work by the names that the phase's own program gives. integer: weights multiplied as integers now."""
    found: dict[str, Work] = {}
    for instruction in program.instructions:
        name = kind_of(phase.program, instruction)
        read, operations, on_integers = work(program, instruction, phase.forward)
        on_integers |= phase.integer and instruction.weight in integer
        before = found.get(name, Work())
        found[name] = Work(
            before.count + 1,
            before.bytes + read,
            before.floats + (0 if on_integers else operations),
            before.integers + (operations if on_integers else 0),
        )
    return found


def _narrower(segment: Segment, format: str) -> Segment:
    other = replace(segment, format=format, group=GROUP, symmetric=True)
    return other if segment_row_bytes(other) < segment_row_bytes(segment) else segment


def _narrower_cache(cache: CacheSpec) -> CacheSpec:
    other = replace(cache, k_dtype="int8", v_dtype="int8")
    return other if other.row_bytes() < cache.row_bytes() else cache


def _fusion(phase: Phase) -> Change:
    """Instructions without weights and caches as parts of their neighbours: at most their whole time."""
    values = {name for name, todo in works(phase.program, phase.forward).items() if todo.values}
    rule = f"at most: all of {', '.join(sorted(values)) or 'nothing'} inside other instructions"
    return Change("fusion", rule, lambda kind: 0.0 if kind.kind in values else kind.seconds)


def _scaled(kind: KindVerdict, todo: Work, roofs: Roofs, overhead: float) -> float:
    return kind.seconds * (todo.floor(roofs) + overhead) / kind.modelled if kind.modelled else kind.seconds


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
