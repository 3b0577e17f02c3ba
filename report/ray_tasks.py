"""Compiling a sweep's configurations as Ray tasks, side by side on one machine or on a cluster.

A task runs what the sweep would run itself, in a process of its own (jobs.py), and holds a lock of its
artifact's name meanwhile: one that outlives its sweep keeps the next one's task waiting, as the folder's lock
does without Ray. Artifacts appear whole or not at all, and the sweep alone writes pieces (pieces.py), so one
that was killed goes on with or without Ray. Ray repeats tasks whose machine or worker was lost; a calibration
goes on within itself. Nothing else goes through Ray: accuracy and speed are measured one after the other on
the machine of the sweep, since measurements beside each other measure each other.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gristmill.report.jobs import PATIENCE, TaskFailed, run_task
from gristmill.runtime import ray_session
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.ray_session import LOCAL, require_ray

AUTO = "auto"
BASE_BYTES, MODEL_SHARE = 1 << 30, 2.0  # of memory that a task reserves: torch, and of the model's bytes
REPEATS = 3  # of a task whose worker was lost
LOCKS = "locks"


@dataclass(frozen=True)
class Job:
    """What one task does: run_task(task, arguments). lock: a file that nobody else holds meanwhile."""

    task: str
    arguments: dict[str, Any]
    lock: str


@dataclass(frozen=True)
class Outcome:
    """value: what the task gave, where problem is None."""

    value: Any
    seconds: float
    problem: TaskFailed | None = None


def check_address(address: str) -> None:
    """Raises GristmillError where it is none, or where there is no Ray."""
    if address not in (LOCAL, AUTO) and not re.fullmatch(r"[^/\s]+:\d+", address):
        raise GristmillError(
            f"--ray is {address!r}, expected local, auto or HOST:PORT; before a model write --ray=local"
        )
    require_ray()


class RayPool:
    """Ray for the length of a block: at `address`, or one of its own on this machine. model_bytes: of the
    weights that each task reads; threads: of each task."""

    def __init__(self, address: str, model_bytes: int, threads: int) -> None:
        self._address, self._model_bytes, self._threads = address, model_bytes, threads

    def __enter__(self) -> RayPool:
        self._folder = ray_session.start(self._address)
        return self

    def __exit__(self, *error: object) -> None:
        ray_session.stop(self._folder)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """The jobs side by side: the number of each one that has ended, and what came of it."""
        import ray
        from ray.exceptions import RayError

        remote = ray.remote(run_job).options(
            num_cpus=self._cpus(), memory=self._memory(), max_retries=REPEATS, retry_exceptions=False
        )
        numbers = {remote.remote(job): number for number, job in enumerate(jobs)}
        while numbers:
            (done,), _ = ray.wait(list(numbers), num_returns=1)
            number = numbers.pop(done)
            try:
                yield number, ray.get(done)
            except RayError as error:
                said = " ".join(str(error).split())[:300]
                yield number, Outcome(None, 0.0, TaskFailed(f"Ray lost its task: {said}", expected=False))

    def _cpus(self) -> float:
        """No more than some machine has: a task that fits nowhere would wait for ever."""
        return max(1.0, min(float(self._threads), _largest("CPU")))

    def _memory(self) -> int:
        return int(min(BASE_BYTES + MODEL_SHARE * self._model_bytes, _largest("memory")))


def _largest(resource: str) -> float:
    import ray

    return max((node["Resources"].get(resource, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)


def run_job(job: Job) -> Outcome:
    """What a task does. Every way it may end is a value: Ray repeats what raises."""
    began = time.monotonic()
    try:
        lock = _locked(Path(job.lock))
        try:
            value = run_task(job.task, job.arguments)
        finally:
            os.close(lock)
    except TaskFailed as error:
        return Outcome(None, time.monotonic() - began, error)
    return Outcome(value, time.monotonic() - began)


def _locked(path: Path) -> int:
    """A descriptor that holds the lock; the process of the task inherits it. Raises TaskFailed."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise TaskFailed(
            f"{path.parent} cannot be written on {socket.gethostname()} ({error.strerror}); the model and "
            "the report's directory must lie on a file system that all machines of the cluster share",
            expected=True,
        ) from None
    os.set_inheritable(lock, True)
    until = time.monotonic() + PATIENCE + 2
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            if time.monotonic() > until:
                os.close(lock)
                raise TaskFailed("another process compiles the same artifact", expected=True) from None
            time.sleep(0.05)
