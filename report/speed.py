"""How fast an artifact is on this machine: prefill by prompt and context, decode by context and batch, what a
caller waits for, and what it takes of memory and energy.

Every round measures all points once, between two looks at the roofs; what is reported are medians over the
rounds, and of each round's share of its own roof. So a machine that slows down meanwhile slows both. Further
rounds begin only within the budget of seconds, so a large model may have one.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gristmill.report.energy import measure_energy
from gristmill.report.forwards import (
    ROOM,
    STREAM_BYTES,
    decode_seconds,
    filled_slot,
    floor_seconds,
    mean_roofs,
    prefill_seconds,
    refuse_less,
    stream_bytes,
)
from gristmill.report.memory import MemoryOptions, measure_memory, stored_memory
from gristmill.report.schema import Energy, Latency, Machine, Memory, SpeedPoint
from gristmill.runtime import machine
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.footprint import kv_bytes
from gristmill.runtime.profile import Forward, Probe, Roofs, held_slots, probe_of
from gristmill.runtime.report import read_program
from gristmill.runtime.session import Session, load

SPARE = 0.7  # of the free memory may be taken by caches
STEPS = 3  # a point decodes at least so many tokens
ENERGY_SECONDS = 2.0
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class SpeedOptions:
    """prompts, contexts, batches: tokens, positions and sequences; what does not fit is cut to what does or
    left out. rounds: at most; budget: seconds after which no further round begins; seconds: least time of one
    measurement within a round. latency_prompt, latency_tokens: of the generations that are watched, `rounds`
    of them. memory: start the process whose memory is watched, one alone. device, threads, tensor_parallel,
    max_len: as in `load`.
    """

    device: str = "cpu"
    threads: int | None = None
    tensor_parallel: int | None = None
    max_len: int | None = None
    prompts: tuple[int, ...] = (128, 512, 2048)
    contexts: tuple[int, ...] = (16, 1024, 4096)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 3
    budget: float = 45.0
    seconds: float = 0.3
    latency_prompt: int = 128
    latency_tokens: int = 64
    memory: bool = True

    def __post_init__(self) -> None:
        for name in ("prompts", "contexts", "batches"):
            if not getattr(self, name):
                raise GristmillError(f"{name} is empty, expected a number or more")
        refuse_less({
            "prompts": (min(self.prompts), 1), "contexts": (min(self.contexts), 0),
            "batches": (min(self.batches), 1), "rounds": (self.rounds, 1), "budget": (self.budget, 0),
            "seconds": (self.seconds, 0), "latency_prompt": (self.latency_prompt, 1),
            "latency_tokens": (self.latency_tokens, 2),
        })  # fmt: skip


@dataclass(frozen=True)
class SpeedResult:
    """roofs: medians of the rounds, the stream over more bytes than caches hold; isa: "" on a GPU."""

    roofs: Roofs
    points: tuple[SpeedPoint, ...]
    latency: Latency | None
    load_seconds: float
    memory: Memory
    energy: Energy | None
    threads: int
    isa: str


def measure_speed(artifact: str | Path, options: SpeedOptions | None = None) -> SpeedResult:
    """Loads the artifact and measures it. Raises GristmillError for one that this machine cannot run."""
    options = options or SpeedOptions()
    found = _measured_here(artifact, options)
    if not options.memory or (options.tensor_parallel or 1) > 1:  # it is watched of one process
        return found
    how = {name: value for name, value in _how(options).items() if name != "tensor_parallel"}
    asked = MemoryOptions(**how, prompt=options.latency_prompt, tokens=options.latency_tokens)
    loaded = measure_memory(artifact, asked)
    return replace(found, memory=loaded.memory, load_seconds=loaded.load_seconds)


def _measured_here(artifact: str | Path, options: SpeedOptions) -> SpeedResult:
    """All but the memory; what was loaded is gone with the end of it."""
    options = replace(options, batches=fitting_batches(artifact, options))
    started = time.perf_counter()
    session = load(artifact, max_slots=max(options.batches) + 1, **_how(options))
    load_seconds = time.perf_counter() - started
    points, roofs = measure_points(session, points_of(session, options), options, probe_of(session))
    found = SpeedResult(
        roofs,
        points,
        measure_latency(session, options) if session.has_tokenizer else None,
        load_seconds,
        stored_memory(artifact),
        measure_energy(lambda: _decode_a_while(session), options.device),
        session.threads,
        str(getattr(session.executor, "isa", "")),
    )
    session.close()
    return found


def _how(options: SpeedOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("device", "threads", "max_len", "tensor_parallel")}


def machine_of(result: SpeedResult, device: str = "cpu") -> Machine:
    """What it was measured on, with the roofs of the run."""
    total = _field(Path("/proc/meminfo"), "MemTotal").split()
    name, memory = machine.processor_name(), int(total[0]) * 1024 if total else 0
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, memory = properties.name, properties.total_memory
    return Machine(
        name=name,
        cores=machine.usable_cpus(),
        threads=result.threads,
        memory_bytes=memory,
        isa=result.isa,
        system=platform.platform(terse=True),
        read_bytes_s=result.roofs.stream,
        float_ops_s=result.roofs.floats,
        integer_ops_s=result.roofs.integers,
    )


def fitting_batches(artifact: str | Path, options: SpeedOptions) -> tuple[int, ...]:
    """The batches whose caches fit into the free memory, with a slot to spare; the smallest always."""
    program = read_program(artifact)[1]
    max_len = options.max_len or program.limits.max_len
    available = machine.available_memory_bytes() if options.device == "cpu" else None
    room = None if available is None else SPARE * available - program.arena_bytes
    asked = sorted({batch for batch in options.batches if batch <= program.limits.max_tokens} or {1})
    fit = [batch for batch in asked if room is None or kv_bytes(program, max_len, batch + 1) <= room]
    return tuple(fit) or (asked[0],)


def points_of(session: Session, options: SpeedOptions) -> list[tuple[Phase, Forward]]:
    """What is measured: each prompt from position 0, one behind each longer context; each batch at the
    shortest context, the smallest and the largest of them at the longer ones."""
    prompts = _cut(options.prompts, session.max_len)
    contexts = _cut(options.contexts, session.max_len - min(ROOM, session.max_len // 4))
    shortest, *longer = contexts
    found: list[tuple[Phase, Forward]] = [("prefill", Forward(prompt)) for prompt in prompts]
    for context in longer:
        rows = [p for p in prompts if p <= min(session.max_tokens, session.max_len - context)]
        if rows:
            found.append(("prefill", Forward(rows[-1], context)))
    found += [("decode", Forward(1, shortest, batch)) for batch in options.batches]
    ends = sorted({options.batches[0], options.batches[-1]})
    found += [("decode", Forward(1, context, batch)) for context in longer for batch in ends]
    return found


def measure_points(
    session: Session, plan: list[tuple[Phase, Forward]], options: SpeedOptions, probe: Probe
) -> tuple[tuple[SpeedPoint, ...], Roofs]:
    """The points of the plan, and the machine's roofs."""
    timings = [_Timing(phase, forward) for phase, forward in plan]
    found: list[Roofs] = []
    began = time.perf_counter()
    with filled_slot(session, max(forward.context for _, forward in plan)) as filled:
        for number in range(options.rounds):
            started = time.perf_counter()
            if number and started - began + (started - began) / number > options.budget:
                break
            found.append(_round(session, timings, options, probe, filled))
    return tuple(timing.point() for timing in timings), _median(found)


