"""What bounds a forward: operations, bytes, transfers, or what none of them explains and does not grow.

The model of a kind of instruction is t = max(bytes / read stream, operations / peak) + overhead. Bytes and
operations are counted, the roofs are measured, and so is the overhead, by the one test that tells it from
slow work: it is the time that stays when the work shrinks to nothing. Where the work of a kind grows between
two forwards (more rows, a longer context), that is the intercept of a line through their times. The products
of a decoded token read the same weights whatever else grows, so there the line goes through matrices of
different sizes in one forward. What neither shows is taken from the instructions that have next to no work.

An overhead is never more than a kind's time above its floor, since the roofs are roofs. What a kind takes
beyond floor and overhead is due to kernels that stay below their roof: it belongs to the resource of the
higher floor, so a kind is bound by overhead where that is more than half of its time, and else by the
resource.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gristmill.report.roof_model import compute_seconds, memory_seconds
from gristmill.report.schema import KindVerdict
from gristmill.runtime.profile import Forward, Kind, Roofs, kind_of, work
from gristmill.runtime.program import Instruction, Program, Value

GROWN = 1.5  # floors must differ by so much for a line through their times to say something
FLOAT_BYTES = 4  # of a value between instructions


@dataclass(frozen=True)
class Work:
    """What all instructions of one kind have to do in a forward. values: bytes are of values between
    instructions, which other kinds' are not counted as; sized: bytes are of weights, and do not grow."""

    count: int = 0
    bytes: int = 0
    floats: int = 0
    integers: int = 0
    values: bool = False
    sized: bool = False

    @property
    def operations(self) -> int:
        return self.floats + self.integers

    def memory_floor(self, roofs: Roofs) -> float:
        return memory_seconds(self.bytes, roofs.stream)

    def compute_floor(self, roofs: Roofs) -> float:
        floats = compute_seconds(self.floats, roofs.floats)
        return floats + compute_seconds(self.integers, roofs.integers)

    def floor(self, roofs: Roofs) -> float:
        return max(self.memory_floor(roofs), self.compute_floor(roofs))


@dataclass(frozen=True)
class Timed:
    """A forward that was measured. seconds: of the call; kinds: name -> seconds of its instructions."""

    forward: Forward
    seconds: float
    kinds: Mapping[str, float]

    @staticmethod
    def of(forward: Forward, seconds: float, kinds: Iterable[Kind]) -> Timed:
        return Timed(forward, seconds, {kind.name: kind.seconds for kind in kinds})


def works(program: Program, forward: Forward) -> dict[str, Work]:
    """What each kind has to do; names as `kind_of` has them."""
    found: dict[str, Work] = {}
    for instruction in program.instructions:
        read, operations, integer = work(program, instruction, forward)
        between = instruction.weight is None and instruction.op != "attention"
        if between:
            read = _value_bytes(program, instruction, forward)
        before = found.get(kind_of(program, instruction), Work())
        found[kind_of(program, instruction)] = Work(
            before.count + 1,
            before.bytes + read,
            before.floats + (0 if integer else operations),
            before.integers + (operations if integer else 0),
            between,
            instruction.op == "linear",
        )
    return found


def _value_bytes(program: Program, instruction: Instruction, forward: Forward) -> int:
    """What an instruction without weights reads and writes."""
    widths = sum(view.width for view in instruction.reads()) + instruction.out.width
    value: Value = program.values[instruction.out.value]
    rows = forward.sequences * (1 if value.rows == "R" else forward.rows)
    return FLOAT_BYTES * rows * widths


def verdicts(program: Program, base: Timed, series: Sequence[Timed], roofs: Roofs) -> list[KindVerdict]:
    """Each kind of a forward, slowest first. series: the same program with more or less to do."""
    todo = works(program, base.forward)
    found = overheads(program, base, series, roofs)
    made = [_verdict(name, todo[name], base.kinds[name], found[name], roofs) for name in todo]
    return sorted(made, key=lambda kind: -kind.seconds)


