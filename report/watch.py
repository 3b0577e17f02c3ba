"""How far a sweep is, and about how long it will take.

Time left is the number of jobs of each kind that are ahead times what one takes: the median of this run, else
of earlier ones in the same folder, else a guess.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

GUESSES = {  # seconds
    "compile": 20.0, "calibrate": 90.0, "change_cache": 20.0, "reference": 20.0, "accuracy": 8.0,
    "speed": 15.0, "why": 20.0, "peer_speed": 15.0, "peer_accuracy": 15.0,
}  # fmt: skip
Say = Callable[[str], None]


class Watcher:
    """Counts jobs and tells about them; this one says nothing. See `lines` and `bar`."""

    def __init__(self) -> None:
        self.ahead: Counter[str] = Counter()
        self.taken: dict[str, list[float]] = {}
        self.done = 0
        self.began = time.monotonic()

    def expect(self, jobs: dict[str, int], earlier: Callable[[str], list[float]]) -> None:
        """jobs: how many of each kind there may be; earlier: seconds of such jobs in the past."""
        self.ahead.update(jobs)
        self.taken = {kind: earlier(kind) for kind in jobs}
        self.fresh: set[str] = set()

    @property
    def total(self) -> int:
        return self.done + self.ahead.total()

    def seconds_left(self) -> float:
        return sum(count * self._one(kind) for kind, count in self.ahead.items())

    def _one(self, kind: str) -> float:
        known = self.taken.get(kind)
        return statistics.median(known) if known else GUESSES.get(kind, 10.0)

    def start(self, kind: str, what: str) -> None:
        """A job begins."""

    def stage(self, name: str, fraction: float) -> None:
        """How far it is."""

    def finish(self, kind: str, what: str, seconds: float | None, problem: str = "") -> None:
        """A job has ended; seconds: None where nothing had to be done. problem: why it gave nothing."""
        self.ahead[kind] = max(0, self.ahead[kind] - 1)
        self.done += 1
        if seconds is not None and not problem:
            if kind not in self.fresh:
                self.fresh.add(kind)
                self.taken[kind] = []
            self.taken[kind].append(seconds)

    def drop(self, kind: str, count: int = 1) -> None:
        """Jobs that there will not be after all."""
        self.ahead[kind] = max(0, self.ahead[kind] - count)


class Lines(Watcher):
    """A line for each job that has ended."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self.say = say

    def finish(self, kind: str, what: str, seconds: float | None, problem: str = "") -> None:
        super().finish(kind, what, seconds, problem)
        took = problem or ("kept from before" if seconds is None else f"{seconds:.1f} s")
        self.say(f"[{self.done}/{self.total}] {what}: {took}; {left_text(self.seconds_left())}")


class Bar(Watcher):
    """A bar on a terminal, and a line above it for what went wrong."""

    def __init__(self, progress: Any) -> None:
        super().__init__()
        self.progress = progress
        self.task = progress.add_task("", total=1.0, left="")
        self.what = ""

    def start(self, kind: str, what: str) -> None:
        self.what = what
        self._show(what)

    def stage(self, name: str, fraction: float) -> None:
        self._show(f"{self.what}: {name}" + (f" {fraction:.0%}" if fraction else ""))

    def finish(self, kind: str, what: str, seconds: float | None, problem: str = "") -> None:
        super().finish(kind, what, seconds, problem)
        if problem:
            self.progress.console.print(f"{what}: {problem}", markup=False, highlight=False)
        self._show(what)

    def _show(self, text: str) -> None:
        passed, left = time.monotonic() - self.began, self.seconds_left()
        self.progress.update(
            self.task, description=text, completed=passed / max(passed + left, 1e-9), left=left_text(left)
        )


@contextmanager
def watching(say: Say) -> Iterator[Watcher]:
    """A bar where stderr is a terminal, lines by `say` elsewhere."""
    if not sys.stderr.isatty():
        yield Lines(say)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress)


def left_text(seconds: float) -> str:
    """ "about 3 min left"; rounded as coarsely as it is known."""
    if seconds < 1:
        return "nothing left"
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} s left"
    return f"about {round(seconds / 60)} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