@dataclass
class _Timing:
    """Seconds of one point, and the share of its floor, by rounds."""

    phase: Phase
    forward: Forward
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def point(self) -> SpeedPoint:
        forward, seconds = self.forward, statistics.median(self.seconds)
        return SpeedPoint(
            phase=self.phase,
            rows=forward.rows,
            context=forward.context,
            sequences=forward.sequences,
            seconds=seconds,
            tokens_s=forward.rows * forward.sequences / seconds,
            roof_share=statistics.median(self.shares),
            rounds=len(self.seconds),
        )


def _round(
    session: Session, timings: list[_Timing], options: SpeedOptions, probe: Probe, filled: int | None
) -> Roofs:
    """Measures every point once; the machine's roofs. A point is held to the speed at which as many bytes as
    it reads are read."""
    near = stream_bytes(session.program, Forward(1))
    before = _roofs(probe, near)
    seconds = [_seconds(session, timing, options.seconds, filled) for timing in timings]
    whole, own = (mean_roofs(*pair) for pair in zip(before, _roofs(probe, near), strict=True))
    for timing, taken in zip(timings, seconds, strict=True):
        timing.seconds.append(taken)
        timing.shares.append(floor_seconds(session, own, timing.forward) / taken)
    return whole


def _roofs(probe: Probe, size: int) -> tuple[Roofs, Roofs]:
    """The machine's, and those with the stream over ``size`` bytes."""
    roofs = probe.roofs(probe.read_stream(STREAM_BYTES))
    return roofs, roofs if size == STREAM_BYTES else replace(roofs, stream=1e9 * probe.read_stream(size))


