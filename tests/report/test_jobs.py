"""Tasks in processes of their own: results, errors, crashes, and an end with the parent's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_artifact

from gristmill.report import jobs
from gristmill.report.jobs import TaskFailed, Worker, run_task

# Tasks for tests, in place of those of gristmill.report.tasks.
STRANGE = """
import sys
sys.path[:] = [p for p in sys.path if p]
import os, signal, time
from gristmill.report import tasks
from gristmill.runtime.errors import GristmillError

@tasks.task
def twice(x, progress):
    print("chatter")
    progress("half", 0.5)
    return {"pid": os.getpid(), "x": 2 * x}

@tasks.task
def refuse(progress):
    raise GristmillError("two lines\\nof text")

@tasks.task
def defect(progress):
    return 1 / 0

@tasks.task
def crash(progress):
    os.kill(os.getpid(), signal.SIGSEGV)

@tasks.task
def leave(progress):
    sys.stderr.write("last words\\n")
    os._exit(3)

@tasks.task
def sleep(file, progress):
    with open(file, "w") as f:
        f.write(str(os.getpid()))
    progress("asleep", 0)
    time.sleep(600)

tasks.main()
"""


@pytest.fixture(autouse=True)
def strange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "BOOT", STRANGE)


def test_results_and_progress() -> None:
    seen: list[tuple[str, float]] = []
    found = run_task("twice", {"x": 21}, lambda *event: seen.append(event))
    assert found["x"] == 42 and found["pid"] != os.getpid() and seen == [("half", 0.5)]


def test_errors_and_crashes_are_one_line() -> None:
    with pytest.raises(TaskFailed, match="^two lines of text$") as refused:
        run_task("refuse", {})
    assert refused.value.expected
    with pytest.raises(TaskFailed, match="^ZeroDivisionError: division by zero$") as defect:
        run_task("defect", {})
    assert not defect.value.expected
    with pytest.raises(TaskFailed, match="^its process ended by SIGSEGV"):
        run_task("crash", {})
    with pytest.raises(TaskFailed, match="^its process ended with exit code 3: last words$"):
        run_task("leave", {})


def test_a_worker_survives_errors_and_replaces_a_child_that_crashed() -> None:
    with Worker() as worker:
        first = worker.run("twice", {"x": 1})["pid"]
        with pytest.raises(TaskFailed):
            worker.run("defect", {})
        assert worker.run("twice", {"x": 1})["pid"] == first
        with pytest.raises(TaskFailed, match="SIGSEGV"):
            worker.run("crash", {})
        second = worker.run("twice", {"x": 1})["pid"]
        assert second != first
    assert not Path(f"/proc/{second}").exists()


def test_whatever_ends_the_wait_ends_the_child(tmp_path: Path) -> None:
    def interrupt(stage: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_task("sleep", {"file": str(tmp_path / "pid")}, interrupt)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_the_child_of_a_parent_that_is_killed_ends(tmp_path: Path) -> None:
    """Else it would go on, and disturb what the next start measures."""
    file = tmp_path / "pid"
    code = (
        "from gristmill.report import jobs; import sys; jobs.BOOT = sys.argv[1];"
        "jobs.run_task('sleep', {'file': sys.argv[2]})"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", code, STRANGE, str(file)]
    parent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path)
    until = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert parent.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    child = Path(f"/proc/{file.read_text()}")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while _runs(child):
        assert time.monotonic() < until, "the child goes on"
        time.sleep(0.01)


def _runs(process: Path) -> bool:
    """Whether it is there and no zombie, whose parent does not care."""
    try:
        return ") Z " not in (process / "stat").read_text()
    except OSError:
        return False


def test_real_tasks_measure_a_real_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the children of a sweep do, without a sweep."""
    monkeypatch.undo()
    path = tiny_artifact(tmp_path / "a")
    (tmp_path / "text.txt").write_text("some text to be scored " * 40)
    given = {"text": str(tmp_path / "text.txt"), "tokens": 600, "model": None, "threads": 1}
    reference = run_task("reference", {"cache": str(tmp_path / "r"), "artifact": str(path), **given})
    arguments = {"artifact": str(path), "reference": reference["folder"], "device": "cpu", "threads": 1}
    found = run_task("accuracy", {**arguments, "last_word": None})
    assert found["kl"]["estimate"] == 0.0 and found["tokens"] == 600 and found["top5_agreement"] == 1.0
    options = {
        "threads": 1, "rounds": 1, "budget": 0.0, "seconds": 0.0, "prompts": [8], "contexts": [4],
        "batches": [1],
        "latency_prompt": 4, "latency_tokens": 4, "memory": False,
    }  # fmt: skip
    speed = run_task("speed", {"artifact": str(path), "options": options})
    assert [p["phase"] for p in speed["points"]] == ["prefill", "decode"] and speed["machine"]["threads"] == 1
