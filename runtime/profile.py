"""Where the time of a forward goes, instruction by instruction, beside what this machine could do.

A kind is an op, and for linears its weights' name without the number of the layer. Its floor is
max(bytes / read stream, operations / peak): bytes are weights and cache rows, read once; operations count a
multiply-add as two; stream and peak are measured in the same run. Values between instructions are not counted
as bytes, since they stay in the caches of the processor.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from gristmill.runtime.program import CacheSpec, Instruction, Program, segment_row_bytes
from gristmill.runtime.session import Executor, Session, native

PEAK_SECONDS = 0.1
FEW = 5  # repeats that a quartile should have
QUARTILE = 0.25
PROBE_BYTES = 512 << 20
PROBE_SECONDS = 0.25


class CpuExecutor(Executor, Protocol):
    """What profiling needs of the executor beside running it; see cpu/_native.pyi."""

    isa: str
    shared_phases: int

    def profile(self, enable: bool) -> None: ...

    def profile_results(self) -> list[tuple[str, int, int]]: ...


def cpu_executor(session: Session) -> CpuExecutor:
    return cast(CpuExecutor, session.executor)


@dataclass(frozen=True)
class Roofs:
    """stream: bytes per second that all threads together read; floats, integers: operations per second on f32
    and on 8-bit integers."""

    stream: float
    floats: float
    integers: float

    @staticmethod
    def measure(session: Session, stream_gb_s: float) -> Roofs:
        """The two arithmetic peaks with the session's threads and instruction set."""
        isa, threads = cpu_executor(session).isa, session.threads
        floats, integers = (
            1e9 * native().arithmetic_peak(isa, integer, threads, PEAK_SECONDS) for integer in (False, True)
        )
        return Roofs(1e9 * stream_gb_s, floats, integers)


class Probe(Protocol):
    """What measures the device that a session runs on."""

    def read_stream(self, size: int = PROBE_BYTES) -> float: ...

    def roofs(self, stream_gb_s: float) -> Roofs: ...

    def profile(
        self, roofs: Roofs, forward: Forward, repeats: int, filled: int | None = None,
        seconds: float = math.inf,
    ) -> Profile: ...  # fmt: skip

    def communication(self, forward: Forward) -> float | None: ...