def _seconds(session: Session, timing: _Timing, least: float, filled: int | None) -> float:
    """Of one forward: the mean over as many as fill `least` seconds."""
    forward = timing.forward
    with held_slots(session, forward.context, forward.sequences, filled) as slots:
        if timing.phase == "prefill":
            return _repeated(lambda: prefill_seconds(session, slots[0], forward.context, forward.rows), least)
        return _decoded(session, slots, forward.context, least)


def _repeated(measure: Any, least: float) -> float:
    """The first time warms up, and is all where it takes as long as that already."""
    first = measure()
    if first >= least:
        return float(first)
    times = [measure()]
    while sum(times) < least:
        times.append(measure())
    return statistics.fmean(times)


def _decoded(session: Session, slots: list[int], context: int, least: float) -> float:
    """Seconds of one step of decoding, over as many as fill `least` seconds; rolled back before max_len, and
    while a sliding window still reaches."""
    room = min(session.max_len - context, session.max_tokens)
    warm = decode_seconds(session, slots, context, 1)
    steps = min(room, max(STEPS, round(least / max(warm, 1e-6))))
    taken, done = 0.0, 0
    while not done or taken < least:
        taken += decode_seconds(session, slots, context, steps)
        done += steps
    return taken / done


def measure_latency(session: Session, options: SpeedOptions) -> Latency:
    """Of greedy generations through Session.stream, one after the other, each with a prompt of its own.

    A piece of text that took several tokens counts as that many equal gaps. Nothing is looked up or drafted:
    a step brings one token.
    """
    tokens = min(options.latency_tokens, session.max_len // 2)
    prompt = min(options.latency_prompt, session.max_len - tokens)
    firsts, gaps = [], []
    for number in range(options.rounds + 1):
        first, following = _watched(session, _prompt(session, prompt, number), tokens)
        if number:  # the first of them warms up
            firsts.append(first)
            gaps += following
    p50, p95, p99 = np.quantile(gaps, [0.5, 0.95, 0.99]).tolist()
    return Latency(prompt, statistics.median(firsts), p50, p95, p99)


def _watched(session: Session, prompt: list[int], tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and between tokens."""
    asked = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True, "lookup": False}
    started = time.perf_counter()
    stream = session.stream(prompt, skip_special_tokens=False, **asked)
    gaps: list[float] = []
    last, seen = started, 0
    for _ in stream:
        now, count = time.perf_counter(), len(stream.result.token_ids)
        if seen and count > seen:
            gaps += [(now - last) / (count - seen)] * (count - seen)
        if count > seen:
            last, seen = now, count
    return stream.result.ttft_s, gaps or [stream.result.decode_tok_s and 1 / stream.result.decode_tok_s]


def _prompt(session: Session, count: int, number: int) -> list[int]:
    """Other ids for each number, so that no generation starts from what another has left."""
    raw = np.random.Philox(key=1000 + number).random_raw(count)
    ids = (raw % session.vocabulary).astype(np.int32)
    ids[0] = number % session.vocabulary
    return [int(token) for token in ids]


def _decode_a_while(session: Session) -> int:
    """Tokens that one sequence decodes in ENERGY_SECONDS."""
    done, steps, began = 0, min(16, session.max_len), time.perf_counter()
    with session.slot() as slot:
        while time.perf_counter() - began < ENERGY_SECONDS:
            decode_seconds(session, [slot], 0, steps)
            done += steps
    return done


def _cut(wanted: tuple[int, ...], most: int) -> list[int]:
    """Those that fit, and the limit itself instead of those that do not."""
    return sorted({min(value, most) for value in wanted})


def _median(found: list[Roofs]) -> Roofs:
    return Roofs(
        *(statistics.median(column) for column in zip(*((r.stream, r.floats, r.integers) for r in found)))
    )


def _field(path: Path, name: str) -> str:
    """The first value of a field in a file of "name: value" lines, or ""."""
    try:
        lines: Iterator[str] = iter(path.read_text().splitlines())
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), "")
