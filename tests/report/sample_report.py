"""A report with made-up figures of every kind that a page can show: SAMPLE, nothing here was measured.

The figures follow simple rules (bytes over bandwidth, errors that grow as bits fall), so that pictures look
as they do for real; names and token texts hold what a careless page would trip over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gristmill.compiler.statistics import Interval
from gristmill.report.pareto import with_dominated
from gristmill.report.schema import (
    Accuracy,
    Bottleneck,
    Energy,
    KindVerdict,
    LastWord,
    Latency,
    LayerError,
    Machine,
    Memory,
    MemorySample,
    PhaseWhy,
    Point,
    PositionBin,
    Remedy,
    Report,
    ScalePoint,
    SpeedPoint,
    WorstToken,
)

MIB = 1 << 20
LAYERS = 22
PARTS = ("qkv", "o", "gate_up", "down")
HOSTILE = "</script><img src=x onerror=alert(1)>|`$x$`\x1b[31m\u202e\n\t \u00a0&amp;"
CPU = Machine("Sample CPU, made up", 2, 2, 24 << 30, "AVX-512 VNNI", "Linux 6.1", 31e9, 160e9, 720e9)
GPU = Machine("Sample GPU, made up", 132, 1, 80 << 30, "sm_90", "Linux 6.1", 3.0e12, 800e12, 1600e12)
PARAMETERS = 1.1e9


@dataclass(frozen=True)
class Made:
    """What a made-up point is computed from."""

    id: str
    label: str
    weights: str
    method: str
    kv: str
    bits: float
    increase: float
    kl: float
    runtime: str = "gristmill 0.1.0"
    device: str = "cpu"
    efficiency: float = 0.84

    @property
    def bytes(self) -> int:
        return int(PARAMETERS * self.bits / 8)

    @property
    def machine(self) -> Machine:
        return GPU if self.device == "cuda" else CPU


MADE = (
    Made("f16", "f16", "f16", "none", "f16", 16.0, 0.0, 1e-7, efficiency=0.95),
    Made("int8", "int8", "int8", "rtn", "f16", 8.5, 0.0004, 0.0009, efficiency=0.91),
    Made("int4-rtn", "int4 rtn", "int4 g128", "rtn", "f16", 4.59, 0.0243, 0.031),
    Made("int4-gptq", "int4 gptq", "int4 g128", "gptq", "f16", 4.56, 0.0041, 0.0118),
    Made("int4-gptq-kv8", "int4 gptq, KV int8", "int4 g128", "gptq", "int8", 4.56, 0.0043, 0.0121),
    Made("int3-gptq", "int3 gptq", "int3 g64", "gptq", "f16", 3.62, 0.047, 0.082, efficiency=0.75),
    Made(
        "q8_0",
        "llama.cpp Q8_0",
        "Q8_0",
        "Q8_0",
        "f16",
        8.6,
        0.0006,
        0.0011,
        "llama.cpp b9000",
        efficiency=0.55,
    ),
    Made(
        "q4_0",
        "llama.cpp Q4_0",
        "Q4_0",
        "Q4_0",
        "f16",
        4.6,
        0.0213,
        0.029,
        "llama.cpp b9000",
        efficiency=0.42,
    ),
    Made(
        "int4-gptq-cuda",
        "int4 gptq",
        "int4 g128",
        "gptq",
        "f16",
        4.56,
        0.0040,
        0.0117,
        device="cuda",
        efficiency=0.62,
    ),
)
FAILED = Point(
    "int4-awq",
    "int4 awq+gptq",
    "gristmill 0.1.0",
    "cpu",
    "int4 g128",
    "awq+gptq",
    "f16",
    "failed",
    reason="the Hessian of layers.3.down is singular: give more calibration text " + HOSTILE,
    command="gristmill compile tinyllama -o int4-awq --method awq+gptq",
)


def sample_report() -> Report:
    points = tuple(_point(made) for made in MADE)
    report = Report(
        title="SAMPLE: TinyLlama-1.1B shape, accuracy against speed",
        model="tinyllama-1.1b (random weights; every figure on this page is made up)",
        created="2026-11-24T10:31:07+00:00",
        command="gristmill report tinyllama-1.1b --weights f16,int8,int4,int3 --peer llama.cpp:q4.gguf -o o",
        versions={
            "gristmill": "0.1.0",
            "python": "3.11.2",
            "numpy": "2.4.6",
            "torch": "2.13.0",
            "llama.cpp": "b9000",
        },
        machines={"cpu": CPU, "cuda": GPU},
        points=(*points[:5], FAILED, *points[5:]),
        seconds=514.2,
        remarks=("3 artifacts were there already", "peers and points were measured in turns"),
    )
    return with_dominated(report)


def _point(made: Made) -> Point:
    peer = not made.runtime.startswith("gristmill")
    return Point(
        made.id,
        made.label,
        made.runtime,
        made.device,
        made.weights,
        made.method,
        made.kv,
        "ok",
        reason="peak memory: the peer runs in a process of its own" if peer else "",
        compile_command=""
        if peer
        else f"gristmill compile tinyllama -o {made.id} --weights {made.weights[:4]}",
        command=f"gristmill bench {made.id}" + (" --device cuda" if made.device == "cuda" else ""),
        artifact=made.id.removesuffix("-cuda"),
        content_id="" if peer else f"{sum(map(ord, made.weights + made.method + made.kv)):064x}"[::-1],
        compile_seconds=None if peer else 30.5 + 3 * len(made.method),
        load_seconds=0.021 + made.bits / 200,
        accuracy=_accuracy(made),
        speed=tuple(_speeds(made)),
        latency=_latency(made),
        memory=_memory(made),
        energy=Energy(0.11 * made.bits, "NVML") if made.device == "cuda" else None,
        why=() if peer else _whys(made),
        layer_errors=() if peer or made.weights == "f16" else tuple(_layer_errors(made)),
    )


def _accuracy(made: Made) -> Accuracy:
    wide = 0.0006 + made.increase * 0.22
    return Accuracy(
        text="held_out.txt",
        text_sha256="3f" * 32,
        tokens=16384,
        window=1024,
        reference_ppl=7.913,
        ppl=7.913 * (1 + made.increase),
        ppl_increase=Interval(made.increase, made.increase - wide, made.increase + wide),
        kl=Interval(made.kl, made.kl * 0.94, made.kl * 1.07),
        kl_p99=made.kl * 11.3,
        kl_max=made.kl * 93,
        top1_agreement=1 - min(0.3, made.kl * 3.1),
        top5_agreement=1 - min(0.1, made.kl * 0.4),
        by_position=tuple(_positions(made)),
        worst=() if made.weights == "f16" else tuple(_worst(made)),
        last_word=LastWord(0.612 - made.increase, 0.588 - made.increase, 0.635 - made.increase, 1024),
    )


def _positions(made: Made) -> Iterator[PositionBin]:
    slope = 0.5 if made.kv == "int8" else 0.12
    for first in range(0, 1024, 128):
        kl = made.kl * (1.25 - 0.3 * math.exp(-first / 200) + slope * first / 1024)
        yield PositionBin(first, first + 127, 2048, kl, kl * 0.31)


def _worst(made: Made) -> Iterator[WorstToken]:
    texts = (
        (
            "The capital of the province, which lies on the left bank of the river,",
            " Lyon",
            " Paris",
            " Lyon",
        ),
        ('<b onclick="x()">bold', HOSTILE, "</td>", "\n\n"),
        ("    for i in range(n):\n", "        ", "\t", "    "),
        ("Größe: 5\u00a0km ", "é\u0301", "日本", "🙂"),
    )
    for i, (before, token, wanted, got) in enumerate(texts):
        yield WorstToken(
            made.kl * (93 - 11 * i), 212 + 97 * i, before, token, wanted, got, 0.71 - 0.1 * i, 0.021 * (i + 1)
        )


def _speeds(made: Made) -> Iterator[SpeedPoint]:
    stream, peak = made.machine.read_bytes_s * made.efficiency, _peak(made) * 0.55
    cache = LAYERS * 2 * 256 * (1 if made.kv == "int8" else 2)
    overhead = 90e-6 if made.device == "cuda" else 350e-6
    for context in (128, 512, 1024, 2048, 4096):
        yield _decode(made, context, 1, (made.bytes + cache * context) / stream + overhead)
    for sequences in (2, 4, 8, 16):
        work = sequences * 2 * PARAMETERS / peak
        yield _decode(made, 128, sequences, (made.bytes + cache * 128 * sequences) / stream + work + overhead)
    for rows in (32, 128, 512):
        seconds = (
            max(made.bytes / stream, rows * 2 * PARAMETERS / peak) + overhead + 0.1 * made.bytes / stream
        )
        yield SpeedPoint("prefill", rows, 0, 1, seconds, rows / seconds, 0.5 + rows / 5000, 7)


def _decode(made: Made, context: int, sequences: int, seconds: float) -> SpeedPoint:
    return SpeedPoint(
        "decode", 1, context, sequences, seconds, sequences / seconds, made.efficiency - 0.01 * sequences, 7
    )


def _peak(made: Made) -> float:
    return made.machine.integer_ops_s if made.weights.startswith("int") else made.machine.float_ops_s


def _latency(made: Made) -> Latency:
    token = made.bytes / (made.machine.read_bytes_s * made.efficiency)
    return Latency(
        512,
        512 * 2 * PARAMETERS / (_peak(made) * 0.5),
        token * 1.03,
        token * 1.11,
        token * (1.2 + made.bits / 40),
    )


def _memory(made: Made) -> Memory:
    resident = made.bytes + 62 * MIB
    load = 0.03 + made.bits / 60
    samples = [MemorySample(0.0, 11 * MIB, "start"), MemorySample(0.12, 58 * MIB, "start")]
    samples += [
        MemorySample(0.12 + load * i / 8, 58 * MIB + (resident - 58 * MIB) * i // 9, "load")
        for i in range(1, 9)
    ]
    samples += [MemorySample(0.2 + load + 0.1 * i, resident + 4 * MIB * i, "prefill") for i in range(6)]
    samples += [
        MemorySample(0.8 + load + 0.2 * i, resident + 21 * MIB + MIB * i, "decode") for i in range(10)
    ]
    return Memory(
        made.bytes,
        made.bits,
        22 * 2 * 256 * 2 * 4096,
        resident + 21 * MIB,
        resident + 30 * MIB,
        tuple(samples),
    )


def _whys(made: Made) -> tuple[PhaseWhy, ...]:
    phases = [
        ("decode", 1, 128, 1),
        ("decode of 8", 1, 128, 8),
        ("decode at 4096", 1, 4096, 1),
        ("prefill 512", 512, 0, 1),
    ]
    return tuple(_why(made, *phase) for phase in phases)


def _why(made: Made, name: str, rows: int, context: int, sequences: int) -> PhaseWhy:
    every = rows * sequences
    cache = LAYERS * 2 * 256 * (1 if made.kv == "int8" else 2) * sequences
    span = context + rows / 2
    kinds = (
        _kind(made, "linear", 4 * LAYERS + 1, made.bytes, int(2 * PARAMETERS * every)),
        _kind(made, f"attention {made.kv}", LAYERS, int(cache * span), int(4 * 2048 * LAYERS * span * every)),
        _kind(made, "rms_norm", 2 * LAYERS + 1, int(45 * 2048 * 8 * every), 45 * 2048 * 4 * every),
        _kind(made, "embedding", 1, 4096 * every, 0),
    )
    seconds = sum(kind.seconds for kind in kinds)
    modelled = sum(kind.modelled for kind in kinds)
    growth = (
        tuple(
            ScalePoint(
                n, kinds[0].memory_floor * 1.08 + 350e-6 + max(0, n - 8) * 2 * PARAMETERS / _peak(made)
            )
            for n in (1, 2, 4, 8, 16, 32, 64)
        )
        if name == "decode"
        else ()
    )
    verdict = kinds[0].verdict
    return PhaseWhy(
        name,
        rows,
        context,
        sequences,
        seconds,
        modelled,
        modelled / seconds - 1,
        verdict,
        f"linear {kinds[0].seconds / seconds:.0%} of it, {kinds[0].roof_share:.0%} of its {verdict} roof",
        sum(kind.overhead for kind in kinds),
        None,
        kinds,
        kinds[0].remedies,
        growth,
        made.machine.read_bytes_s,
        made.machine.float_ops_s,
        made.machine.integer_ops_s,
    )


def _kind(made: Made, kind: str, count: int, read: int, operations: int) -> KindVerdict:
    memory, compute = read / made.machine.read_bytes_s, operations / _peak(made)
    overhead = count * (1.1e-6 if made.device == "cuda" else 3.1e-6)
    modelled = max(memory, compute) + overhead
    seconds = max(memory, compute) / made.efficiency + overhead * 1.1
    bound: Bottleneck = (
        "overhead" if overhead > max(memory, compute) else ("memory" if memory >= compute else "compute")
    )
    remedies: tuple[Remedy, ...] = {
        "memory": (
            Remedy("more rows", 3.4, "8 rows read the weights once"),
            Remedy("int4 weights", 1.87, "bytes fall to 0.53"),
        ),
        "compute": (Remedy("int8 products", 4.5, "integer peak over float peak"),),
        "overhead": (Remedy("fusion", 1.3, "half the instructions"),),
    }[bound]
    return KindVerdict(
        kind,
        count,
        seconds,
        read,
        operations,
        memory,
        compute,
        overhead,
        modelled,
        modelled / seconds - 1,
        bound,
        max(memory, compute) / seconds,
        remedies,
    )


def _layer_errors(made: Made) -> Iterator[LayerError]:
    base = made.kl / 3
    for layer in range(LAYERS):
        for i, part in enumerate(PARTS):
            bump = 9.0 if (layer, part) == (2, "down") else 1.0
            error = base * bump * (1 + 0.5 * math.sin(layer * 1.7 + i)) * (1 + 0.8 * i) * (1 + layer / 15)
            yield LayerError(f"layers.{layer}.{part}", layer, part, error)
    yield LayerError("head", None, "head", base * 0.05)