def _verdict(name: str, todo: Work, seconds: float, overhead: float, roofs: Roofs) -> KindVerdict:
    memory, compute = todo.memory_floor(roofs), todo.compute_floor(roofs)
    modelled = max(memory, compute) + overhead
    return KindVerdict(
        kind=name,
        count=todo.count,
        seconds=seconds,
        bytes=todo.bytes,
        operations=todo.operations,
        memory_floor=memory,
        compute_floor=compute,
        overhead=overhead,
        modelled=modelled,
        error=modelled / seconds - 1 if seconds else 0.0,
        verdict="overhead" if overhead > seconds / 2 else "compute" if compute > memory else "memory",
        roof_share=max(memory, compute) / seconds if seconds else 0.0,
    )


def overheads(program: Program, base: Timed, series: Sequence[Timed], roofs: Roofs) -> dict[str, float]:
    """Seconds by kind that do not grow with its work, see the module's docstring."""
    todo = works(program, base.forward)
    others = [(timed, works(program, timed.forward)) for timed in series]
    above = {name: max(0.0, base.kinds[name] - todo[name].floor(roofs)) for name in todo}
    found: dict[str, float] = {}
    for name, mine in todo.items():
        points = [(mine.floor(roofs), base.kinds[name])]
        points += [(w[name].floor(roofs), t.kinds[name]) for t, w in others if comparable(name, base, t)]
        grown = intercept(points)
        if grown is not None:
            found[name] = min(grown, above[name])
        elif not (mine.sized or name.startswith("attention")):
            found[name] = above[name]
    idle = _idle(todo, found)
    by_size = _by_size(program, todo, base, roofs)
    for name in todo.keys() - found.keys():
        each = max(by_size.get(name, 0.0), idle)
        found[name] = min(each * todo[name].count, above[name])
    return found


def comparable(name: str, base: Timed, other: Timed) -> bool:
    """Whether the time of a kind in another forward says what more or less of the same work takes: attention
    takes some time for each row whatever the context is, so rows must be as many."""
    a, b = base.forward, other.forward
    if name.startswith("attention") and a.rows == 1:
        return (a.rows, a.sequences) == (b.rows, b.sequences)
    return a.context == b.context


def intercept(points: Sequence[tuple[float, float]]) -> float | None:
    """Of a line through (floor, seconds), each weighed by its relative error; not below 0. None where the
    floors differ by less than GROWN."""
    x, y = np.array(points, np.float64).T
    if len(points) < 2 or x.min() <= 0 or x.max() < GROWN * x.min() or y.min() <= 0:
        return None
    a = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    constant, slope = np.linalg.lstsq(a, np.ones_like(y), rcond=None)[0]
    return max(0.0, float(constant)) if slope > 0 else float(y.min())


def _idle(todo: Mapping[str, Work], overhead: Mapping[str, float]) -> float:
    """Seconds of an instruction that has next to nothing to do."""
    each = [overhead[name] / w.count for name, w in todo.items() if w.values and name in overhead]
    return statistics.median(each) if each else 0.0


def _by_size(program: Program, todo: Mapping[str, Work], base: Timed, roofs: Roofs) -> dict[str, float]:
    """Overhead of an instruction, by kind, from products of different sizes with weights of one format."""
    groups: dict[str, list[str]] = {}
    for name, mine in todo.items():
        if mine.sized:
            groups.setdefault(name.rpartition(" ")[2], []).append(name)
    found: dict[str, float] = {}
    for names in groups.values():
        points = [(todo[n].floor(roofs) / todo[n].count, base.kinds[n] / todo[n].count) for n in names]
        constant = intercept(points)
        if constant is not None:
            least = min(max(0.0, seconds - floor) for floor, seconds in points)
            found |= dict.fromkeys(names, min(constant, least))
    return found
