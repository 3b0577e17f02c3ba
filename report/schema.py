"""report.json: every number that a page shows, as frozen dataclasses.

Seconds, bytes, and operations (a multiply-add counts as two) unless a name says otherwise; shares and
relative increases are fractions (0.01: one percent). What was not measured is None, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gristmill.compiler.statistics import Interval

FORMAT = 1
Bottleneck = Literal["compute", "memory", "communication", "overhead"]


@dataclass(frozen=True)
class Machine:
    """Where it was measured. read_bytes_s, float_ops_s, integer_ops_s: the roofs, measured in this run."""

    name: str
    cores: int
    threads: int
    memory_bytes: int
    isa: str
    system: str
    read_bytes_s: float
    float_ops_s: float
    integer_ops_s: float


@dataclass(frozen=True)
class PositionBin:
    """Means over the scored tokens at positions first to last of their window (that many tokens before
    them)."""

    first: int
    last: int
    tokens: int
    kl: float
    nll_increase: float


@dataclass(frozen=True)
class WorstToken:
    """One of the tokens that diverge most: the text before it, what came, what either model preferred, and
    the probability it gave that choice of its own. position: tokens before it in its window."""

    kl: float
    position: int
    before: str
    token: str
    reference_choice: str
    choice: str
    reference_probability: float
    probability: float


@dataclass(frozen=True)
class LastWord:
    accuracy: float
    low: float
    high: float
    passages: int


@dataclass(frozen=True)
class Accuracy:
    """Against the float model on the same tokens; kl is KL(float || artifact) in nats per token.

    top5_agreement: how often the float model's most likely token is among the artifact's five; reference:
    what stood for the float model.
    """

    text: str
    text_sha256: str
    tokens: int
    window: int
    reference_ppl: float
    ppl: float
    ppl_increase: Interval
    kl: Interval
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top5_agreement: float
    by_position: tuple[PositionBin, ...] = ()
    worst: tuple[WorstToken, ...] = ()
    last_word: LastWord | None = None
    reference: str = ""


@dataclass(frozen=True)
class SpeedPoint:
    """A forward of `rows` new positions in each of `sequences` slots that hold `context` others.

    tokens_s: of all sequences together; roof_share: of the least time that bytes and operations allow.
    """

    phase: Literal["prefill", "decode"]
    rows: int
    context: int
    sequences: int
    seconds: float
    tokens_s: float
    roof_share: float | None
    rounds: int


@dataclass(frozen=True)
class Latency:
    """Of a generation as a caller sees it. prompt: tokens."""

    prompt: int
    first_token: float
    inter_token_p50: float
    inter_token_p95: float
    inter_token_p99: float


@dataclass(frozen=True)
class MemorySample:
    """seconds: since the process began; stage: what ran then (start, load, prefill, decode)."""

    seconds: float
    resident_bytes: int
    stage: str


@dataclass(frozen=True)
class Memory:
    artifact_bytes: int
    bits_per_weight: float | None
    kv_bytes: int | None
    resident_bytes: int | None
    peak_bytes: int | None
    over_time: tuple[MemorySample, ...] = ()


@dataclass(frozen=True)
class Energy:
    """joules_per_token: while decoding one sequence; source: RAPL or NVML."""

    joules_per_token: float
    source: str


@dataclass(frozen=True)
class Remedy:
    """gain: predicted factor on the phase's speed by the model, 1.0 none; rule: how it was computed."""

    name: str
    gain: float
    rule: str


@dataclass(frozen=True)
class KindVerdict:
    """All instructions of one kind in one forward.

    modelled = max(bytes / read stream, operations / peak) + overhead; error = modelled / measured - 1.
    """

    kind: str
    count: int
    seconds: float
    bytes: int
    operations: int
    memory_floor: float
    compute_floor: float
    overhead: float
    modelled: float
    error: float
    verdict: Bottleneck
    roof_share: float
    remedies: tuple[Remedy, ...] = ()

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class ScalePoint:
    """The seed's test of overhead: the same instruction or forward with more work."""

    rows: int
    seconds: float


@dataclass(frozen=True)
class PhaseWhy:
    """Why one phase is as fast as it is. name: "decode", "prefill 512", "decode at 4096", ...

    communication: seconds between ranks or over PCIe, None on one device. growth: the same forward with
    more and more rows: time that does not grow with the work is overhead. read_bytes_s, float_ops_s,
    integer_ops_s: the roofs it is held to; the read stream is measured over as many bytes as the forward
    reads, since a small model stays in the processor's caches.
    """

    name: str
    rows: int
    context: int
    sequences: int
    seconds: float
    modelled: float
    error: float
    verdict: Bottleneck
    reason: str
    overhead: float
    communication: float | None
    kinds: tuple[KindVerdict, ...]
    remedies: tuple[Remedy, ...] = ()
    growth: tuple[ScalePoint, ...] = ()
    read_bytes_s: float = 0.0
    float_ops_s: float = 0.0
    integer_ops_s: float = 0.0


@dataclass(frozen=True)
class LayerError:
    """Relative squared error of one weight matrix, or of its outputs where the method measured those."""

    name: str
    layer: int | None
    part: str
    error: float


@dataclass(frozen=True)
class Point:
    """One configuration on one device. runtime: "gristmill" or a peer's name with version.

    reason: why it failed, or of a point that is ok, what was not measured and why. command repeats its
    figures, compile_command makes its artifact.
    """

    id: str
    label: str
    runtime: str
    device: str
    weights: str
    method: str
    kv: str
    status: Literal["ok", "failed"]
    reason: str = ""
    command: str = ""
    artifact: str = ""
    content_id: str = ""
    compile_seconds: float | None = None
    load_seconds: float | None = None
    accuracy: Accuracy | None = None
    speed: tuple[SpeedPoint, ...] = ()
    latency: Latency | None = None
    memory: Memory | None = None
    energy: Energy | None = None
    why: tuple[PhaseWhy, ...] = ()
    layer_errors: tuple[LayerError, ...] = ()
    compile_command: str = ""


@dataclass(frozen=True)
class Report:
    """command repeats all of it; versions: of packages; created: ISO date and time, UTC.

    readings: the sentence under each picture and the page's first ones; derived: what the page works out from
    the rest, by the place where it stands. Both are filled in where the page is written. remarks: how it was
    measured, what was reused.
    """

    title: str
    model: str
    created: str
    command: str
    versions: dict[str, str]
    machines: dict[str, Machine]  # by device
    points: tuple[Point, ...]
    dominated: dict[str, tuple[str, ...]] = field(default_factory=dict)  # "speed", "size" -> ids of points
    seconds: float = 0.0
    readings: dict[str, str] = field(default_factory=dict)
    derived: dict[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    format: int = FORMAT
