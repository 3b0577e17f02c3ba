"""How well the plan of an artifact agrees with its speed on this machine.

Every round measures the machine as `gristmill plan --device-spec cpu` does, plans each artifact with what it
found, and decodes with it, before and after, so that what else happens on the machine happens to both. Errors
are (planned - measured) / measured, medians over the rounds.

    python benchmarks/compare_plan.py bench/int4 bench/int8 bench/f16 --contexts 16,1000
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import click
from bandwidth import cpu_model
from speed import Candidate, Work, seconds_of
from tables import write_results

import gristmill
from gristmill.report.cpu_probe import ProbeOptions, measure_cpu
from gristmill.report.devices import DeviceSpec
from gristmill.report.plan import PlanOptions, plan
from gristmill.runtime.profile import Forward

HERE = Path(__file__).parent
COLUMNS = ("artifact", "kv", "context", "planned_tok_s", "tok_s", "floor_tok_s", "error", "stream_gb_s")
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """An artifact that is loaded, and how long the contexts are that it decodes after."""

    path: Path
    session: gristmill.Session
    contexts: tuple[int, ...]

    @property
    def kv(self) -> str:
        return self.session.program.caches[0].k_dtype

    @property
    def formats(self) -> set[str]:
        return {s.format for segments in self.session.program.weights.values() for s in segments}

    def tok_s(self, context: int, seconds: float) -> float:
        candidate = Candidate(self.path.name, self.kv, self.session)
        return 1 / seconds_of(candidate, Work("decode", Forward(1, context)), seconds)


def load(path: Path, contexts: tuple[int, ...], threads: int) -> Subject:
    length = max(contexts) + 1
    return Subject(path, gristmill.load(path, threads=threads, max_slots=1, max_len=length), contexts)


def one_round(subjects: list[Subject], threads: int, seconds: float) -> Iterator[Row]:
    cases = [(subject, context) for subject in subjects for context in subject.contexts]
    before = [subject.tok_s(context, seconds) for subject, context in cases]
    formats = tuple(sorted(set().union(*(subject.formats for subject in subjects))))
    caches = tuple(sorted({subject.kv for subject in subjects}))
    device = measure_cpu(ProbeOptions(formats, caches, threads, rounds=3))
    for (subject, context), first in zip(cases, before, strict=True):
        measured = (first + subject.tok_s(context, seconds)) / 2
        yield row_of(subject, context, device, measured)


def row_of(subject: Subject, context: int, device: DeviceSpec, measured: float) -> Row:
    (entry,) = plan(str(subject.path), device, PlanOptions(kv=(subject.kv,), context=context)).entries
    return {
        "artifact": subject.path.name, "kv": subject.kv, "context": context, "planned_tok_s": entry.tok_s,
        "tok_s": measured, "floor_tok_s": entry.floor_tok_s, "error": entry.tok_s / measured - 1,
        "stream_gb_s": device.bandwidth / 1e9,
    }  # fmt: skip


def medians(rounds: list[list[Row]]) -> list[Row]:
    """Of each case, over the rounds."""
    return [
        {k: median(row[k] for row in rows) if isinstance(v, float) else v for k, v in rows[0].items()}
        for rows in zip(*rounds, strict=True)
    ]


def line(row: Row) -> str:
    return (
        f"{row['artifact']}, KV {row['kv']}, after {row['context']}: planned {row['planned_tok_s']:.4g}, "
        f"measured {row['tok_s']:.4g} tok/s ({row['error']:+.1%}), floor {row['floor_tok_s']:.4g}"
    )


@click.command(help=__doc__)
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--contexts", default="16", show_default=True, help="Positions before the token, separated by commas."
)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="Least time of one measurement.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def main(
    artifacts: tuple[Path, ...], contexts: str, threads: int, rounds: int, seconds: float, results: Path
) -> None:
    lengths = tuple(int(text) for text in contexts.split(","))
    subjects = [load(path, lengths, threads) for path in artifacts]
    found: list[list[Row]] = []
    for number in range(rounds):
        found.append(list(one_round(subjects, threads, seconds)))
        rows = medians(found)
        print(f"round {number + 1} of {rounds}", *map(line, rows), sep="\n", flush=True)
        about = [f"{date.today()}, {cpu_model()}, {threads} threads", f"medians of {number + 1} rounds"]
        write_results(results / f"{date.today()}-plan.csv", COLUMNS, rows, about)


if __name__ == "__main__":
    main()
