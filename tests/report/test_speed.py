"""What is measured of speed, memory and energy, on a model of one layer; no test asks how fast."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_artifact

import gristmill
from gristmill.report import energy, speed
from gristmill.report.energy import Rapl, Smi, measure_energy, rapl_meter
from gristmill.report.explain import WhyOptions, explain_session
from gristmill.report.forwards import filled_slot, floor_seconds, read_bytes
from gristmill.report.memory import MemoryOptions, measure_memory
from gristmill.report.schema import Energy
from gristmill.report.speed import (
    SpeedOptions,
    fitting_batches,
    machine_of,
    measure_latency,
    measure_speed,
    points_of,
)
from gristmill.runtime import machine, profile
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.footprint import kv_bytes
from gristmill.runtime.profile import Forward, Roofs, collect, held_slots
from gristmill.runtime.report import read_program

QUICK: dict[str, Any] = {"seconds": 0.0, "rounds": 2, "budget": 60.0, "threads": 1, "latency_tokens": 8}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 positions, 16 rows at once."""
    return tiny_artifact(tmp_path_factory.mktemp("speed") / "a")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roofs in no time."""
    monkeypatch.setattr(profile, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(profile, "PEAK_SECONDS", 0.0)
    monkeypatch.setattr(speed, "STREAM_BYTES", 4 << 20)


def test_points_fit_into_the_session(artifact: Path) -> None:
    session = gristmill.load(artifact, threads=1, max_slots=5)
    options = SpeedOptions(prompts=(8, 16, 100), contexts=(4, 32, 4096), batches=(1, 2, 4))
    found = points_of(session, options)
    prefill = [forward for phase, forward in found if phase == "prefill"]
    decode = [forward for phase, forward in found if phase == "decode"]
    assert prefill == [Forward(8), Forward(16), Forward(64), Forward(16, 32), Forward(16, 48)]
    assert decode[:3] == [Forward(1, 4, batch) for batch in (1, 2, 4)]
    assert decode[3:] == [Forward(1, context, batch) for context in (32, 48) for batch in (1, 4)]


def test_all_is_measured(artifact: Path, quick: None) -> None:
    found = measure_speed(artifact, SpeedOptions(prompts=(8, 40), contexts=(4, 40), batches=(1, 3), **QUICK))
    assert [p.rounds for p in found.points] == [2] * len(found.points)
    for point in found.points:
        assert point.tokens_s == pytest.approx(point.rows * point.sequences / point.seconds)
        assert point.roof_share is not None and point.roof_share > 0
    assert {p.phase for p in found.points} == {"prefill", "decode"}
    latency, memory = found.latency, found.memory
    assert latency is not None and latency.prompt == 56 and latency.first_token > 0
    assert 0 < latency.inter_token_p50 <= latency.inter_token_p95 <= latency.inter_token_p99
    assert memory.artifact_bytes == sum(file.stat().st_size for file in artifact.iterdir()) - manifest(
        artifact
    )
    assert memory.bits_per_weight == 32 and memory.kv_bytes == kv_bytes(read_program(artifact)[1], 64, 4)
    assert memory.resident_bytes and memory.peak_bytes and memory.peak_bytes >= memory.resident_bytes
    assert found.load_seconds > 0 and found.threads == 1 and found.isa
    about = machine_of(found)
    assert about.read_bytes_s == found.roofs.stream and about.memory_bytes > 1 << 28 and about.name


def manifest(artifact: Path) -> int:
    """Bytes of what the manifest cannot account for: itself."""
    return (artifact / "manifest.json").stat().st_size


def test_rounds_end_with_the_budget(artifact: Path, quick: None) -> None:
    options = SpeedOptions(
        prompts=(8,), contexts=(4,), batches=(1,), memory=False, **{**QUICK, "budget": 0.0, "rounds": 50}
    )
    found = measure_speed(artifact, options)
    assert [point.rounds for point in found.points] == [1, 1]
    assert found.memory.resident_bytes is None and found.memory.over_time == ()


def test_batches_that_do_not_fit_are_left_out(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = read_program(artifact)[1]
    options = SpeedOptions(batches=(1, 2, 4, 64))
    assert fitting_batches(artifact, options) == (1, 2, 4), "64 rows are more than one forward takes"
    room = kv_bytes(program, 64, 3) + program.arena_bytes
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: int(room / speed.SPARE) + 64)
    assert fitting_batches(artifact, options) == (1, 2)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 1)
    assert fitting_batches(artifact, options) == (1,)


def test_latency_starts_anew_each_time(artifact: Path) -> None:
    session = gristmill.load(artifact, threads=1)
    measure_latency(session, SpeedOptions(latency_prompt=20, latency_tokens=12, rounds=3))
    statistics = session.statistics
    assert statistics.requests == 4 and statistics.reused_tokens == 0


def test_contexts_are_copied(artifact: Path) -> None:
    """Slots filled from another give the logits that those filled anew give."""
    session = gristmill.load(artifact, threads=1)
    with filled_slot(session, 40) as filled:
        assert filled is not None
        with held_slots(session, 30, 2, filled) as copied:
            found = session._run(*row(7, 30, copied[1]))
    with held_slots(session, 30, 1) as slots:
        expected = session._run(*row(7, 30, slots[0]))
    assert (found == expected).all()
    with filled_slot(session, 1) as none:
        assert none is None


def row(token: int, position: int, slot: int) -> Any:
    return tuple(np.array([value], np.int32) for value in (token, position, slot, 0))


def test_a_windows_ring_is_not_copied_past(tmp_path: Path) -> None:
    """The ring has moved on, so the slot is filled anew."""
    session = gristmill.load(tiny_artifact(tmp_path / "a", window=8), threads=1)
    with filled_slot(session, 60) as filled, held_slots(session, 20, 1, filled) as slots:
        found = session._run(*row(7, 20, slots[0]))
    with held_slots(session, 20, 1) as slots:
        assert (found == session._run(*row(7, 20, slots[0]))).all()


def test_a_sliding_window_is_rolled_back_while_it_reaches(tmp_path: Path, quick: None) -> None:
    """A window of 8 rows with 16 more: in as many milliseconds it has long moved on."""
    session = gristmill.load(tiny_artifact(tmp_path / "a", window=8, max_len=256), threads=1)
    options = SpeedOptions(prompts=(16, 200), contexts=(4, 100), batches=(1, 2), seconds=0.02, rounds=2)
    plan = points_of(session, options)
    points, _ = speed.measure_points(session, plan, options, profile.probe_of(session))
    assert len(points) == len(plan) == 7
    assert [phase.name for phase in explain_session(session, WhyOptions(seconds=0.01, batch=2))]


def test_the_floor_of_a_prompt_is_that_of_its_chunks(artifact: Path) -> None:
    session, roofs = gristmill.load(artifact, threads=1), Roofs(100.0, 1000.0, 4000.0)
    zeros = [0.0] * len(session.program.instructions)

    def floor(forward: Forward) -> float:
        return sum(kind.floor for kind in collect(session.program, zeros, roofs, forward))

    expected = floor(Forward(16, 3)) + floor(Forward(16, 19)) + floor(Forward(8, 35))
    assert floor_seconds(session, roofs, Forward(40, 3)) == pytest.approx(expected)
    weights = session.executor.weight_bytes_per_token
    assert read_bytes(session.program, Forward(1, 9)) == weights + 10 * session.program.caches[0].row_bytes()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"prompts": ()}, "prompts is empty"), ({"batches": (0,)}, "batches is 0, expected 1 or more"),
        ({"rounds": 0}, "rounds is 0"), ({"seconds": -1.0}, "seconds is -1.0, expected 0"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        SpeedOptions(**given)


def test_memory_over_time(artifact: Path) -> None:
    found = measure_memory(artifact, MemoryOptions(threads=1, prompt=20, tokens=8)).memory
    stages = [sample.stage for sample in found.over_time]
    times = [sample.seconds for sample in found.over_time]
    order = ["start", "load", "prefill", "decode"]
    assert stages[0] == "start" and [order.index(s) for s in stages] == sorted(order.index(s) for s in stages)
    assert times == sorted(times) and times[0] < 1
    assert found.peak_bytes and max(s.resident_bytes for s in found.over_time) <= found.peak_bytes + (1 << 20)
    assert len(stages) <= 201


def test_an_artifact_that_does_not_load_says_why(artifact: Path) -> None:
    with pytest.raises(GristmillError, match=r"of its own failed: max_len is 100000, expected .* to 256"):
        measure_memory(artifact, MemoryOptions(max_len=100000))
    with pytest.raises(GristmillError, match="missing; expected an artifact directory"):
        measure_memory(artifact / "nowhere")


def domain(root: Path, name: str, energy_uj: int) -> Path:
    folder = root / name
    folder.mkdir()
    for file, text in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", 10_000_000)):
        (folder / file).write_text(f"{text}\n")
    return folder


def test_joules_of_all_packages(tmp_path: Path) -> None:
    """One counter begins again at 0 meanwhile; neither parts of a package nor its other interface count."""
    packages = [domain(tmp_path, "package-0", 1_000_000), domain(tmp_path, "package-1", 9_000_000)]
    domain(tmp_path, "core", 5)
    (domain(tmp_path, "package-0-again", 1_000_000) / "name").write_text("package-0\n")
    meter = rapl_meter(tmp_path)
    assert isinstance(meter, Rapl)
    meter.begin()
    (packages[0] / "energy_uj").write_text("3000000\n")
    (packages[1] / "energy_uj").write_text("500000\n")
    assert meter.end() == pytest.approx(2 + 1.5)


def test_without_counters_there_is_no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rapl_meter(tmp_path) is None
    (tmp_path / "package-0").mkdir()
    (tmp_path / "package-0" / "name").write_text("package-0\n")
    assert rapl_meter(tmp_path) is None, "the counter cannot be read"
    monkeypatch.setattr(energy, "rapl_meter", lambda: None)
    assert measure_energy(lambda: 1) is None


def test_joules_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counter:
        source = "RAPL"

        def begin(self) -> None:
            self.worked = False

        def end(self) -> float:
            return 12.0

    monkeypatch.setattr(energy, "rapl_meter", Counter)
    assert measure_energy(lambda: 48) == Energy(0.25, "RAPL")


def test_power_over_time(tmp_path: Path) -> None:
    """A program that says what nvidia-smi says."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '[N/A]'; echo 100.0; echo 300.0; exec sleep 60\n")
    os.chmod(program, 0o755)
    meter = Smi(str(program), "GPU-0")
    meter.begin()
    deadline = time.monotonic() + 30
    while len(meter._watts) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    meter._began -= 10
    assert 2000 < meter.end() < 4000
    assert meter._process.returncode is not None
