"""A sweep whose tasks take no time and no processes: what they would do is written to a log, a line each.

Run as a program it sweeps a folder's `model` into its `out`, to be killed from outside:

    python fake_tasks.py FOLDER SECONDS       each task waits so many seconds
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import sample_report
from tiny import tiny_artifact

from gristmill.report import storage, sweep
from gristmill.report.configurations import Configuration
from gristmill.report.jobs import TaskFailed
from gristmill.report.schema import Machine, Memory, Report, SpeedPoint
from gristmill.report.sweep_options import SweepOptions

CONFIGURATIONS = (
    Configuration("f16", "", "f16"),
    Configuration("int4", "gptq", "f16"),
    Configuration("int4", "gptq", "int8"),
)
MACHINE = Machine("made up", 2, 2, 1 << 30, "avx2", "Linux", 1e10, 1e11, 1e12)
TOK_S = {"f16": 100.0, "int4": 250.0}


class FakeTasks:
    """Stands for `run_task`. broken: task's name -> what its artifact's path holds where it fails."""

    def __init__(
        self, log: Path, seconds: float = 0.0, broken: dict[str, str] | None = None,
        reason: str = "its process ended by SIGSEGV",
    ) -> None:  # fmt: skip
        self.log, self.seconds, self.broken, self.reason = log, seconds, broken or {}, reason

    def __call__(self, name: str, arguments: dict[str, Any], progress: Any = None) -> Any:
        subject = arguments.get("out") or arguments.get("artifact") or ""
        time.sleep(self.seconds)
        if name in self.broken and self.broken[name] in Path(subject).name:
            raise TaskFailed(self.reason, expected=False)
        made = getattr(self, name)(json.loads(json.dumps(arguments)))
        with self.log.open("a") as file:
            file.write(f"{name} {Path(subject).name}\n")
        return made

    def compile_model(self, given: dict[str, Any]) -> Any:
        seed = int(np.frombuffer(Path(given["out"]).name.encode(), np.uint8).sum())
        tiny_artifact(Path(given["out"]), seed)
        return {"compile_s": 1.5}

    change_cache = compile_model

    def reference(self, given: dict[str, Any]) -> Any:
        folder = Path(given["cache"]) / "float"
        folder.mkdir(parents=True, exist_ok=True)
        return {"folder": str(folder), "name": "float model"}

    def accuracy(self, given: dict[str, Any]) -> Any:
        name = "int8" if "int4" in Path(given["artifact"]).name else "f16"
        return storage.plain(next(p.accuracy for p in sample_report.sample_report().points if p.id == name))

    def speed(self, given: dict[str, Any]) -> Any:
        tok_s = TOK_S[Path(given["artifact"]).name.split("-")[0]]
        points = (
            SpeedPoint("prefill", 128, 0, 1, 0.5, 256.0, 0.5, 1),
            SpeedPoint("decode", 1, 16, 1, 1 / tok_s, tok_s, 0.9, 1),
        )
        sizes = Memory(4000 if "int4" in Path(given["artifact"]).name else 16000, 4.5, None, 1 << 20, 1 << 21)
        return {
            "machine": asdict(MACHINE), "points": storage.plain(points), "latency": None,
            "load_seconds": 0.01,
            "memory": storage.plain(sizes), "energy": None,
        }  # fmt: skip

    def peer_speed(self, given: dict[str, Any]) -> Any:
        shapes = given["shapes"]
        assert shapes["prompts"] == [128] and shapes["contexts"] == [16], "those of the own points"
        found: dict[str, Any] = self.speed({"artifact": "f16"})
        return {**found, "machine": None, "version": "engine 1.0"}

    def why(self, given: dict[str, Any]) -> Any:
        return []


class FakeWorker:
    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def install(patch: Callable[[Any, str, Any], None], tasks: FakeTasks) -> None:
    """patch: setattr, or that of monkeypatch."""
    patch(sweep, "run_task", tasks)
    patch(sweep, "Worker", lambda: FakeWorker(tasks))


def model(folder: Path) -> Path:
    """A directory that looks like a model's from outside."""
    made = folder / "model"
    made.mkdir(exist_ok=True)
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights")
    return made


def options(folder: Path, **changes: Any) -> SweepOptions:
    given: dict[str, Any] = {"configurations": CONFIGURATIONS, "rounds": 2, "command": "gristmill report"}
    return SweepOptions(folder / "out", str(model(folder)), **given | changes)


def log_of(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def run(folder: Path, **changes: Any) -> Report:
    return sweep.run_sweep(options(folder, **changes))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    install(setattr, FakeTasks(place / "log", float(sys.argv[2])))
    report = run(place)
    (place / "report.json").write_text(json.dumps([p.status for p in report.points]))
