"""What the commands print: tables, JSON, progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

Rows = list[tuple[str, str]]
Progress = Callable[
    ..., None
]  # progress(stage, fraction=None): the stage that runs now, and how far it is (0 to 1)


def echo_json(value: Any) -> None:
    """Prints `value` as JSON on stdout."""
    click.echo(json.dumps(value, indent=1))


def note(text: str) -> None:
    """A remark for the person at the terminal, on stderr."""
    click.secho(text, err=True, dim=sys.stderr.isatty())


def show_table(rows: Rows, stderr: bool, title: str | None = None) -> None:
    """A table of names and values."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    _console(stderr).print(table)


def show_columns(
    columns: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str], stderr: bool = False
) -> None:
    """A table with a head; the columns named in ``left`` hold words, the others numbers."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*row)
    _console(stderr).print(table)


def show_profile(profiles: dict[str, Any], phase: str) -> None:
    """The instructions of one phase by kind, slowest first; see `gristmill.runtime.profile`."""
    from rich.table import Table

    found, roofs = profiles[phase], profiles["roofs"]
    shared = found["shared_phases"]
    phases = "" if shared is None else f", {shared} phases shared by threads"
    click.echo(
        f"\n{phase}: {found['rows']} rows after {found['context']} positions in "
        f"{found['seconds'] * 1e3:.3f} ms{phases}\n"
        f"roofs: {roofs['stream'] / 1e9:.1f} GB/s, {roofs['integers'] / 1e9:.0f} integer and "
        f"{roofs['floats'] / 1e9:.0f} float Gop/s"
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("instructions", "count", "ms", "share", "GB/s", "Gop/s", "bound by", "of the roof"):
        table.add_column(name, justify="left" if name in ("instructions", "bound by") else "right")
    for kind in found["kinds"]:
        seconds = max(kind["seconds"], 1e-12)
        bound = kind["bound"] != "overhead"
        table.add_row(
            kind["name"], str(kind["count"]), f"{seconds * 1e3:.3f}", f"{seconds / found['seconds']:.1%}",
            f"{kind['bytes'] / seconds / 1e9:.1f}" if kind["bytes"] else "",
            f"{kind['operations'] / seconds / 1e9:.1f}" if kind["operations"] else "",
            kind["bound"], f"{kind['floor'] / seconds:.0%}" if bound else "",
        )  # fmt: skip
    for transfer in found["transfers"]:
        seconds = max(transfer["seconds"], 1e-12)
        table.add_row(
            transfer["name"], str(transfer["count"]), f"{seconds * 1e3:.3f}",
            f"{seconds / found['seconds']:.1%}",
            f"{transfer['bytes'] / seconds / 1e9:.1f}", "", "communication", "",
        )  # fmt: skip
    _console(stderr=False).print(table)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no edge to wrap at
    return console


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A live bar on a terminal; elsewhere one line per stage with the seconds it took. Always on stderr."""
    if sys.stderr.isatty():
        yield from _live_bar()
    else:
        yield from _plain_lines()


def _live_bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        current: dict[str, Any] = {}

        def progress(stage: str, fraction: float | None = None) -> None:
            if current.get("stage") != stage:
                if current:
                    bar.update(current["task"], total=1.0, completed=1.0)
                current.update(stage=stage, task=bar.add_task(stage, total=None))
            if fraction is not None:
                bar.update(current["task"], total=1.0, completed=fraction)

        yield progress
        if current:
            bar.update(current["task"], total=1.0, completed=1.0)


def _plain_lines() -> Iterator[Progress]:
    current: dict[str, Any] = {}

    def end() -> None:
        if current:
            click.echo(f"{current['stage']}: {time.perf_counter() - current['since']:.1f} s", err=True)

    def progress(stage: str, fraction: float | None = None) -> None:
        if current.get("stage") != stage:
            end()
            current.update(stage=stage, since=time.perf_counter())

    yield progress
    end()
