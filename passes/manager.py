"""Runs passes in order, checks legality after each, and keeps the ledger."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from .graph import Traced
from .legality import describe, illegal_nodes
from .rule import Report

Evaluate = Callable[[Traced], Tensor]


class IllegalGraph(Exception):
    """An op is left that the passes so far promise to have removed, or that no instruction can express."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    ``difference``: largest change of the logits, relative to their largest, when checked.
    """

    name: str
    hits: int
    misses: tuple[tuple[str, str], ...]
    nodes: int
    seconds: float
    difference: float | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.name:<16} {self.hits:>5} rewrites {self.nodes:>6} nodes left {self.seconds:>7.2f} s"
        if self.difference is not None:
            text += f"  difference {self.difference:.1e}"
        text += "".join(f"\n    {note}" for note in self.notes)
        for (where, reason), count in Counter(self.misses).items():
            text += f"\n    not at {where}: {reason}" + (f" ({count} times)" if count > 1 else "")
        return text


def run_passes(traced: Traced, passes: Sequence[ModuleType], evaluate: Evaluate | None = None) -> list[Entry]:
    """Run each pass module's ``run(traced, report)``.

    With ``evaluate`` the logits before and after every pass are compared.

    Raises IllegalGraph when an op is left that should be gone.
    """
    ledger: list[Entry] = []
    done: list[str] = []
    before = evaluate(traced) if evaluate else None
    for module in passes:
        name = module.__name__.rsplit(".", 1)[-1]
        report, start = Report(), time.perf_counter()
        module.run(traced, report)
        seconds = time.perf_counter() - start
        difference = None
        if evaluate is not None and before is not None:
            after = evaluate(traced)
            difference = float((after - before).abs().max() / before.abs().max())
            before = after
        done.append(name)
        ledger.append(
            Entry(
                name, report.hits, tuple(report.misses), len(traced.graph.nodes), seconds, difference,
                tuple(report.notes),
            )
        )  # fmt: skip
        _check(traced, done, ledger[-1], final=module is passes[-1])
    return ledger


def _check(traced: Traced, done: list[str], entry: Entry, final: bool) -> None:
    illegal = illegal_nodes(traced, done, final)
    if illegal:
        reasons = {reason for _, reason in entry.misses}
        why = f": {sorted(reasons)[0]}" if reasons else ""
        raise IllegalGraph(f"{describe(illegal)} (after {entry.name}){why}")
