"""Configurations compiled side by side: in what order, gone on with, and what fails. Most tests have no Ray:
its pool is made up, and does what the tasks of fake_tasks.py do."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fake_tasks
import pytest

from gristmill.cli import run_command
from gristmill.report import ray_tasks
from gristmill.report.jobs import TaskFailed
from gristmill.report.ray_tasks import Job, Outcome, run_job
from gristmill.report.sweep_options import SweepOptions, check
from gristmill.runtime.artifact import open_artifact
from gristmill.runtime.errors import GristmillError

PY7M = Path(__file__).parents[2] / "examples" / "py7m"


class FakePool:
    """Stands for RayPool. waves: how many jobs were given at once; the last one ends first. stops: raised
    once so many have ended."""

    waves: list[int] = []
    stops: int | None = None

    def __init__(self, address: str, model_bytes: int, threads: int) -> None:
        assert address == "local" and threads == 1

    def __enter__(self) -> FakePool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        self.waves.append(len(jobs))
        for number, job in reversed(list(enumerate(jobs))):
            assert Path(job.arguments["out"]).is_absolute() and Path(job.arguments["model"]).is_absolute()
            assert Path(job.lock).parent.is_dir()
            outcome = run_job(job)
            yield number, outcome
            if FakePool.stops == len(fake_tasks.log_of(Path(job.arguments["out"]).parents[2])):
                raise KeyboardInterrupt


def patched(
    monkeypatch: pytest.MonkeyPatch, folder: Path, stops: int | None = None, **broken: str
) -> list[int]:
    tasks = fake_tasks.FakeTasks(folder / "log", broken=broken)
    fake_tasks.install(monkeypatch.setattr, tasks)
    monkeypatch.setattr(ray_tasks, "run_task", tasks)
    monkeypatch.setattr(ray_tasks, "RayPool", FakePool)
    monkeypatch.setattr(FakePool, "waves", [])
    monkeypatch.setattr(FakePool, "stops", stops)
    return FakePool.waves


def compiled(folder: Path) -> list[str]:
    made = (line.split() for line in fake_tasks.log_of(folder) if line.startswith(("compile", "change")))
    return [f"{task} {name.rsplit('-', 1)[0]}" for task, name in made]


def test_what_is_missing_is_compiled_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waves = patched(monkeypatch, tmp_path)
    report = fake_tasks.run(tmp_path, ray="local")
    assert [p.status for p in report.points] == ["ok"] * 3 and waves == [2, 1]
    assert compiled(tmp_path) == [
        "compile_model int4-gptq-kv-f16", "compile_model f16-kv-f16", "change_cache int4-gptq-kv-int8"
    ]  # fmt: skip
    assert [p.compile_seconds for p in report.points] == [1.5] * 3
    fake_tasks.run(tmp_path, ray="local")
    fake_tasks.run(tmp_path)
    assert len(compiled(tmp_path)) == 3 and waves == [2, 1], "with or without Ray nothing is made again"


@pytest.mark.parametrize("then", ["local", None])
def test_one_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str | None
) -> None:
    patched(monkeypatch, tmp_path, stops=1)
    with pytest.raises(KeyboardInterrupt):
        fake_tasks.run(tmp_path, ray="local")
    patched(monkeypatch, tmp_path)
    report = fake_tasks.run(tmp_path, ray=then)
    assert [p.status for p in report.points] == ["ok"] * 3
    assert sorted(compiled(tmp_path)) == [
        "change_cache int4-gptq-kv-int8", "compile_model f16-kv-f16", "compile_model int4-gptq-kv-f16"
    ]  # fmt: skip


def test_what_fails_is_a_row_and_is_not_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waves = patched(monkeypatch, tmp_path, compile_model="int4")
    report = fake_tasks.run(tmp_path, ray="local")
    assert [p.status for p in report.points] == ["ok", "failed", "failed"]
    assert report.points[1].reason == "compile: its process ended by SIGSEGV" and waves == [2, 1]
    patched(monkeypatch, tmp_path)
    assert [p.status for p in fake_tasks.run(tmp_path, ray="local").points] == ["ok"] * 3


def test_one_writer_for_each_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(name: str, arguments: dict[str, Any]) -> str:
        begun.set()
        assert go.wait(60)
        return "made"

    monkeypatch.setattr(ray_tasks, "run_task", slow)
    monkeypatch.setattr(ray_tasks, "PATIENCE", -1.95)
    job, found = Job("x", {}, str(tmp_path / "lock")), list[Outcome]()
    first = threading.Thread(target=lambda: found.append(run_job(job)))
    first.start()
    assert begun.wait(60)
    second = run_job(job)
    go.set()
    first.join(60)
    assert second.problem is not None and "another process" in str(second.problem)
    assert found[0].value == "made" and run_job(job).value == "made"
    lost = run_job(Job("x", {}, str(tmp_path / "none" / "lock"))).problem
    assert lost is not None and "file system that all machines" in str(lost)


def test_a_task_s_failure_travels() -> None:
    import pickle

    found = pickle.loads(pickle.dumps(TaskFailed("why", expected=True)))
    assert str(found) == "why" and found.expected


def test_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for address in ("local", "auto", "head:6379"):
        with pytest.raises(
            GristmillError, match=r"needs Ray; install it with `pip install 'gristmill\[ray\]'`"
        ):
            ray_tasks.check_address(address)
    assert run_command(["report", "-o", str(tmp_path / "o"), "--ray", str(tmp_path)]) == 1
    assert (
        run_command(["report", str(fake_tasks.model(tmp_path)), "-o", str(tmp_path / "o"), "--ray", "m"]) == 1
    )
    assert "expected local, auto or HOST:PORT; before a model write --ray=local" in capsys.readouterr().err
    with pytest.raises(GristmillError, match="artifacts were given"):
        check(SweepOptions(tmp_path / "o", artifacts=(tmp_path,), ray="local"))


@pytest.mark.minutes
def test_a_sweep_on_ray_that_was_killed(tmp_path: Path) -> None:
    """kill -9 in the midst of compiling: what it started ends, the same command goes on, and the artifacts
    are those that are made without Ray."""
    pytest.importorskip("ray", reason="sweeps fan out with gristmill[ray]")
    command = [
        sys.executable, "-P", "-m", "gristmill", "report", str(PY7M), "-o", "out",
        "--weights", "f16,int8,int4", "--methods", "rtn", "--rounds", "1", "--tokens", "256", "--ray",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    killed = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    locks = tmp_path / "out" / "work" / "locks"
    _wait(lambda: locks.is_dir() and any(locks.iterdir()))
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert again.returncode == 0, again.stderr
    assert "failed" not in again.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [point["status"] for point in report["points"]] == ["ok"] * 3
    assert not [p for p in (tmp_path / "out" / "artifacts").iterdir() if "tmp" in p.name]
    point = next(p for p in report["points"] if p["weights"] == "int4")
    arguments = [*shlex.split(point["compile_command"])[1:]]
    where = arguments.index("-o") + 1
    arguments[where] = str(tmp_path / "alone")
    assert run_command(arguments) == 0
    made = next(p for p in (tmp_path / "out" / "artifacts").iterdir() if p.name.startswith("int4"))
    assert open_artifact(made).content_id == open_artifact(tmp_path / "alone").content_id


def _wait(true: Any) -> None:
    ends = time.monotonic() + 600
    while not true():
        assert time.monotonic() < ends, "waited for long"
        time.sleep(0.01)
