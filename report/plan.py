"""What a model will take and give on a device, before it is compiled or the device is there.

For every format of weights and of the KV cache: bytes, what fits, the floor that the device's roofs put under
a token's time, what is to be expected above it, and where computing takes over from reading. Everything is
counted on the program that a compile would make, by the same functions that the runtime and its benchmarks
use; see `report.forward_time` for times and `report.attained` for where an expectation comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gristmill.report.devices import DeviceSpec, device_json
from gristmill.report.forward_time import Times, forward_times
from gristmill.report.plan_source import Sketch, sketches
from gristmill.report.roof_model import break_even, ridge
from gristmill.runtime import footprint
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.profile import Forward, work
from gristmill.runtime.program import CACHE_TYPES, Program

WEIGHTS = ("f16", "fp8", "int8", "int4", "int3", "int2")
CACHES = ("f16", "int8", "fp8", "int4")
CONTEXT = 1024  # where a model has as many positions
PROMPT = 512  # rows of the forward that prefill is planned for
MOST_SLOTS = 65536  # of either executor
MOST_BATCH = 1 << 14  # up to here a break-even is looked for
USABLE = 0.98  # of a GPU's memory that the driver leaves; an H100 of 80 GB has 79.6 GiB of 80
DRIVER_BYTES = 512 << 20  # what a CUDA context takes; assumed
SCRATCH_BYTES = 32 << 20  # of the CPU executor: 16 MiB for attention, activations in int8, a thread's own


@dataclass(frozen=True)
class PlanOptions:
    """weights, kv: formats, None for all usual ones (of an artifact, its own weights); context: positions
    before the token that is decoded, None: 1024 or what the model has; batch: sequences."""

    weights: tuple[str, ...] | None = None
    kv: tuple[str, ...] | None = None
    context: int | None = None
    batch: int = 1


@dataclass(frozen=True)
class Entry:
    """One format of weights and of the cache.

    read_bytes: of one token after ``context``; kv_bytes: of one more position; needed_bytes: of ``batch``
    sequences, everything that the runtime takes; max_batch: sequences of ``context`` that fit; max_context:
    positions of each of ``batch`` that fit. floor_tok_s: what the roofs allow all sequences together; tok_s,
    prefill_tok_s: what is to be expected, of a prompt of `PROMPT` rows; bound: what most of the expected time
    is. number: the type that products are computed in; ridge: operations per byte; intensity: of one
    sequence; break_even, break_even_roof: sequences at which products take as long to compute as their
    weights to read, as kernels attain it and by the roofs, None beyond any batch.
    """

    weights: str
    kv: str
    bits_per_weight: float
    weight_bytes: int
    read_bytes: int
    kv_bytes: int
    needed_bytes: int
    fits: bool
    max_batch: int
    max_context: int
    floor_tok_s: float
    tok_s: float
    prefill_tok_s: float
    bound: str
    number: str
    ridge: float
    intensity: float
    break_even: int | None
    break_even_roof: int | None


@dataclass(frozen=True)
class Plan:
    """model: its name; positions: the most it has; usable_bytes: of the device's memory."""

    model: str
    device: DeviceSpec
    context: int
    batch: int
    positions: int
    usable_bytes: int
    entries: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        found = asdict(replace(self, entries=()))
        return {
            **found,
            "device": device_json(self.device),
            "assumptions": self.device.kernels.source,
            "entries": [asdict(entry) for entry in self.entries],
        }


Measure = Callable[[tuple[str, ...], tuple[str, ...]], DeviceSpec]


def plan(model: str, device: DeviceSpec | Measure, options: PlanOptions | None = None) -> Plan:
    """Plan ``model`` (see `report.plan_source.sketches`) on a device, or on one that is measured for the
    formats of weights and of the cache that it is then asked about.

    Raises GristmillError for options that do not fit the model, and for models that do not compile.
    """
    options = options or PlanOptions()
    caches = _checked(options)
    name, made = sketches(model, options.weights, WEIGHTS)
    positions = min(sketch.program.limits.max_position for sketch in made)
    context = _context(options.context, positions)
    formats = tuple(sorted({s.format for sketch in made for s in sketch.segments}))
    spec = device if isinstance(device, DeviceSpec) else device(formats, caches)
    usable = usable_bytes(spec)
    ends = {sketch.label: _break_even(sketch.program, spec) for sketch in made}
    entries = tuple(
        _entry(sketch, kv, spec, usable, context, options.batch, ends[sketch.label])
        for sketch in made
        for kv in caches
    )
    return Plan(name, spec, context, options.batch, positions, usable, entries)


