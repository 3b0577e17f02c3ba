"""What can be said without a GPU: bytes, floors, instructions, occupancy, and the share they allow.

    time of an instruction = max(bytes / read stream, weights * instructions per weight / issue rate) + a gap

Figures of devices are NVIDIA's: bandwidth, multiprocessors, clock and peak those of gristmill.report.devices,
registers, shared memory and warps those of the CUDA C++ programming guide (table of technical specifications
by compute capability), and for the issue rate the Hopper white paper (four schedulers in a multiprocessor, an
instruction for 32 lanes each per cycle). Instructions per weight, the share of the data sheet's bandwidth
that a kernel reaches and the gap are those of gristmill.report.attained, which plans use as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gristmill.report import devices
from gristmill.report.attained import (
    INSTRUCTIONS,
    INTEGER_INSTRUCTIONS,
    KERNEL_SECONDS,
    LANES,
    REACHED,
)
from gristmill.report.devices import DeviceSpec
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.profile import Forward, kind_of, work
from gristmill.runtime.program import Program, Segment

COMPILER = Path(__file__).resolve().parents[2] / "tests" / "kernels" / "compile_sm90.py"


@dataclass(frozen=True)
class Device:
    """bandwidth: bytes per second of the data sheet; matmul: dense bf16 operations per second."""

    name: str
    bandwidth: float
    processors: int
    clock: float
    matmul: float
    lanes: int = LANES  # that a multiprocessor issues for in a cycle
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    shared_bytes: int = 228 << 10
    reserved_bytes: int = 1 << 10  # of shared memory, for every block

    @staticmethod
    def of(spec: DeviceSpec) -> Device:
        return Device(spec.name, spec.bandwidth, spec.processors, spec.clock, spec.f16_ops)

    @property
    def issue_rate(self) -> float:
        """Instructions of single lanes per second."""
        return self.processors * self.lanes * self.clock


DEVICES = {name: Device.of(devices.DEVICES[name]) for name in ("h100", "h200")}


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a multiprocessor; registers are per thread."""

    label: str
    kernel: str
    grid: tuple[int, ...]
    warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    ptx: str = field(default="", compare=False)

    def resident(self, device: Device) -> int:
        """Blocks on a multiprocessor at once; registers are given to a warp by 256."""
        of_warp = -(-self.registers * 32 // 256) * 256
        return min(
            device.blocks, device.warps // self.warps,
            device.registers // max(1, of_warp * self.warps),
            device.shared_bytes // (self.shared_bytes + device.reserved_bytes),
        )  # fmt: skip

    def occupancy(self, device: Device) -> float:
        """The share of a multiprocessor's warps that are resident, as far as the grid fills them."""
        blocks = 1
        for size in self.grid:
            blocks *= size
        filled = min(self.resident(device), -(-blocks // device.processors))
        return filled * self.warps / device.warps

    def waves(self, device: Device) -> float:
        """Rounds of blocks that the grid takes on the whole device."""
        blocks = 1
        for size in self.grid:
            blocks *= size
        return blocks / (max(1, self.resident(device)) * device.processors)


def compile_for_paper(shape: str, formats: Iterable[str]) -> list[Compiled]:
    """Every kernel of one decoded row, compiled for sm_90 in a process of its own: see launches.py."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment |= {
        "BENCH_GPU_PAPER": json.dumps({"shape": shape, "formats": list(formats)}),
        "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1", "TRITON_DISABLE_LINE_INFO": "1",
    }  # fmt: skip
    command = [sys.executable, str(COMPILER), "gpu.launches"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise GristmillError(f"kernels do not compile for sm_90:\n{done.stderr[-3000:]}")
    return [_compiled(json.loads(line)) for line in done.stdout.splitlines()]


def _compiled(fields: dict[str, Any]) -> Compiled:
    return Compiled(
        fields["launch"], fields["kernel"], tuple(fields["grid"]), fields["warps"], fields["shared_bytes"],
        fields["registers"], fields["spill_bytes"], fields["ptx"],
    )  # fmt: skip


def loop_instructions(ptx: str) -> int:
    """Instructions of the longest loop that ptxas makes of a kernel: from a label to a branch back to it."""
    from triton import knobs

    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target, "no target in what should be PTX"
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        assemble = [knobs.nvidia.ptxas.path, f"-arch={target[1]}", str(source), "-o", str(cubin)]
        subprocess.run(assemble, check=True, capture_output=True)
        disassemble = [knobs.nvidia.nvdisasm.path, str(cubin)]
        sass = subprocess.run(disassemble, check=True, capture_output=True, text=True).stdout
    return longest_loop(sass)


def longest_loop(sass: str) -> int:
    labels: dict[str, int] = {}
    count = longest = 0
    for line in sass.splitlines():
        if label_of := re.match(r"(\.L_x_\d+):", line):
            labels[label_of[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s", line) and " NOP" not in line:
            count += 1
            back = re.search(r"\bBRA `\((\.L_x_\d+)\)", line)
            if back and back[1] in labels:
                longest = max(longest, count - labels[back[1]])
    return longest


# ---- what a program costs


ROPES = "rope tables"  # what a step launches before its instructions


@dataclass
class Cost:
    """One kind of instruction in a step: bytes read, weights multiplied, lane instructions for them."""

    name: str
    count: int = 0
    bytes: int = 0
    weights: int = 0
    lane_instructions: float = 0.0
    kernels: int = 0

    def seconds(self, device: Device, bandwidth: float) -> float:
        issue = self.lane_instructions / device.issue_rate
        return max(self.bytes / bandwidth, issue) + self.kernels * KERNEL_SECONDS


def instructions_of(segment: Segment, integers: bool) -> float:
    """Of a lane for each weight; where one scale is not counted, as with several. integers: beside int8
    activations."""
    if integers:
        return INTEGER_INSTRUCTIONS[segment.format]
    several, one = (segment.format, True), (segment.format, False)
    return INSTRUCTIONS[several if segment.group or one not in INSTRUCTIONS else one]


def costs(program: Program, context: int, kernels: dict[str, int]) -> list[Cost]:
    """Of decoding one row. kernels: launches of all instructions of a kind."""
    found = {ROPES: Cost(ROPES, len(program.ropes))}
    for i in program.instructions:
        name = kind_of(program, i)
        cost = found.setdefault(name, Cost(name))
        cost.count += 1
        cost.bytes += work(program, i, Forward(1, context))[0]
        for segment in program.weights.get(i.weight or "", []) if i.op == "linear" else []:
            cost.weights += segment.n * segment.k
            each = instructions_of(segment, i.attribute("act_group") > 0)
            cost.lane_instructions += segment.n * segment.k * each
    for name, cost in found.items():
        cost.kernels = kernels[name]
    return list(found.values())


def bytes_per_token(program: Program, context: int) -> int:
    """Bytes of weights and cache that decoding one row after ``context`` others reads."""
    return sum(work(program, i, Forward(1, context))[0] for i in program.instructions)


def operations(program: Program, rows: int) -> int:
    """Operations of a prompt, a multiply-add counting as two; the head is for one row."""
    return sum(work(program, i, Forward(rows, 0))[1] for i in program.instructions)


@dataclass(frozen=True)
class Prediction:
    """Of decoding one row: seconds, and the least ones by the read stream alone."""

    format: str
    bytes: int
    floor: float
    seconds: float
    kernels: int

    @property
    def share(self) -> float:
        """Of a roof that is REACHED times the data sheet's, as a run measures it."""
        return self.floor / self.seconds


def predict(name: str, found: Iterable[Cost], device: Device) -> Prediction:
    stream = REACHED * device.bandwidth
    listed = list(found)
    size = sum(cost.bytes for cost in listed)
    seconds = sum(cost.seconds(device, stream) for cost in listed)
    return Prediction(name, size, size / stream, seconds, sum(cost.kernels for cost in listed))


def predictions_table(found: Iterable[tuple[Device, Prediction]]) -> Table:
    table = Table(title="On paper: one sequence, one token", title_justify="left")
    for column in ("device", "format", "MB", "floor us", "kernels", "predicted us", "tok/s", "share"):
        table.add_column(column, justify="right" if column not in ("device", "format") else "left")
    for device, p in found:
        table.add_row(
            device.name, p.format, f"{p.bytes / 1e6:.0f}", f"{1e6 * p.floor:.0f}", str(p.kernels),
            f"{1e6 * p.seconds:.0f}", f"{1 / p.seconds:.0f}", f"{p.share:.0%}",
        )  # fmt: skip
    table.caption = (
        f"floor: {REACHED:.0%} of the data sheet's bandwidth; {1e6 * KERNEL_SECONDS:g} us between kernels"
    )
    return table


def kernels_table(compiled: Iterable[Compiled], device: Device) -> Table:
    """One line for each kernel in every form of it that is launched: registers, shared memory, occupancy."""
    table = Table(title=f"Kernels of one row, compiled for sm_90, on {device.name}", title_justify="left")
    for column in ("launch", "kernel", "grid", "warps", "regs", "spill B", "shared B", "occupancy", "waves"):
        table.add_column(column, justify="left" if column in ("launch", "kernel") else "right")
    for k in dict.fromkeys(compiled):
        grid = "x".join(map(str, k.grid))
        numbers = (grid, k.warps, k.registers, k.spill_bytes, k.shared_bytes)
        share = f"{k.occupancy(device):.0%}"
        table.add_row(k.label, k.kernel, *map(str, numbers), share, f"{k.waves(device):.2f}")
    return table


def costs_table(name: str, found: Iterable[Cost], device: Device) -> Table:
    """Where a token's time goes on paper."""
    table = Table(title=f"{name} on {device.name}, on paper", title_justify="left")
    for column in ("kind", "times", "MB", "floor us", "issue us", "kernels", "predicted us"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    stream = REACHED * device.bandwidth
    for cost in sorted(found, key=lambda cost: -cost.seconds(device, stream)):
        table.add_row(
            cost.name, str(cost.count), f"{cost.bytes / 1e6:.1f}", f"{1e6 * cost.bytes / stream:.1f}",
            f"{1e6 * cost.lane_instructions / device.issue_rate:.1f}", str(cost.kernels),
            f"{1e6 * cost.seconds(device, stream):.1f}",
        )  # fmt: skip
    return table


def loops_table(name: str, program: Program, compiled: Iterable[Compiled]) -> Table:
    """Instructions per weight, counted in what ptxas makes of the kernels, beside the table's."""
    from gpu.adapter import weights_of_lane

    by_label = {k.label: k for k in compiled if k.kernel in ("decode_kernel", "integer_kernel")}
    table = Table(title=f"{name}: instructions of a lane per weight", title_justify="left")
    for column in ("kind", "counted", "in the table"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    seen = set()
    for i in program.instructions:
        kind = kind_of(program, i)
        kernel = by_label.get(label(name, kind))
        if kernel is not None and kind not in seen:
            seen.add(kind)
            segments = program.weights[i.weight or ""]
            group = i.attribute("act_group")
            counted = loop_instructions(kernel.ptx) / weights_of_lane(segments, group)
            table.add_row(kind, f"{counted:.2f}", f"{instructions_of(segments[0], group > 0):.2f}")
    return table


def show(table: Table) -> None:
    Console(width=130).print(table)


def label(name: str, kind: str) -> str:
    """Of a kind of instruction in a program whose linears have this format."""
    return f"{name}: {kind}"
