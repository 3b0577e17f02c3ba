"""`gristmill compile --auto`: the sweep decides which configuration becomes the artifact."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gristmill.report.recommend import Promise, recommend, refuse_few_tokens
from gristmill.report.schema import Point
from gristmill.report.sweep import run_sweep
from gristmill.report.sweep_options import SweepOptions
from gristmill.report.watch import Watcher
from gristmill.runtime.artifact import open_artifact
from gristmill.runtime.artifact_writer import ArtifactWriter


@dataclass(frozen=True)
class Chosen:
    """path: of the artifact; reasons: why this point and no other."""

    path: Path
    point: Point
    reasons: tuple[str, ...]


def compile_auto(
    model: str, out: str | Path, promise: Promise, folder: Path, *, force: bool = False,
    watcher: Watcher | None = None, **given: Any,
) -> Chosen:  # fmt: skip
    """Sweeps `model` in `folder`, or takes what is measured there already, and copies the point that keeps
    `promise` best to `out`. given: fields of SweepOptions. Raises GristmillError where none keeps it."""
    options = replace(SweepOptions.of([model], folder, **given), reuse_speed=True, explain=False)
    refuse_few_tokens(options.tokens)
    with ArtifactWriter(out, force):
        pass  # refuses a place that cannot be written to before the work
    choice = recommend(run_sweep(options, watcher), promise)
    with ArtifactWriter(out, force) as writer:
        path = writer.commit_copy(open_artifact(choice.point.artifact))
    return Chosen(path, choice.point, choice.reasons)