class CpuProbe:
    """The CPU, with the threads and the instruction set of the session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def read_stream(self, size: int = PROBE_BYTES) -> float:
        """10^9 bytes per second that all threads together read, over and over, of ``size`` bytes."""
        return float(native().read_bandwidth(size, self._session.threads, PROBE_SECONDS))

    def roofs(self, stream_gb_s: float) -> Roofs:
        return Roofs.measure(self._session, stream_gb_s)

    def profile(
        self, roofs: Roofs, forward: Forward, repeats: int, filled: int | None = None,
        seconds: float = math.inf,
    ) -> Profile:  # fmt: skip
        return profile(self._session, roofs, forward, repeats, filled, seconds)

    def communication(self, forward: Forward) -> float | None:
        """None: the threads share one memory."""
        return None


def probe_of(session: Session) -> Probe:
    """An executor that is not on the CPU brings its own."""
    own = getattr(session.executor, "probe", None)
    return cast(Probe, own(session)) if own else CpuProbe(session)


@dataclass(frozen=True)
class Forward:
    """``rows`` new positions in each of ``sequences`` slots that hold ``context`` others; one row's logits of
    each slot are asked for."""

    rows: int = 1
    context: int = 0
    sequences: int = 1


@dataclass
class Kind:
    """All instructions of one kind in one forward. seconds: measured; floor: the least possible ones."""

    name: str
    count: int = 0
    seconds: float = 0.0
    bytes: int = 0
    operations: int = 0
    floor: float = 0.0
    memory_floor: float = 0.0
    compute_floor: float = 0.0

    @property
    def bound(self) -> str:
        """What the floor is made of; "overhead" where there is next to none."""
        if self.floor < 0.02 * self.seconds:
            return "overhead"
        return "memory" if self.memory_floor >= self.compute_floor else "arithmetic"


@dataclass(frozen=True)
class Transfer:
    """Exchanges of one kind between ranks in a forward: how many, bytes that a rank sends, seconds until all
    is there, waits for slower ranks included."""

    name: str
    count: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """kinds: slowest first; seconds: of one forward, of which `kinds` and `transfers` are the parts;
    shared_phases: how often the threads waited for each other in it, None where there are no threads; around:
    seconds of the call before, between and after these, None where they are not timed in their forward."""

    forward: Forward
    kinds: list[Kind]
    seconds: float
    shared_phases: int | None
    around: float | None = None
    transfers: tuple[Transfer, ...] = ()

    def to_json(self) -> dict[str, Any]:
        kinds = [asdict(kind) | {"bound": kind.bound} for kind in self.kinds]
        return {
            **asdict(self.forward),
            "seconds": self.seconds,
            "shared_phases": self.shared_phases,
            "around": self.around,
            "kinds": kinds,
            "transfers": [asdict(transfer) for transfer in self.transfers],
        }


def profile(
    session: Session, roofs: Roofs, forward: Forward, repeats: int, filled: int | None = None,
    seconds: float = math.inf,
) -> Profile:  # fmt: skip
    """Profile a forward; times are lower quartiles, since a busy neighbour adds to a time and never takes
    away, over ``repeats``, or as many of them as begin within ``seconds`` (FEW begin within four times as
    many), after one that warms up and stands alone where it takes so long itself. filled: as for
    `held_slots`.

    Raises GristmillError where it does not fit into the session.
    """
    executor = cpu_executor(session)
    found: list[list[int]] = []
    walls: list[float] = []
    with prepared(session, forward, filled) as run:
        try:
            while len(found) <= repeats and sum(walls) < seconds * (4 if len(found) <= FEW else 1):
                executor.profile(True)
                began = time.perf_counter()
                run()
                walls.append(time.perf_counter() - began)
                found.append([nanoseconds for _, nanoseconds, _ in executor.profile_results()])
        finally:
            executor.profile(False)
    found, walls = (found[1:], walls[1:]) if len(found) > 1 else (found, walls)
    times = (np.quantile(found, QUARTILE, axis=0) / 1e9).tolist()
    kinds, phases = collect(session.program, times, roofs, forward), executor.shared_phases
    around = float(np.quantile(np.array(walls) - np.sum(found, axis=1) / 1e9, QUARTILE))
    return Profile(forward, kinds, sum(times), phases, max(0.0, around))


def collect(program: Program, times: Sequence[float], roofs: Roofs, forward: Forward) -> list[Kind]:
    """Seconds of every instruction -> kinds, slowest first."""
    found: dict[str, Kind] = {}
    for instruction, seconds in zip(program.instructions, times, strict=True):
        name = kind_of(program, instruction)
        kind = found.setdefault(name, Kind(name))
        read, operations, integer = work(program, instruction, forward)
        memory, compute = read / roofs.stream, operations / (roofs.integers if integer else roofs.floats)
        kind.count += 1
        kind.seconds += seconds
        kind.bytes += read
        kind.operations += operations
        kind.memory_floor += memory
        kind.compute_floor += compute
        kind.floor += max(memory, compute)
    return sorted(found.values(), key=lambda kind: -kind.seconds)


def kind_of(program: Program, instruction: Instruction) -> str:
    """The op, with the weights' name for those that have some."""
    if instruction.weight is not None:
        name = re.sub(r"^.*?\.\d+\.", "", instruction.weight)
        formats = {segment.format for segment in program.weights[instruction.weight]}
        return f"{instruction.op} {name} {'|'.join(sorted(formats))}"
    if instruction.op == "attention":
        cache = program.caches[instruction.attribute("cache")]
        window = f" window {cache.window}" if cache.window else ""
        types = cache.k_dtype if cache.k_dtype == cache.v_dtype else f"{cache.k_dtype}/{cache.v_dtype}"
        return f"attention {types}{window}"
    return instruction.op


