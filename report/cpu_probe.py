"""This CPU as a device: its roofs, and what the kernels attain of them, measured in some seconds.

The kernels themselves are timed, on products and attention of known shapes (`report.probe_program`): weights
that no cache holds say what a stream of them reaches, small ones what arithmetic takes, the smallest what an
instruction costs besides its work. Rounds go over all of them and a read stream, and medians are kept, so
that a machine that is busy meanwhile is described as busy as it is.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.compiler.options import CompileOptions
from gristmill.quant.scheme import FORMATS, Scheme
from gristmill.report.attained import FEW_ROWS, Attained, Attention, Product
from gristmill.report.devices import DeviceSpec
from gristmill.report.probe_fits import MOST_REACHED, fit_rows, fit_shapes
from gristmill.report.probe_program import DIM, ProbeProgram
from gristmill.runtime.decoding.next_tokens import most_likely_token
from gristmill.runtime.machine import available_memory_bytes, processor_name
from gristmill.runtime.profile import PEAK_SECONDS, PROBE_BYTES
from gristmill.runtime.program import CacheSpec, segment_row_bytes
from gristmill.runtime.session import Session, native

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
ASSUMED_CACHE = 32 << 20  # where the system does not say
LEAST_STREAM, MOST_STREAM = 64 << 20, 512 << 20  # bytes of all weights that are streamed
SHORT, LONG = 2048, 8192  # columns of the rows that are streamed
SMALL, TALL, LARGE = (256, 256), (2048, 256), (1024, 1024)  # weights that a cache holds
PART = (512, 1024)  # weights in f32 that working sets are made of: 2 MiB, nothing but reading
PARTS_OF_CACHE = (0.125, 0.25, 0.5, 1.0, 2.0)  # working sets, in sizes of the last cache
TILE, MANY = 16, 64  # rows beyond FEW_ROWS
GROUPS = (1, 8)  # query heads for each head of a cache
CONTEXT = 1024
HELD_CONTEXTS = 4 << 20  # bytes of all contexts that the last cache holds, and more than others do
DIFFERENCE = 1.1  # of times for a byte: less says nothing of caches
ROUNDS = 5


@dataclass(frozen=True)
class ProbeOptions:
    """weights, caches: the formats to measure; seconds: of one measurement in a round."""

    weights: tuple[str, ...]
    caches: tuple[str, ...]
    threads: int | None = None
    rounds: int = ROUNDS
    seconds: float = 0.06


def measure_cpu(options: ProbeOptions) -> DeviceSpec:
    """This machine, as busy as it is now. Needs room for some hundred MB in the directory for temporary
    files."""
    threads = options.threads or native().default_threads()
    with tempfile.TemporaryDirectory(prefix="gristmill-probe-") as folder:
        probe = _Probe(options, threads, Path(folder))
        for _ in range(options.rounds):
            probe.round()
        floats, integers = (
            1e9 * native().arithmetic_peak("auto", integer, threads, PEAK_SECONDS)
            for integer in (False, True)
        )
        attained = probe.attained()
        stream = median(probe.streams)
    memory = available_memory_bytes()
    return DeviceSpec(
        processor_name(), "cpu", memory or 0, stream, floats, threads,
        f"measured on this machine in {options.rounds} rounds; memory: what is free now",
        int8_ops=integers, cache_bytes=cache_bytes(), attained=attained,
    )  # fmt: skip


@dataclass
class _Timed:
    """An executor of a ProbeProgram, and seconds of every instruction by rows and context, one per round."""

    executor: Any
    program: ProbeProgram
    times: dict[tuple[int, int], list[NDArray[np.float64]]] = field(default_factory=dict)

    def run(self, rows: int, context: int, seconds: float) -> None:
        """Means over as many forwards as fill ``seconds``."""
        arguments = _rows(context, rows)
        self.executor.forward(*arguments)
        self.executor.profile(True)
        begin, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - begin < seconds:
            self.executor.forward(*arguments)
            count += 1
        nanoseconds = [taken for _, taken, _ in self.executor.profile_results()]
        self.executor.profile(False)
        self.times.setdefault((rows, context), []).append(np.array(nanoseconds) / count / 1e9)

    def each(self) -> list[float]:
        """`seconds` of every product of a decoded row but the last, which is the head."""
        instructions = enumerate(self.program.program.instructions)
        return [self.seconds(i) for i, instruction in instructions if instruction.op == "linear"][:-1]

    def seconds(self, instruction: int, rows: int = 1, context: int = 0) -> float:
        """The median over the rounds."""
        return float(median(times[instruction] for times in self.times[rows, context]))


def _rows(context: int, rows: int) -> tuple[NDArray[np.int32], ...]:
    """Tokens, positions, slots and the row whose logits are asked for."""
    positions = np.arange(context, context + rows, dtype=np.int32)
    return positions % 64, positions, np.zeros(rows, np.int32), np.array([rows - 1], np.int32)


class _Probe:
    """What is timed, and what follows from the times."""

    def __init__(self, options: ProbeOptions, threads: int, folder: Path) -> None:
        self.options, self.threads = options, threads
        self.streams: list[float] = []
        self.hosts: list[float] = []
        self._streamed(folder)
        self._cached(folder)
        self.kv_heads = max(2, self.threads)
        self._attended(folder)
        self._remembered(folder)
        self._held(folder)

    def _streamed(self, folder: Path) -> None:
        """Two products for each format, of equally many weights in short and in long rows."""
        total = min(max(4 * cache_bytes(), LEAST_STREAM), MOST_STREAM)
        made = ProbeProgram(LONG, FEW_ROWS, FEW_ROWS)
        self.streamed: dict[str, tuple[int, int]] = {}
        for name in self.options.weights:
            share = total / (2 * len(self.options.weights)) * 8 / FORMATS[name].bits
            rows = max(64, int(share / LONG) // 64 * 64)
            short = made.linear(scheme_of(name), rows * LONG // SHORT, SHORT)
            self.streamed[name] = short, made.linear(scheme_of(name), rows, LONG)
        self.memory = _Timed(made.executor(folder, self.threads), made)

    def _cached(self, folder: Path) -> None:
        made = ProbeProgram(2 * LARGE[1], MANY, MANY)
        self.norm = made.norm()
        self.cached = {
            name: tuple(made.linear(scheme_of(name), *shape) for shape in (SMALL, TALL, LARGE))
            for name in self.options.weights
        }
        self.gated = made.linear(scheme_of(self.options.weights[0]), *TALL, gated=True)
        self.arithmetic = _Timed(made.executor(folder, self.threads), made)
        self.session = Session(None, made.program, self.arithmetic.executor)

    def _attended(self, folder: Path) -> None:
        """For each type of cache, some attentions with one and with several queries for each head."""
        types = self.options.caches
        most = sum(len(GROUPS) * self._context_bytes(name) for name in types)
        copies = max(1, round(HELD_CONTEXTS / most))
        self.attended, self.attention = self._contexts(folder, dict.fromkeys(types, copies), GROUPS)

    def _remembered(self, folder: Path) -> None:
        """Contexts that no cache holds, with one query for each head."""
        size = min(max(2 * cache_bytes(), LEAST_STREAM), MOST_STREAM) / len(self.options.caches)
        copies = {name: max(1, round(size / self._context_bytes(name))) for name in self.options.caches}
        self.remembered, self.recall = self._contexts(folder, copies, GROUPS[:1])

    def _context_bytes(self, name: str) -> int:
        return CONTEXT * CacheSpec(self.kv_heads, DIM, DIM, name, name).row_bytes()

    def _contexts(
        self, folder: Path, copies: dict[str, int], groups: Sequence[int]
    ) -> tuple[dict[str, list[list[int]]], _Timed]:
        """Attentions over contexts that are there, by type of cache and by group. copies: of each."""
        made = ProbeProgram((max(groups) + 2) * self.kv_heads * DIM, MANY, CONTEXT + MANY)
        found = {
            name: [
                [made.attention(name, group * self.kv_heads, self.kv_heads) for _ in range(count)]
                for group in groups
            ]
            for name, count in copies.items()
        }
        timed = _Timed(made.executor(folder, self.threads), made)
        for start in range(0, CONTEXT, MANY):
            timed.executor.forward(*_rows(start, MANY))
        return found, timed

    def _held(self, folder: Path) -> None:
        """Working sets of several sizes."""
        self.held: dict[int, _Timed] = {}
        for share in PARTS_OF_CACHE:
            made = ProbeProgram(PART[1], FEW_ROWS, FEW_ROWS)
            count = max(1, int(share * cache_bytes()) // (4 * PART[0] * PART[1]))
            for _ in range(count):
                made.linear(Scheme("f32"), *PART)
            self.held[4 * PART[0] * PART[1] * count] = _Timed(made.executor(folder, self.threads), made)

    def round(self) -> None:
        """Everything once; the stream before and after what depends on it."""
        seconds = self.options.seconds
        before = self._stream()
        self.memory.run(1, 0, 2 * seconds)
        self.streams.append((before + self._stream()) / 2)
        for timed in self.held.values():
            timed.run(1, 0, seconds / 2)
        for rows in (1, FEW_ROWS, TILE, MANY):
            self.arithmetic.run(rows, 0, seconds)
        self._host(seconds)
        self.attention.run(1, CONTEXT, seconds)
        self.attention.run(1, 0, seconds / 2)
        self.recall.run(1, CONTEXT, seconds)

    def _stream(self) -> float:
        return 1e9 * float(native().read_bandwidth(PROBE_BYTES // 2, self.threads, self.options.seconds))

    def _host(self, seconds: float) -> None:
        """What a token costs besides its instructions, as a caller sees it."""
        with self.session.slot() as slot:
            most_likely_token(self.session, 1, 0, slot)
            self.session.executor.profile(True)  # type: ignore[attr-defined]
            begin, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - begin < seconds / 2:
                most_likely_token(self.session, 1, 0, slot)
                count += 1
            whole = time.perf_counter() - begin
            parts = self.session.executor.profile_results()  # type: ignore[attr-defined]
            self.session.executor.profile(False)  # type: ignore[attr-defined]
        self.hosts.append((whole - sum(taken for _, taken, _ in parts) / 1e9) / count)

    def attained(self) -> Attained:
        fits = {name: self._small(name) for name in self.options.weights}
        launch = median(fit[0] for fit in fits.values())
        attend = median(self._attend(ids, 0) for groups in self.attended.values() for ids in groups)
        return Attained(
            {name: self._product(name, launch, *fits[name][1:]) for name in self.options.weights},
            {name: self._attention(name, attend) for name in self.options.caches},
            launch, attend, self.arithmetic.seconds(self.norm), max(0.0, median(self.hosts)),
            "measured: this project's kernels on this machine", self._gate(), self._misses(),
        )  # fmt: skip

    def _gate(self) -> float:
        """Seconds for each column of a gated product, beyond one that is not."""
        plain = self.arithmetic.seconds(self.cached[self.options.weights[0]][1])
        return max(0.0, self.arithmetic.seconds(self.gated) - plain) / (TALL[0] // 2)

    def _attend(self, instructions: Sequence[int], context: int) -> float:
        """Of one of several attentions that are alike."""
        times = [self.attention.seconds(i, 1, context) for i in instructions]
        return sum(times) / len(times)

    def _misses(self) -> tuple[tuple[int, float], ...]:
        """Of each working set: how far its time for a byte is from the smallest one's to the largest one's.
        None where caches make no difference."""
        sizes = sorted(self.held)
        times = [sum(self.held[size].each()) / size for size in sizes]
        if times[-1] < DIFFERENCE * times[0]:
            return ()
        shares = [(t - times[0]) / (times[-1] - times[0]) for t in times]
        return tuple((size, float(np.clip(share, 0, 1))) for size, share in zip(sizes, shares, strict=True))

    def _small(self, name: str) -> tuple[float, float, float]:
        """Seconds of a product without weights, of a row of weights without columns, and of a weight."""
        shapes = (SMALL, TALL, LARGE)
        return fit_shapes(shapes, [self.arithmetic.seconds(i) for i in self.cached[name]])

    def _product(self, name: str, launch: float, finish: float, weight: float) -> Product:
        few, tile, many = (
            max(self.arithmetic.seconds(self.cached[name][-1], rows) - launch, 1e-9)
            for rows in (FEW_ROWS, TILE, MANY)
        )
        n, k = LARGE
        one = n * (finish + k * weight)
        slope = max(many - tile, 0.05 * many) / (MANY - TILE)  # seconds for each further row
        reached, fetch = self._reached(name, launch)
        return Product(
            reached, 2.0 * n * k / slope, max(0.0, many / slope - MANY), 1 / weight,
            max(0.0, few / one - 1) / (FEW_ROWS - 1), fetch, finish,
        )  # fmt: skip

    def _reached(self, name: str, launch: float) -> tuple[float, float]:
        """Share of the stream, and seconds for each row, from rows of two lengths."""
        stream = median(self.streams)
        sizes, rows, times = [], [], []
        for index in self.streamed[name]:
            (segment,) = self.memory.program.program.weights[f"w{index}"]
            sizes.append(segment.n * segment_row_bytes(segment))
            rows.append(segment.n)
            times.append(self.memory.seconds(index) - launch)
        return fit_rows(sizes, rows, times, stream)

    def _attention(self, name: str, launch: float) -> Attention:
        """From one and from several queries for each head, and from contexts that come from memory."""
        one, several = (
            max(self._attend(ids, CONTEXT) - launch, 1e-9) for ids in self.attended[name]
        )
        operations = 4 * DIM * self.kv_heads * (CONTEXT + 1)  # of one query for each head
        slope = max(several - one, 0.05 * several) / (GROUPS[1] - GROUPS[0])
        recalled = [self.recall.seconds(i, 1, CONTEXT) for i in self.remembered[name][0]]
        stream = self._context_bytes(name) / max(sum(recalled) / len(recalled) - launch, 1e-9)
        reached = min(MOST_REACHED, stream / median(self.streams))
        return Attention(reached, operations / slope, max(0.0, one / slope - 1))


def scheme_of(name: str) -> Scheme:
    """How a compile stores linears in a format, unless asked otherwise."""
    return Scheme(name, CompileOptions.of(weights=name).group(FORMATS[name]))


def cache_bytes() -> int:
    """Bytes of the last level of cache that one processor sees."""
    found = [_kib(path / "size") for path in CACHES.glob("index*")] if CACHES.is_dir() else []
    return max(found, default=0) or ASSUMED_CACHE


def _kib(path: Path) -> int:
    try:
        text = path.read_text().strip().upper()
    except OSError:
        return 0
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 0)
    return int(text[:-1]) * unit if unit and text[:-1].isdigit() else 0
