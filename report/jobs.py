"""A task in a process of its own: its memory is its own, and a crash ends it alone.

The child is this Python with `gristmill.report.tasks`; the request goes in as a line of JSON, progress and
the result come out as such. Its stdin stays open for as long as the parent lives, and the child ends when it
is closed: nothing goes on measuring after a parent that was killed. Until its end it holds the lock of the
folder (pieces.py), which it inherits, and the next sweep there waits.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gristmill.runtime.errors import GristmillError

# The folder that Python was started in must not be searched: in the repository its folders shadow packages.
BOOT = "import sys; sys.path[:] = [p for p in sys.path if p]; from gristmill.report.tasks import main; main()"
PATIENCE = 3.0  # seconds that a child has to tidy up when it is told to end, after which it is killed
# torch's threads wait asleep: where something else runs as well, spinning ones take a calibration minutes.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
Progress = Callable[[str, float], None]


class TaskFailed(GristmillError):
    """One line that says why a task gave no result; expected: the task itself said so."""

    def __init__(self, reason: str, expected: bool) -> None:
        super().__init__(reason)
        self.expected = expected

    def __reduce__(self) -> tuple[type[TaskFailed], tuple[str, bool]]:
        return TaskFailed, (str(self), self.expected)  # from another process


def run_task(name: str, arguments: dict[str, Any], progress: Progress | None = None) -> Any:
    """The JSON that `tasks.TASKS[name](**arguments)` gives in a process of its own.

    progress(stage, fraction) is called on the way. Raises TaskFailed; whatever else ends the wait, such as
    KeyboardInterrupt, ends the child first.
    """
    with Worker() as worker:
        return worker.run(name, arguments, progress)


class Worker:
    """A child for one task after the other, where what they share is worth more than apart; a new one takes
    the place of one that crashed. A context manager: with its end all have ended."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        if self._child is not None:
            child, self._child = self._child, None
            with self._errors:
                _end(child)

    def run(self, name: str, arguments: dict[str, Any], progress: Progress | None = None) -> Any:
        """As `run_task`."""
        child = self._child or self._started()
        try:
            answer = _converse(child, {"task": name, "arguments": arguments}, progress or _ignore)
            if answer is None:
                _end(child)
                raise TaskFailed(_crash(child.returncode, self._errors), expected=False)
        except BaseException:
            self.__exit__()
            raise
        if "error" in answer:
            raise TaskFailed(answer["error"], answer["expected"])
        return answer["result"]

    def _started(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._child = subprocess.Popen(
            [sys.executable, "-c", BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, start_new_session=True, close_fds=False,
            env={**ENVIRONMENT, **os.environ, "PYTHONPATH": _python_path()},
        )  # fmt: skip
        return self._child


def _converse(
    child: subprocess.Popen[str], request: dict[str, Any], progress: Progress
) -> dict[str, Any] | None:
    """The answer of the child, None where it ended without one."""
    assert child.stdin and child.stdout
    try:
        print(json.dumps(request), file=child.stdin, flush=True)
    except BrokenPipeError:
        return None
    for line in child.stdout:
        event: dict[str, Any] = json.loads(line)
        if "progress" not in event:
            return event
        progress(*event["progress"])
    return None


def _end(child: subprocess.Popen[str]) -> None:
    """The child has ended, and all that it started, when this returns. May be called again."""
    assert child.stdin and child.stdout
    with suppress(BrokenPipeError):  # it is gone already
        child.stdin.close()
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pass
    finally:  # a second Ctrl-C comes here too
        with suppress(ProcessLookupError):  # it started nothing that is still there
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def _crash(code: int, errors: Any) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
    said = f": {lines[-1][:300]}" if lines else ""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (killed from outside; where memory is short, by the system)" if name == "SIGKILL" else ""
        return f"its process ended by {name}{hint}{said}"
    return f"its process ended with exit code {code}{said}"


def _python_path() -> str:
    """Where this process found its packages, should that not be where a new one looks."""
    return os.pathsep.join(path for path in sys.path if path)


def _ignore(stage: str, fraction: float) -> None:
    """Progress that nobody asked for."""