def _checked(options: PlanOptions) -> tuple[str, ...]:
    """The types of cache."""
    if options.batch < 1 or options.batch > MOST_SLOTS:
        raise GristmillError(f"batch is {options.batch}, expected 1 to {MOST_SLOTS}")
    for name in options.kv or ():
        if name not in CACHE_TYPES:
            raise GristmillError(f"kv is {name!r}, expected one of {', '.join(CACHE_TYPES)}")
    return tuple(dict.fromkeys(options.kv or CACHES))


def _context(asked: int | None, positions: int) -> int:
    most = positions - 1  # the token that is decoded needs one
    if asked is None:
        return min(CONTEXT, most)
    if not 0 <= asked <= most:
        raise GristmillError(f"context is {asked}, expected 0 to {most}: the model has {positions} positions")
    return asked


def _entry(
    sketch: Sketch, kv: str, spec: DeviceSpec, usable: int, context: int, batch: int,
    ends: tuple[int | None, int | None],
) -> Entry:  # fmt: skip
    program = sketch.with_cache(kv)
    one = Forward(1, context)
    step = forward_times(program, spec, Forward(1, context, batch))
    rows = min(PROMPT, program.limits.max_tokens, program.limits.max_position)
    prompt = forward_times(program, spec, Forward(rows))
    times = forward_times(program, spec, one)
    number, peak = _products(program, spec, one)

    def needed(length: int, slots: int) -> int:
        return needed_bytes(program, spec, length, slots, sketch.weight_bytes)

    taken = needed(context + 1, batch)
    return Entry(
        sketch.label, kv, sketch.bits_per_weight, sketch.weight_bytes, times.bytes,
        sum(cache.row_bytes() for cache in program.caches), taken, taken <= usable,
        _largest(MOST_SLOTS, lambda n: needed(context + 1, n) <= usable),
        _largest(program.limits.max_position, lambda n: needed(n, batch) <= usable),
        batch / step.floor, batch / step.seconds, rows / prompt.seconds, _bound(step), number,
        ridge(spec.bandwidth, peak), times.operations / times.bytes,
        *ends,
    )  # fmt: skip


def _break_even(program: Program, spec: DeviceSpec) -> tuple[int | None, int | None]:
    """Sequences at which products take as long to compute as their weights to read: as kernels attain it, and
    by the roofs. Attention is left out: every sequence brings keys and values of its own, so that its share
    does not change with their number."""

    def at(count: int) -> Times:
        return forward_times(program, spec, Forward(1, 0, count), "linear")

    return (
        break_even(lambda n: at(n).memory, lambda n: at(n).compute, MOST_BATCH),
        break_even(lambda n: at(n).floor_memory, lambda n: at(n).floor_compute, MOST_BATCH),
    )


def _products(program: Program, spec: DeviceSpec, forward: Forward) -> tuple[str, float]:
    """The number type that most operations of linears are done in, and its peak."""
    found: dict[tuple[str, float], int] = {}
    for instruction in program.instructions:
        if instruction.op == "linear":
            _, operations, integer = work(program, instruction, forward)
            peak, number = spec.peak(program.weights[instruction.weight or ""][0].format, integer)
            found[number, peak] = found.get((number, peak), 0) + operations
    return max(found, key=lambda key: found[key])


def _bound(times: Times) -> str:
    """What most of an expected time is."""
    parts = {"memory": times.memory, "compute": times.compute, "overhead": times.overhead}
    return max(parts, key=lambda name: parts[name])


def usable_bytes(spec: DeviceSpec) -> int:
    """Of a device's memory, what an executor may take."""
    if spec.kind == "cpu":
        return spec.memory_bytes
    return max(0, int(USABLE * spec.memory_bytes) - DRIVER_BYTES)


def needed_bytes(program: Program, spec: DeviceSpec, length: int, slots: int, weight_bytes: int) -> int:
    """What the executor of this kind of device takes for ``slots`` sequences of ``length`` positions.

    Weights are counted on the CPU too, where they are mapped: what is not in memory is read from a disk.
    """
    if spec.kind == "cpu":
        kv = footprint.kv_bytes(program, length, slots)
        return weight_bytes + kv + program.arena_bytes + SCRATCH_BYTES
    try:
        from gristmill.runtime.cuda import device
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] not in ("torch", "triton"):
            raise
        raise GristmillError(
            f"a plan for a GPU counts memory as its executor does, which needs {error.name}; install it with "
            "`pip install 'gristmill[cuda]'`, or plan for --device-spec cpu"
        ) from error
    return device.needed_bytes(program, length, slots, weight_bytes)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to ``limit`` that fits, 0 where none does; what is less than it fits too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def most_exact_first(entries: Sequence[Entry]) -> list[Entry]:
    """By stored bits of a weight, then by bytes of a position, most first: as exactness goes, in general."""
    return sorted(entries, key=lambda entry: (-entry.bits_per_weight, -entry.kv_bytes))
