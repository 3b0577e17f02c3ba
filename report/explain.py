"""Why an artifact is as fast as it is: four phases taken apart on this machine.

A decoded token, the same behind a long context, a batch of them, and the chunk of a prompt are run and timed
instruction by instruction, with others of more and less work that show what does not grow; the roofs are
measured around each phase. What counts is what the machine does undisturbed: the lower quartile of the times
and the higher of two roofs. See report/bottlenecks.py for the model and report/remedies.py for what would
help.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gristmill.report.bottlenecks import Timed
from gristmill.report.forwards import (
    ROOM,
    best_roofs,
    decode_seconds,
    filled_slot,
    floor_seconds,
    prefill_seconds,
    refuse_less,
    stream_bytes,
)
from gristmill.report.judge import judged
from gristmill.report.schema import PhaseWhy
from gristmill.runtime.profile import Forward, Probe, Roofs, held_slots, probe_of
from gristmill.runtime.report import read_program
from gristmill.runtime.session import Session, load

MOST_REPEATS = 50
GROWTH = (1, 2, 4, 8)  # sequences of a decode that are compared
FURTHER = 16  # times the context, to see what attention takes for each position


@dataclass(frozen=True)
class WhyOptions:
    """context, long_context: positions before a decoded token; batch: sequences; prompt: rows; each is cut to
    what fits. seconds: of one measurement. device, threads, max_len, tensor_parallel: as in `load`."""

    device: str = "cpu"
    threads: int | None = None
    max_len: int | None = None
    tensor_parallel: int | None = None
    context: int = 16
    long_context: int = 4096
    batch: int = 8
    prompt: int = 512
    seconds: float = 0.4

    def __post_init__(self) -> None:
        refuse_less({
            "context": (self.context, 1), "long_context": (self.long_context, 2), "batch": (self.batch, 1),
            "prompt": (self.prompt, 2), "seconds": (self.seconds, 0),
        })  # fmt: skip


def explain(artifact: str | Path, options: WhyOptions | None = None) -> tuple[PhaseWhy, ...]:
    """Loads an artifact and takes its phases apart. Raises GristmillError as `load` does."""
    options = options or WhyOptions()
    limits = read_program(artifact)[1].limits
    batch = min(options.batch, limits.max_slots, limits.max_tokens)
    session = load(
        artifact, device=options.device, threads=options.threads, max_len=options.max_len,
        max_slots=max(batch, 1) + 1, tensor_parallel=options.tensor_parallel,
    )  # fmt: skip
    found = explain_session(session, replace(options, batch=batch))
    session.close()
    return found


def explain_session(session: Session, options: WhyOptions | None = None) -> tuple[PhaseWhy, ...]:
    """The phases of a session that nothing else uses meanwhile; a slot more than the batch saves time."""
    options = options or WhyOptions()
    plans = list(phases(session, options))
    with filled_slot(session, max(plan.forward.context for plan in plans)) as filled:
        bench = _Bench(session, probe_of(session), filled, options.seconds)
        return tuple(bench.explained(plan, integer=options.device == "cpu") for plan in plans)


@dataclass(frozen=True)
class Plan:
    """A phase: its forward, others whose kinds show what grows, and those of its growth curve."""

    name: str
    forward: Forward
    series: tuple[Forward, ...]
    growth: tuple[Forward, ...]


def phases(session: Session, options: WhyOptions) -> Iterator[Plan]:
    """What is taken apart, as far as it fits into the session."""
    spare = 1 if session.max_slots > 1 else 0
    most = min(options.batch, session.max_slots - spare, session.max_tokens)
    context = min(options.context, session.max_len // 4)
    growth = tuple(Forward(1, context, n) for n in GROWTH if n <= most)
    further = min(FURTHER * context, session.max_len - 1)
    yield Plan("decode", Forward(1, context), (Forward(1, further), *growth[1:]), growth)
    longest = min(options.long_context, session.max_len - min(ROOM, session.max_len // 4))
    if longest > further:
        few = tuple(Forward(1, longest, n) for n in GROWTH[:2] if n <= most)
        yield Plan(f"decode at {longest}", Forward(1, longest), (Forward(1, longest // 2), *few[1:]), few)
    if most > 1:
        batch = Forward(1, context, most)
        yield Plan(f"decode of {most}", batch, (Forward(1, further, most), *growth), growth)
    rows = min(options.prompt, session.max_tokens, session.max_len)
    fewer = tuple(Forward(n) for n in (rows // 4, rows // 2) if n > 1)
    yield Plan(f"prefill {rows}", Forward(rows), fewer, (*fewer, Forward(rows)))


@dataclass(frozen=True)
class _Bench:
    session: Session
    probe: Probe
    filled: int | None
    seconds: float

    def explained(self, plan: Plan, integer: bool) -> PhaseWhy:
        """Measures one phase between two looks at the roofs."""
        size = stream_bytes(self.session.program, plan.forward)
        roofs = self.probe.roofs(self.probe.read_stream(size))
        wanted = dict.fromkeys([plan.forward, *plan.series, *plan.growth])
        timed = {forward: self._timed(forward, roofs) for forward in wanted}
        roofs = best_roofs(roofs, self.probe.roofs(self.probe.read_stream(size)))
        return judged(
            self.session.program,
            plan.name,
            timed[plan.forward],
            [timed[forward] for forward in dict.fromkeys(plan.series) if forward != plan.forward],
            [timed[forward] for forward in plan.growth],
            roofs,
            communication=self.probe.communication(plan.forward),
            integer=integer,
        )

    def _timed(self, forward: Forward, roofs: Roofs) -> Timed:
        """On a CPU the call and its instructions are timed together, else one after the other."""
        least = max(floor_seconds(self.session, roofs, forward), 1e-6)
        repeats = min(MOST_REPEATS, max(1, round(self.seconds / least)))
        found = self.probe.profile(roofs, forward, repeats, self.filled, self.seconds)
        seconds = self._wall(forward) if found.around is None else found.seconds + found.around
        return Timed.of(forward, seconds, found.kinds)

    def _wall(self, forward: Forward) -> float:
        """Median seconds of the call, the first of them left out."""
        times: list[float] = []
        with held_slots(self.session, forward.context, forward.sequences, self.filled) as slots:
            while len(times) < 2 or (sum(times) < self.seconds and len(times) < MOST_REPEATS):
                if forward.rows == 1:
                    times.append(decode_seconds(self.session, slots, forward.context, 1))
                else:
                    times.append(prefill_seconds(self.session, slots[0], forward.context, forward.rows))
        return statistics.median(times[1:])
