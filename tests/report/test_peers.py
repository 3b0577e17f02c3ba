"""A peer is asked in a process of its own; what it answers becomes figures, what it lacks is left out."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_artifact

from gristmill.report import peer_measures
from gristmill.report.merge import merge_rounds
from gristmill.report.peers import commands, other_peers, peer_process
from gristmill.report.peers.peer_process import Peer, PeerStopped, command_of
from gristmill.report.reference import reference_from_artifact
from gristmill.runtime.evaluation import window_logits
from gristmill.runtime.session import load


def clockwork(ids: list[int], count: int) -> list[float]:
    """A second for 128 tokens of a prompt and then one for each token: exact in binary."""
    return [len(ids) / 128 + i for i in range(count)]


def test_one_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = other_peers.measure(clockwork, 512, 16, 4)
    assert found == {"prefill_tok_s": 128.0, "decode_tok_s": 1.0, "first_s": 4.0, "token_s": [1.0] * 4}
    with pytest.raises(RuntimeError, match="gave 1 tokens, expected 5"):
        other_peers.measure(lambda ids, count: clockwork(ids, 1), 512, 16, 4)
    loaded = other_peers.Loaded(clockwork)
    monkeypatch.setitem(other_peers.ENGINES, "openvino", ("click", lambda model, threads: loaded))
    (tmp_path / "weights").write_bytes(b"12345")
    commands.main(["time", "openvino", str(tmp_path), "--prompt", "50"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["version"].startswith("click ") and printed["prompt"] == 50 and printed["bytes"] == 5
    assert (printed["prefill_tok_s"], printed["decode_tok_s"]) == (128.0, 1.0)


def test_a_peer_that_stops_says_so() -> None:
    with pytest.raises(PeerStopped, match="stopped with exit code 3"):
        Peer([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(PeerStopped, match="exit code 1: ValueError: no such model"):
        Peer([sys.executable, "-c", "raise ValueError('no such model')"])
    with pytest.raises(PeerStopped, match="cannot be started"):
        Peer(["/no/such/python"])
    begun = Peer([sys.executable, "-c", "print('{}', flush=True); raise SystemExit(3)"])
    begun.process.wait()
    with pytest.raises(PeerStopped, match="stopped with exit code 3"):
        begun.measure(1, 1, 1)
    begun.close()


def test_the_folder_runs_by_a_python_without_gristmill(tmp_path: Path) -> None:
    start = (
        'import runpy, sys; sys.modules["gristmill"] = None; sys.argv = sys.argv[1:]; '
        'runpy.run_path(sys.argv[0], run_name="__main__")'
    )
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -I -c '{start}' \"$@\"\n")
    python.chmod(0o755)
    peer_folder = command_of("x")[1]
    assert peer_folder == str(Path(peer_process.__file__).resolve().parent)
    with pytest.raises(
        PeerStopped, match="exit code 1: ModuleNotFoundError: No module named 'openvino_genai'"
    ):
        Peer(command_of(str(python), "serve", "openvino", str(tmp_path)))


def test_logits_come_as_a_file(tmp_path: Path) -> None:
    code = """
import sys
sys.path.append(sys.argv[1])
import numpy as np
from peers.peer_process import Engine, own_stdout, serve
out = own_stdout()
print("chatter of a library")
def write(ids, out):
    np.save(out, np.float32(np.outer(ids, [1, 2])))
serve(Engine({"version": "x"}, None, write), out)
"""
    peer = Peer([sys.executable, "-c", code, str(Path(peer_process.__file__).parents[1])])
    try:
        assert peer.about == {"version": "x", "logits": True}
        assert peer.ask({"logits": [3, 4], "out": str(tmp_path / "l.npy")}) == {}
        np.testing.assert_array_equal(np.load(tmp_path / "l.npy"), [[3, 6], [4, 8]])
        memory = peer.ask({"memory": True})
        assert memory["peak_bytes"] >= memory["resident_bytes"] > 1 << 20
    finally:
        peer.close()


ENGINE = """
import sys
sys.path.append(sys.argv[1])
import numpy as np
from peers.peer_process import Engine, serve, speeds
calls = []
def measure(prompt, context, tokens):  # the first of a kind is slow, as if something had to warm up
    slow = 10 if (prompt, context) not in calls else 1
    calls.append((prompt, context))
    return speeds(prompt, slow * prompt / 1000, [slow * (1 + context / 1000) / 100] * tokens)
def logits(ids, out):
    np.save(out, np.eye(8, dtype=np.float32)[np.array(ids) % 8])
about = {"version": "engine 1.0", "load_s": 0.5, "bytes": 1000, "bits_per_weight": 4.5}
serve(Engine(about, measure, logits))
"""


def test_figures_of_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(Path(peer_process.__file__).parents[1])
    monkeypatch.setattr(peer_measures, "command_of", lambda *given: [sys.executable, "-c", ENGINE, folder])
    peer = peer_measures.Peer("llama.cpp", "q4_0.gguf", sys.executable, 2)
    shapes = {
        "prompts": [128],
        "contexts": [16, 100],
        "latency_prompt": 16,
        "latency_tokens": 4,
        "seconds": 1e-3,
    }
    found = merge_rounds([peer_measures.measure_speed(peer, shapes)] * 3)
    assert [(p.phase, p.rows, p.context, p.sequences) for p in found.points] == [
        ("prefill", 128, 0, 1), ("decode", 1, 16, 1), ("decode", 1, 100, 1),
    ]  # fmt: skip
    assert [round(p.tokens_s, 3) for p in found.points] == [1000.0, 98.425, 90.909]
    assert {p.rounds for p in found.points} == {3} and found.load_seconds == 0.5 and found.machine is None
    assert found.memory and found.memory.artifact_bytes == 1000 and found.memory.bits_per_weight == 4.5
    assert found.latency and found.latency.inter_token_p50 == pytest.approx(0.01016)
    assert found.version == "engine 1.0"


def test_accuracy_of_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that gives the reference's own logits agrees with it in everything."""
    path = tiny_artifact(tmp_path / "a")
    reference = reference_from_artifact(path, tmp_path / "r", "text", "some text to be scored " * 20)
    session = load(path, threads=1)

    class Echo:
        def ask(self, request: dict[str, Any]) -> dict[str, Any]:
            with session.slot() as slot:
                found = np.concatenate(
                    [piece for _, piece in window_logits(session, request["logits"], slot)]
                )
            np.save(request["out"], found)
            return {}

    monkeypatch.setattr(peer_measures, "running", lambda *given, **how: contextlib.nullcontext(Echo()))
    peer = peer_measures.Peer("llama.cpp", "q4_0.gguf", sys.executable, 2)
    found = peer_measures.measure_accuracy(peer, str(reference.folder), session.tokenizer)
    assert found.kl.estimate == 0.0 and found.ppl == found.reference_ppl and found.top1_agreement == 1.0
