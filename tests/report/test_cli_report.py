"""`gristmill report` and `compile --auto` on the command line; tasks are made up, see fake_tasks.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fake_tasks
import pytest

from gristmill.cli import run_command
from gristmill.report import configurations
from gristmill.report.storage import read_report
from gristmill.runtime.artifact import open_artifact


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `model` in it."""
    fake_tasks.install(monkeypatch.setattr, fake_tasks.FakeTasks(tmp_path / "log"))
    fake_tasks.model(tmp_path)
    monkeypatch.chdir(tmp_path)
    grid = tuple((c.weights, c.method, c.kv) for c in fake_tasks.CONFIGURATIONS)
    monkeypatch.setattr(configurations, "DEFAULT", grid)
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    found = run_command(list(arguments))
    out, err = capsys.readouterr()
    assert found == code, (out, err)
    return out, err


def test_the_files_and_the_summary(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["report", "model", "-o", "out", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["gristmill", *arguments])
    out, err = output(capsys, *arguments)
    assert "int4 gptq, KV int8  250 tok/s, 3.9 KiB, perplexity" in out and out.endswith("out/report.html\n")
    assert err.startswith("[1/13] compile f16, KV f16: ")
    report = read_report(folder / "out")
    assert report.command == "gristmill report model -o out --rounds 1" and report.model == "model"
    assert [p.status for p in report.points] == ["ok"] * 3
    assert {p.name for p in (folder / "out").iterdir()} == {
        "artifacts", "work", "report.html", "report.md", "report.json"
    }  # fmt: skip
    found = json.loads(output(capsys, *arguments, "--json", "--threads", "1")[0])
    assert [point["status"] for point in found["points"].values()] == ["ok"] * 3


def test_failed_points_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["report", "model", "-o", "out", "--rounds", "1"]
    for broken, code in ({"compile_model": "int4"}, 0), ({"speed": ""}, 1):
        fake_tasks.install(monkeypatch.setattr, fake_tasks.FakeTasks(folder / "log", broken=broken))
        out, err = output(capsys, *arguments, code=code)
        assert "int4 gptq, KV int8  failed" in out and "KV int8 failed: " in err
        assert "its process ended by SIGSEGV" in (folder / "out" / "report.html").read_text()
    assert "error: no point could be measured; the first: speed: its process ended by SIGSEGV" in err


def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        "--weights has 'int5'" in output(capsys, "report", "model", "-o", "o", "--weights", "int5", code=1)[1]
    )
    peer = ["report", "model", "-o", "o", "--peer"]
    assert "expected KIND:PATH with one of llama.cpp" in output(capsys, *peer, "vllm:x", code=1)[1]
    assert "no.gguf is missing; expected a GGUF" in output(capsys, *peer, "llama.cpp:no.gguf", code=1)[1]
    assert "is not a GGUF file" in output(capsys, *peer, "llama.cpp:model", code=1)[1]
    python = output(capsys, *peer, "openvino:model", "--peer-python", "openvino=no-such-python", code=1)[1]
    assert "no-such-python is no program" in python
    unused = output(
        capsys, "report", "model", "-o", "o", "--peer-python", f"openvino={sys.executable}", code=1
    )[1]
    assert "names openvino, and no --peer is one" in unused
    assert "Missing option" in output(capsys, "report", "model", code=2)[1]
    assert not (folder / "o").exists() and not fake_tasks.log_of(folder)


def test_auto_keeps_the_fastest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compile", "model", "--auto", "--samples", "8"]
    out, err = output(capsys, *arguments, "-o", "a", "--max-ppl-increase", "50%")
    assert out.startswith("int4 gptq, KV f16: 250 tok/s, 3.9 KiB, perplexity")
    assert "\nnot f16, KV f16: 100 tok/s" in out and "a.report" in err
    made = open_artifact(folder / "a")
    made.verify()
    swept = next((folder / "a.report" / "artifacts").glob("int4-gptq-kv-f16-*"))
    assert made.content_id == open_artifact(swept).content_id
    calls = len(fake_tasks.log_of(folder))
    assert (
        "a exists; use --force"
        in output(capsys, *arguments, "-o", "a", "--max-ppl-increase", "1%", code=1)[1]
    )
    sweep = ["--sweep", "a.report"]
    smaller = ["--max-ppl-increase", "50%", "--max-size", "1kB"]
    assert "no point keeps" in output(capsys, *arguments, "-o", "b", *sweep, *smaller, code=1)[1]
    assert not (folder / "b").exists()
    found = output(capsys, *arguments, "-o", "b", *sweep, "--max-ppl-increase", "50%", "--json")[0]
    assert json.loads(found)["point"] == "int4-gptq-kv-f16-cpu"
    assert len(fake_tasks.log_of(folder)) == calls, "all was measured"


def test_auto_chooses_for_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto = ["compile", "model", "-o", "a", "--auto"]
    assert "--auto needs --max-ppl-increase" in output(capsys, *auto, code=2)[1]
    auto += ["--max-ppl-increase", "1%"]
    assert "--weights does not go with --auto" in output(capsys, *auto, "--weights", "int4", code=2)[1]
    assert "--no-gate does not go with --auto" in output(capsys, *auto, "--no-gate", code=2)[1]
    assert "tokens are too few" in output(capsys, *auto, "--gate-tokens", "100", code=1)[1]
    assert "expected a speed above 0" in output(capsys, *auto, "--min-tok-s", "-1", code=1)[1]
    assert (
        "--max-size needs --auto"
        in output(capsys, "compile", "model", "-o", "a", "--max-size", "1MB", code=2)[1]
    )
    assert not fake_tasks.log_of(folder) and not (folder / "a").exists()
