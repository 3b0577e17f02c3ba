"""A sweep measures what is missing, goes on where it was killed, and makes rows of what fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fake_tasks
import pytest
from tiny import tiny_artifact

from gristmill.report.identity import digest
from gristmill.report.peer_measures import Peer
from gristmill.report.pieces import Pieces
from gristmill.report.subjects import repeat_command
from gristmill.report.sweep import run_sweep
from gristmill.report.sweep_options import SweepOptions
from gristmill.report.watch import Lines
from gristmill.runtime.errors import GristmillError

JOBS = 3 + 1 + 3 + 2 * 3 + 3  # artifacts, the float model, accuracies, rounds of speed, reasons


def patched(monkeypatch: pytest.MonkeyPatch, folder: Path, **broken: str) -> None:
    fake_tasks.install(monkeypatch.setattr, fake_tasks.FakeTasks(folder / "log", broken=broken))


def test_all_is_measured_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, tmp_path)
    report = fake_tasks.run(tmp_path)
    kinds = [line.split()[0] for line in fake_tasks.log_of(tmp_path)]
    compiled, measured = kinds[:4], kinds[4:]
    assert compiled == ["compile_model", "compile_model", "change_cache", "reference"], (
        "one calibration for both"
    )
    assert measured == ["accuracy"] * 3 + ["speed"] * 6 + ["why"] * 3
    speeds = [line.split()[1] for line in fake_tasks.log_of(tmp_path) if line.startswith("speed")]
    assert speeds[:3] == speeds[3:], "rounds go through all points"
    assert [point.id for point in report.points] == [
        "f16-kv-f16-cpu",
        "int4-gptq-kv-f16-cpu",
        "int4-gptq-kv-int8-cpu",
    ]
    point = report.points[1]
    assert (point.status, point.reason, point.compile_seconds) == ("ok", "", 1.5)
    assert [s.rounds for s in point.speed] == [2, 2] and report.machines["cpu"].name == "made up"
    assert point.command.split() == [
        "gristmill", "report", str(tmp_path / "model"), "--weights", "int4", "--methods", "gptq",
        "--kv", "f16",
        "--devices", "cpu", "--rounds", "2", "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    assert "--weights int4 --method gptq --kv f16 --samples 64" in point.compile_command
    assert report.dominated["speed"] == report.dominated["size"] == ()


def test_a_second_run_measures_speed_and_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, tmp_path)
    fake_tasks.run(tmp_path)
    (tmp_path / "log").unlink()
    again = fake_tasks.run(tmp_path)
    assert Counter(line.split()[0] for line in fake_tasks.log_of(tmp_path)) == {"speed": 6, "why": 3}
    assert any("3 accuracies are from an earlier run" in remark for remark in again.remarks)
    assert [p.compile_seconds for p in again.points] == [1.5] * 3
    (tmp_path / "log").unlink()
    fake_tasks.run(tmp_path, fresh=True)
    counts = Counter(line.split()[0] for line in fake_tasks.log_of(tmp_path))
    assert counts == {"accuracy": 3, "speed": 6, "why": 3}
    (tmp_path / "log").unlink()
    fake_tasks.run(tmp_path, reuse_speed=True)
    assert fake_tasks.log_of(tmp_path) == []


def test_what_changes_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, tmp_path)
    fake_tasks.run(tmp_path)
    (tmp_path / "log").unlink()
    text = tmp_path / "text.txt"
    text.write_text("held text")
    fake_tasks.run(tmp_path, text=text, reuse_speed=True, configurations=fake_tasks.CONFIGURATIONS[:1])
    assert [line.split()[0] for line in fake_tasks.log_of(tmp_path)] == ["reference"], (
        "the fake's name is the same"
    )
    (tmp_path / "log").unlink()
    fake_tasks.run(tmp_path, samples=32, reuse_speed=True)
    calibrated = [
        line for line in fake_tasks.log_of(tmp_path) if line.split()[0] in ("compile_model", "change_cache")
    ]
    assert len(calibrated) == 2, "f16 is not calibrated"
    (tmp_path / "log").unlink()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(fake_tasks, "model", lambda folder: folder / "model")
    fake_tasks.run(tmp_path, reuse_speed=True)
    assert sum("compile" in line or "change" in line for line in fake_tasks.log_of(tmp_path)) == 3


@pytest.mark.parametrize("ended", [0, 1, 3, 5, 9, 14])
def test_a_killed_sweep_goes_on(tmp_path: Path, ended: int) -> None:
    """Killed outright after so many tasks have ended: none is done twice but the one that was running."""
    command = [sys.executable, fake_tasks.__file__, str(tmp_path), "0.05"]
    path = os.pathsep.join(p for p in sys.path if p)
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
    fake_tasks.model(tmp_path)
    until = time.monotonic() + 60
    while len(fake_tasks.log_of(tmp_path)) < ended or not (tmp_path / "out").exists():
        assert child.poll() is None and time.monotonic() < until, child.stderr and child.stderr.read()
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert child.stderr
    child.stderr.close()
    before = len(fake_tasks.log_of(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patched(patch, tmp_path)
        report = fake_tasks.run(tmp_path)
    assert [point.status for point in report.points] == ["ok"] * 3
    done = fake_tasks.log_of(tmp_path)
    assert JOBS <= len(done) <= JOBS + 1, (before, done)


def test_a_failing_point_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, tmp_path, compile_model="int4")
    report = fake_tasks.run(tmp_path)
    assert [p.status for p in report.points] == ["ok", "failed", "failed"], (
        "the cache needs what did not compile"
    )
    assert report.points[1].reason == "compile: its process ended by SIGSEGV"
    assert report.points[1].speed == () and report.points[1].accuracy is None
    kinds = Counter(line.split()[0] for line in fake_tasks.log_of(tmp_path))
    assert kinds["accuracy"] == 1 and kinds["speed"] == 2
    patched(monkeypatch, tmp_path)
    assert [p.status for p in fake_tasks.run(tmp_path).points] == ["ok"] * 3, "the next run tries again"


def test_what_fails_later_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, tmp_path, speed="f16-kv", why="int8")
    first, second, third = fake_tasks.run(tmp_path).points
    assert first.status == "failed" and first.accuracy and first.reason.startswith("speed: its process")
    assert second.status == "ok" and second.reason == ""
    assert third.status == "ok" and third.speed and third.reason.startswith("why: its process")


def test_peers_are_measured_in_the_same_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, tmp_path)
    gguf = tmp_path / "q4_0.gguf"
    gguf.write_bytes(b"GGUF")
    peer = Peer("openvino", str(tmp_path / "model"), sys.executable, 2)
    report = fake_tasks.run(tmp_path, peers=(peer,))
    order = [line.split()[0] for line in fake_tasks.log_of(tmp_path) if "speed" in line]
    assert order == ["speed"] * 3 + ["peer_speed"] + ["speed"] * 3 + ["peer_speed"]
    point = report.points[-1]
    assert point.runtime == "openvino (engine 1.0)" and point.accuracy is None and point.status == "ok"
    assert "no logits" in point.reason and report.versions["engine"] == "1.0"
    assert f"--peer openvino:{tmp_path / 'model'}" in point.command
    (tmp_path / "log").unlink()
    fake_tasks.run(tmp_path, peers=(replace(peer, threads=1),), reuse_speed=True)
    assert [line.split()[0] for line in fake_tasks.log_of(tmp_path)] == ["peer_speed"] * 2, "other threads"


def test_the_command_of_a_gpu_point_can_be_run(tmp_path: Path) -> None:
    options = SweepOptions(tmp_path / "out", str(tmp_path), devices=("cpu", "cuda"), threads=3)
    assert "--threads 3" in repeat_command(options, ["model"], [], "cpu")
    assert "--threads" not in repeat_command(options, ["model"], [], "cuda"), "refused there"


def test_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, tmp_path)

    def write(*given: object, **how: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("json.dump", write)
        with pytest.raises(GristmillError, match="No space left on device.*it goes on"):
            fake_tasks.run(tmp_path)
    assert not list((tmp_path / "out" / "work").glob(".*.tmp"))
    failing = fake_tasks.FakeTasks(
        tmp_path / "log", broken={"accuracy": "f16"}, reason="No space left on device"
    )
    with monkeypatch.context() as patch:
        fake_tasks.install(patch.setattr, failing)
        with pytest.raises(GristmillError, match="the disk is full"):
            fake_tasks.run(tmp_path)
    assert fake_tasks.run(tmp_path).points[0].accuracy
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(GristmillError, match="artifacts take about .* MiB, 1 are free"):
        fake_tasks.run(tmp_path, samples=8)


def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path / "out" / "work")
    with pytest.raises(GristmillError, match="out: another report is being made there"):
        Pieces(tmp_path / "out" / "work", patience=0)
    child = subprocess.Popen(["sleep", "0.5"], close_fds=False)
    pieces.close()
    with pytest.raises(GristmillError, match="another report"):  # its last task still runs
        Pieces(tmp_path / "out" / "work", patience=0)
    Pieces(tmp_path / "out" / "work").close()
    child.wait()


def test_pieces_are_whole_or_not_there(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path)
    key = {"content": "abc", "round": 1}
    assert pieces.get("speed", key) is None
    pieces.put("speed", key, {"x": (1, 2)}, 3.0)
    found = pieces.get("speed", key)
    assert found and found.value == {"x": [1, 2]} and found.seconds == 3.0
    assert pieces.get("speed", key | {"round": 2}) is pieces.get("why", key) is None
    assert pieces.get("speed", key, since=time.time() + 1) is None
    assert pieces.seconds("speed") == [3.0]
    path = next(tmp_path.glob("speed-*.json"))
    path.write_text(path.read_text()[:-20])
    assert pieces.get("speed", key) is None
    path.write_text('{"key": {"content": "another"}, "value": 1, "seconds": 1, "created": 1}')
    assert pieces.get("speed", key) is None, "a hash that collides"
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    pieces.close()


def test_runs_go_on_or_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = Pieces(tmp_path)
    first = pieces.begin(fresh=False, reuse=False)
    pieces.put("speed", {"run": first.id}, 1, 1.0)
    pieces.put("accuracy", {"content": "x"}, 1, 1.0)
    assert pieces.begin(False, False).id == first.id, "it was not done"
    assert pieces.begin(True, False).id != first.id, "another one was asked for"
    assert not list(tmp_path.glob("speed-*")) and list(tmp_path.glob("accuracy-*"))
    second = pieces.begin(False, False)
    pieces.finish(second)
    assert pieces.begin(False, True).id == second.id
    third = pieces.begin(False, False)
    assert third.id != second.id
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    assert pieces.begin(False, False).id != third.id, "speeds of yesterday are not mixed with today's"
    pieces.close()


@pytest.mark.parametrize(
    ("subjects", "given", "message"),
    [
        ([], {}, "nothing to report on"),
        (["no-such-model"], {}, "no such directory"),
        (["model", "model2"], {}, "2 models were given"),
        (["model", "a"], {}, "model is no artifact and a is one"),
        (["a"], {"weights": ("int4",)}, "artifacts were given"),
        (["model"], {"weights": ("int5",)}, "--weights has 'int5', expected some of f32"),
        (["model"], {"kv": ()}, "--kv is empty"),
        (["model"], {"devices": ("tpu",)}, "--devices has 'tpu'"),
        (["model"], {"tokens": 1}, "tokens is 1"),
        (["model"], {"text": Path("no.txt")}, "no.txt cannot be read"),
        (["model"], {"last_word": Path("words.jsonl")}, "words.jsonl line 1 is not JSON"),
        (["model"], {"reference": Path("a")}, "--reference is for artifacts"),
        (["a"], {"reference": Path("model")}, "model has no manifest.json"),
        (["empty"], {}, "neither config.json nor manifest.json"),
        (["words.jsonl"], {}, "is a file"),
        (["model"], {"out": Path("model")}, "model is the model's own directory"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    subjects: list[str],
    given: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_tasks.model(tmp_path)
    tiny_artifact(tmp_path / "a")
    (tmp_path / "model2").mkdir()
    (tmp_path / "model2" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.jsonl").write_text("no json")
    with pytest.raises(GristmillError, match=message):
        SweepOptions.of(subjects, **{"out": "out", **given})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_artifacts_without_a_float_one_have_no_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, tmp_path)
    path = tiny_artifact(tmp_path / "int4")
    monkeypatch.setattr("gristmill.report.reference.best_reference", lambda artifacts: None)
    report = run_sweep(SweepOptions.of([str(path)], tmp_path / "out", rounds=1))
    assert "Accuracy was not measured" in report.remarks[0]
    assert report.points[0].reason == "accuracy: there is no float artifact to compare with"
    assert report.points[0].status == "ok" and report.points[0].compile_command == ""


def test_lines_tell_how_much_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, tmp_path, why="int8")
    lines: list[str] = []
    run_sweep(fake_tasks.options(tmp_path), Lines(lines.append))
    assert len(lines) == JOBS and lines[0].startswith("[1/16] compile f16, KV f16: 0.")
    assert "left" in lines[0] and "its process ended by SIGSEGV" in lines[-1]
    lines.clear()
    run_sweep(fake_tasks.options(tmp_path, reuse_speed=True), Lines(lines.append))
    assert lines[0].startswith("[1/13] the float model: kept from before")