def work(program: Program, instruction: Instruction, forward: Forward) -> tuple[int, int, bool]:
    """Bytes, operations, and whether these are on integers."""
    rows, sequences = forward.rows, forward.sequences
    if instruction.op == "attention":
        cache = program.caches[instruction.attribute("cache")]
        end = forward.context + rows
        reach = min(end, cache.window + rows - 1) if cache.window else end
        width = instruction.attribute("heads") * (cache.k_dim + cache.v_dim)
        seen = _positions_seen(cache, forward)
        return sequences * cache.row_bytes() * reach, 2 * sequences * width * seen, False
    if instruction.weight is None:
        return 0, 0, False
    out = instruction.out.value
    rows = sequences if out < 0 or program.values[out].rows == "R" else rows * sequences
    segments = program.weights[instruction.weight]
    if instruction.op == "embedding":
        return rows * segment_row_bytes(segments[0]), 0, False
    read = sum(segment.n * segment_row_bytes(segment) for segment in segments)
    operations = 2 * rows * sum(segment.n * segment.k for segment in segments)
    return read, operations, bool(instruction.attribute("act_group"))


def _positions_seen(cache: CacheSpec, forward: Forward) -> int:
    """Sum over the rows of one sequence of the positions each attends to."""
    seen = np.arange(forward.context + 1, forward.context + forward.rows + 1)
    return int((np.minimum(seen, cache.window) if cache.window else seen).sum())


def random_ids(session: Session, count: int) -> NDArray[np.int32]:
    """The same ids for the same session every time."""
    raw = np.random.Philox(key=7).random_raw(max(count, 1))[:count]
    return (raw % session.vocabulary).astype(np.int32)


def take_in(session: Session, slot: int, ids: NDArray[np.int32]) -> None:
    """Prefill in chunks; only the last row's logits are asked for, as in generation."""
    for start in range(0, len(ids), session.max_tokens):
        chunk = ids[start : start + session.max_tokens]
        rows = [len(chunk) - 1] if start + len(chunk) == len(ids) else []
        positions = np.arange(start, start + len(chunk), dtype=np.int32)
        session._run(chunk, positions, np.full(len(chunk), slot, np.int32), np.array(rows, np.int32))


def _copied(session: Session, source: int, target: int, length: int) -> bool:
    """Whether ``target`` got the first positions of ``source``: it may hold fewer, and its sliding window may
    have moved past them."""
    slots = session._slots
    if length > slots.lengths[source] or slots.reachable(source, length) != length:
        return False
    return session._copy_slot(source, target, length)


@contextmanager
def held_slots(
    session: Session, context: int, sequences: int, filled: int | None = None
) -> Iterator[list[int]]:
    """``sequences`` slots that hold ``context`` positions of `random_ids` each; those that ``filled``, a slot
    of the caller's, begins with are copied from it, which takes less time than to compute them."""
    with ExitStack() as held:
        slots = [held.enter_context(session.slot()) for _ in range(sequences)]
        for slot in slots:
            source = slots[0] if filled is None and slot != slots[0] else filled
            if source is None or not _copied(session, source, slot, context):
                take_in(session, slot, random_ids(session, context))
        yield slots


@contextmanager
def prepared(
    session: Session, forward: Forward, filled: int | None = None
) -> Iterator[Callable[[], object]]:
    """Slots that hold the context; what it yields runs the forward, over the same positions every time."""
    with held_slots(session, forward.context, forward.sequences, filled) as slots:
        count = forward.rows * forward.sequences
        tokens = random_ids(session, count)
        new = np.arange(forward.context, forward.context + forward.rows, dtype=np.int32)
        positions = np.tile(new, forward.sequences)
        owners = np.repeat(np.array(slots, np.int32), forward.rows)
        lasts = np.arange(forward.rows - 1, count, forward.rows, dtype=np.int32)
        yield lambda: session._run(tokens, positions, owners, lasts)
