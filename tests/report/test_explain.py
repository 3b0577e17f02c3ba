"""Phases taken apart on this machine, where the verdict can be known whatever else runs on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from make_model import LLAMA
from random_artifact import RandomModel
from tiny import tiny_artifact

import gristmill
from gristmill.compiler.options import CompileOptions
from gristmill.report.explain import WhyOptions, explain, explain_session, phases
from gristmill.report.schema import PhaseWhy
from gristmill.runtime import profile
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.profile import Forward

STALL = 100_000  # nanoseconds: an instruction of the tiny model takes less than one microsecond


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("why") / "a")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roofs in no time."""
    monkeypatch.setattr(profile, "PROBE_SECONDS", 0.0)
    monkeypatch.setattr(profile, "PEAK_SECONDS", 0.0)


def test_phases_fit_into_the_session(artifact: Path) -> None:
    session = gristmill.load(artifact, threads=1, max_slots=5)
    plans = {plan.name: plan for plan in phases(session, WhyOptions(context=2))}
    assert list(plans) == ["decode", "decode at 48", "decode of 4", "prefill 16"]
    assert plans["decode"].forward == Forward(1, 2)
    assert plans["decode"].growth == tuple(Forward(1, 2, n) for n in (1, 2, 4))
    assert plans["decode at 48"].series == (Forward(1, 24), Forward(1, 48, 2))
    assert plans["prefill 16"].growth == (Forward(4), Forward(8), Forward(16))
    alone = gristmill.load(artifact, threads=1, max_slots=1)
    assert [plan.name for plan in phases(alone, WhyOptions(context=2))] == [
        "decode",
        "decode at 48",
        "prefill 16",
    ]


def test_a_phase_is_the_sum_of_its_kinds(artifact: Path, quick: None) -> None:
    found = explain(artifact, WhyOptions(context=2, threads=1, seconds=0.01, batch=2))
    assert [phase.name for phase in found] == ["decode", "decode at 48", "decode of 2", "prefill 16"]
    for phase in found:
        assert sum(kind.count for kind in phase.kinds) == 7
        assert sum(kind.seconds for kind in phase.kinds) <= phase.seconds
        assert phase.communication is None and phase.read_bytes_s > 0
        assert phase.error == pytest.approx(phase.modelled / phase.seconds - 1)
        assert 0 <= phase.overhead <= phase.seconds
        for kind in phase.kinds:
            assert 0 <= kind.overhead <= kind.seconds
            assert kind.modelled == max(kind.memory_floor, kind.compute_floor) + kind.overhead
    decode = found[0]
    assert [point.rows for point in decode.growth] == [1, 2] and decode.growth[0].seconds == decode.seconds
    assert [point.rows for point in found[-1].growth] == [4, 8, 16]


def test_a_busy_wait_is_overhead(artifact: Path, quick: None) -> None:
    session = gristmill.load(artifact, threads=1, max_slots=3)
    options = WhyOptions(context=2, batch=2, seconds=0.05)
    session.executor.stall(STALL)  # type: ignore[attr-defined]
    for phase in explain_session(session, options):
        assert phase.verdict == "overhead", phase
        assert {kind.verdict for kind in phase.kinds} == {"overhead"}, phase
        assert phase.overhead == pytest.approx(7 * STALL / 1e9, rel=0.5)
    session.executor.stall(0)  # type: ignore[attr-defined]
    assert explain_session(session, options)[0].seconds < 7 * STALL / 1e9


def test_a_busy_wait_changes_no_bit(artifact: Path) -> None:
    session = gristmill.load(artifact, threads=2)
    before = session.forward([5, 6, 7], [0, 1, 2], [0, 0, 0])
    session.executor.stall(STALL)  # type: ignore[attr-defined]
    assert (session.forward([5, 6, 7], [0, 1, 2], [0, 0, 0]) == before).all()
    with pytest.raises(GristmillError, match="stall: got -1 ns"):
        session.executor.stall(-1)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """46 million parameters in f32: 184 MB, more than caches hold."""
    config = {
        **LLAMA, "vocab_size": 1000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 256,
        "rope_theta": 1e4, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    out = tmp_path_factory.mktemp("wide") / "f32"
    return RandomModel("wide", config).write(out, CompileOptions.of(weights="f32", max_tokens=128))


def test_weights_bound_a_decode_and_operations_a_prefill(wide: Path, quick: None) -> None:
    """A token of f32 weights needs half an operation for each byte, a chunk of 64 tokens 32."""
    found = explain(wide, WhyOptions(batch=2, prompt=64, long_context=100, seconds=0.03))
    verdicts = {phase.name: phase.verdict for phase in found}
    assert verdicts["decode"] == "memory" and verdicts["prefill 64"] == "compute", found
    decode, prefill = found[0], found[-1]
    assert decode.kinds[0].kind.startswith("linear") and decode.kinds[0].verdict == "memory"
    assert prefill.kinds[0].kind.startswith("linear") and prefill.kinds[0].verdict == "compute"
    gains = {remedy.name: remedy.gain for remedy in decode.remedies}
    assert gains["int4 weights"] > gains["int8 weights"] > 2
    assert gains_of(prefill)["int8 weights"] > 1.5, "integers are multiplied faster here"


def gains_of(phase: PhaseWhy) -> dict[str, float]:
    return {remedy.name: remedy.gain for remedy in phase.remedies}


@pytest.mark.parametrize("given, message", [({"context": 0}, "context is 0"), ({"prompt": 1}, "prompt is 1")])
def test_options_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        WhyOptions(**given)


def test_waiting_for_another_rank_is_communication(
    artifact: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gristmill.runtime.parallel.exchange import Group

    add = Group.sum

    def late(group: Group, part: Any) -> int:
        time.sleep(0.03)  # far more than a busy machine takes for the rest
        return add(group, part)

    monkeypatch.setattr(Group, "sum", late)
    options = WhyOptions(context=2, threads=2, seconds=0.01, batch=2, tensor_parallel=2)
    for phase in explain(artifact, options):
        assert phase.verdict == "communication", phase
        assert phase.communication is not None and phase.communication > 0.005
        assert sum(kind.count for kind in phase.kinds) == 7
        assert "transfers between ranks" in phase.reason
