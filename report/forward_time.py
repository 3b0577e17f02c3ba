"""Seconds of a forward on a device, on paper: the floor that its roofs allow, and what is to be expected.

The same count of bytes and operations (`gristmill.runtime.profile.work`) twice, instruction by instruction:
with the device's own roofs for the floor, with what kernels attain of them for the expectation. Values
between instructions are not counted as bytes, as in `bench --profile`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gristmill.report.attained import Attained
from gristmill.report.devices import DeviceSpec
from gristmill.report.roof_model import compute_seconds, memory_seconds
from gristmill.runtime.profile import Forward, work
from gristmill.runtime.program import Instruction, Program, segment_row_bytes


@dataclass(frozen=True)
class Times:
    """Seconds of one forward. memory, compute: of the two alone, as kernels attain them; overhead: of
    launches and the host; floor: the least by the device's roofs, floor_memory and floor_compute its parts.
    What stays in the device's last cache from one forward to the next is not counted as memory.
    """

    seconds: float
    memory: float
    compute: float
    overhead: float
    floor: float
    floor_memory: float
    floor_compute: float
    bytes: int
    operations: int


def forward_times(program: Program, spec: DeviceSpec, forward: Forward, op: str | None = None) -> Times:
    """Of all instructions of a program, or all of one op, and the host's part."""
    kernels = spec.kernels
    parts = list(_instructions(program, spec, kernels, forward, op))
    overhead = kernels.forward + sum(part.overhead for part in parts)
    worked = sum(max(part.memory, part.compute) for part in parts)
    return Times(
        worked + overhead,
        sum(part.memory for part in parts),
        sum(part.compute for part in parts),
        overhead,
        sum(part.floor for part in parts),
        sum(part.floor_memory for part in parts),
        sum(part.floor_compute for part in parts),
        sum(part.bytes for part in parts),
        sum(part.operations for part in parts),
    )


def _instructions(
    program: Program, spec: DeviceSpec, kernels: Attained, forward: Forward, op: str | None
) -> Iterator[Times]:
    read_all = sum(work(program, instruction, forward)[0] for instruction in program.instructions)
    missing = kernels.missing(read_all, spec.cache_bytes)
    for instruction in (i for i in program.instructions if op in (None, i.op)):
        read, operations, integer = work(program, instruction, forward)
        if instruction.op == "linear":
            memory, compute = _linear(program, instruction, spec, kernels, forward)
            gates = rows_of(program, instruction, forward) if instruction.attribute("glu") else 0
            overhead = kernels.linear + kernels.gate * instruction.out.width * gates
        elif instruction.op == "attention":
            memory, compute = _attention(program, instruction, spec, kernels, forward)
            overhead = kernels.attend
        else:
            memory, compute, overhead = memory_seconds(read, spec.bandwidth), 0.0, kernels.other
        floor_memory = missing * memory_seconds(read, spec.bandwidth)
        peak = _peak(program, instruction, spec, integer)
        floor_compute = compute_seconds(operations, peak)
        floor = max(floor_memory, floor_compute)
        yield Times(
            0.0, missing * memory, compute, overhead, floor, floor_memory, floor_compute, read, operations
        )


def _linear(
    program: Program, instruction: Instruction, spec: DeviceSpec, kernels: Attained, forward: Forward
) -> tuple[float, float]:
    """Seconds of memory and of compute, segment by segment: each has its format."""
    segments, rows = program.weights[instruction.weight or ""], rows_of(program, instruction, forward)
    memory = compute = 0.0
    for segment in segments:
        attained = kernels.product(segment.format, segment.group)
        read = segment.n * segment_row_bytes(segment)
        memory += memory_seconds(read, attained.reached * spec.bandwidth)
        memory += segment.n * attained.fetch
        compute += attained.compute_seconds(segment.n, segment.k, rows)
    return memory, compute


def rows_of(program: Program, instruction: Instruction, forward: Forward) -> int:
    """Rows of activations that a linear multiplies."""
    weights = sum(segment.n * segment.k for segment in program.weights[instruction.weight or ""])
    return work(program, instruction, forward)[1] // (2 * weights)


def _attention(
    program: Program, instruction: Instruction, spec: DeviceSpec, kernels: Attained, forward: Forward
) -> tuple[float, float]:
    """Keys and values, which may be of two types, each with half of the columns' operations."""
    cache = program.caches[instruction.attribute("cache")]
    read, operations, _ = work(program, instruction, forward)
    queries = int(instruction.attribute("heads")) // cache.kv_heads * forward.rows
    sides = [kernels.attention[name] for name in (cache.k_dtype, cache.v_dtype)]
    memory, compute = 0.0, 0.0
    for side in sides:
        memory += memory_seconds(read / 2, side.reached * spec.bandwidth)
        compute += side.compute_seconds(operations / 2, queries)
    return memory, compute


def _peak(program: Program, instruction: Instruction, spec: DeviceSpec, integer: bool) -> float:
    name = program.weights[instruction.weight][0].format if instruction.weight else "f16"
    return spec.peak(name, integer)[0]

