"""Rows as they are measured, held against the targets; each is in the CSV before the next is begun."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

COLUMNS = ("section", "format", "measure", "value", "unit", "target", "met", "note")


@dataclass(frozen=True)
class Target:
    """value: the least; only_on: a part of the device's name, where it holds on such devices alone."""

    value: float
    only_on: str = ""


SHARE, TOKENS = "decode, share of the roof", "decode"
ATTENTION = "attention, share of the roof"
FASTER = "attention, times f16"
BATCH, FIRST, PEER = "batch, times one sequence", "first token, share of matmul", "times torch.compile"
TARGETS: dict[tuple[str, str], Target] = {
    ("bf16", SHARE): Target(0.85),
    ("int8", SHARE): Target(0.75),
    ("fp8", SHARE): Target(0.75),
    ("int4", SHARE): Target(0.65),
    ("bf16", TOKENS): Target(245, "H200"),
    ("int8", TOKENS): Target(430, "H200"),
    ("fp8", TOKENS): Target(430, "H200"),
    ("int4", TOKENS): Target(680, "H200"),
    ("int4", BATCH): Target(8),
    ("bf16", FIRST): Target(0.60),
    ("int4", FIRST): Target(0.45),
    ("int8 KV", ATTENTION): Target(0.60),
    ("fp8 KV", ATTENTION): Target(0.60),
    ("int8 KV", FASTER): Target(1.6),
    ("fp8 KV", FASTER): Target(1.6),
    ("bf16", PEER): Target(1.3),
}


@dataclass(frozen=True)
class Row:
    """One measured number. met: held against its target, or for a check, whether it passed; else None."""

    section: str
    format: str
    measure: str
    value: float
    unit: str
    target: float | None = None
    met: bool | None = None
    note: str = ""

    def cells(self) -> list[str]:
        met = "" if self.met is None else "yes" if self.met else "NO"
        target = "" if self.target is None else f"{self.target:g}"
        numbers = f"{self.value:.5g}"
        return [self.section, self.format, self.measure, numbers, self.unit, target, met, self.note]


class Results:
    """Prints a row and appends it to the file, whose first lines say what was measured on what.

    append: go on with a file that is there; judged: targets are for this device, and not for a dry run.
    """

    def __init__(
        self, path: Path, about: Sequence[str], device: str, append: bool = False, judged: bool = True
    ) -> None:
        self.path, self.device, self.judged, self.rows = path, device, judged, list[Row]()
        if append:
            self.rows = read_rows(path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            file.writelines(f"# {line}\n" for line in about)
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)
        for line in about:
            print(line, flush=True)

    def add(
        self, section: str, name: str, measure: str, value: float, unit: str, note: str = "",
        passed: bool | None = None,
    ) -> Row:  # fmt: skip
        """``passed``: of a check, which has no target in the table."""
        target = TARGETS.get((name, measure))
        met = passed
        if target is not None and self.judged and target.only_on in self.device:
            met = value >= target.value
        row = Row(section, name, measure, value, unit, target.value if target else None, met, note)
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row.cells())
        print("  " + " | ".join(cell for cell in row.cells() if cell), flush=True)
        return row

    def value(self, name: str, measure: str) -> float | None:
        """What was measured last under this name."""
        found = [row.value for row in self.rows if (row.format, row.measure) == (name, measure)]
        return found[-1] if found else None

    @property
    def failed_checks(self) -> list[Row]:
        return [row for row in self.rows if row.target is None and row.met is False]

    def table(self) -> None:
        """The targets, each with what was measured, or that it was not; then the checks."""
        table = Table(title=f"{self.device}: measured against the targets", title_justify="left")
        for column in ("format", "measure", "measured", "target", "met"):
            table.add_column(column, justify="left" if column in ("format", "measure") else "right")
        last = {(row.format, row.measure): row for row in self.rows}
        for (name, measure), target in TARGETS.items():
            row = last.get((name, measure))
            least = f"{target.value:g}" + (f" on {target.only_on}" if target.only_on else "")
            measured = "not measured" if row is None else f"{row.value:.4g} {row.unit}".strip()
            met = "" if row is None else row.cells()[6]
            table.add_row(name, measure, measured, least, met)
        checks = [row for row in self.rows if row.target is None and row.met is not None]
        failed = ", ".join(f"{row.format} {row.measure}" for row in self.failed_checks)
        said = f"FAILED: {failed}" if failed else "passed"
        table.caption = f"{len(checks)} checks of numbers: {said}" if checks else "no numbers were checked"
        Console(width=110).print(table)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `Results` wrote."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return [
        Row(
            r["section"], r["format"], r["measure"], float(r["value"]), r["unit"],
            float(r["target"]) if r["target"] else None, {"yes": True, "NO": False}.get(r["met"]), r["note"],
        )
        for r in csv.DictReader(lines)
    ]  # fmt: skip
