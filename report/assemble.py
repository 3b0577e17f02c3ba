"""The Report of what a sweep has measured."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import gristmill
from gristmill.report import storage
from gristmill.report.identity import versions
from gristmill.report.merge import Speed, merge_machines, merge_rounds
from gristmill.report.pareto import with_dominated
from gristmill.report.schema import Accuracy, LayerError, Machine, PhaseWhy, Point, Report
from gristmill.report.subjects import Subject
from gristmill.report.sweep_options import SweepOptions
from gristmill.runtime.errors import GristmillError

PACKAGES = ("numpy", "torch", "transformers", "tokenizers", "triton", "matplotlib")


def assemble(
    options: SweepOptions, subjects: Sequence[Subject], remarks: Sequence[str], seconds: float
) -> Report:
    """seconds: that this start of the sweep has taken."""
    speeds = {subject.id: merge_rounds(subject.rounds) for subject in subjects if subject.rounds}
    engines = {speeds[s.id].version for s in subjects if s.peer and s.id in speeds}
    named = dict(text.rsplit(" ", 1) for text in sorted(engines))
    name = Path(options.model).name if options.model else ", ".join(path.name for path in options.artifacts)
    report = Report(
        title=f"{name}: accuracy and speed",
        model=name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=options.command,
        versions={**versions(PACKAGES), **named},
        machines=_machines(subjects, speeds),
        points=tuple(_point(subject, speeds.get(subject.id)) for subject in subjects),
        seconds=seconds,
        remarks=tuple(remarks),
    )
    return with_dominated(report)


def _machines(subjects: Sequence[Subject], speeds: dict[str, Speed]) -> dict[str, Machine]:
    """By device, with the median roofs of all points on it."""
    found = {}
    for device in dict.fromkeys(subject.device for subject in subjects):
        measured = (speeds[s.id].machine for s in subjects if s.device == device and s.id in speeds)
        machine = merge_machines(m for m in measured if m is not None)
        if machine is not None:
            found[device] = machine
    return found


def _point(subject: Subject, speed: Speed | None) -> Point:
    accuracy, why = subject.results.get("accuracy"), subject.results.get("why")
    made = subject.results.get("compile") or {}
    errors, reasons = _layer_errors(subject)
    return Point(
        id=subject.id,
        label=subject.label,
        runtime=_runtime(subject, speed),
        device=subject.device,
        weights=subject.weights,
        method=subject.method,
        kv=subject.kv,
        status="failed" if subject.failed else "ok",
        reason="; ".join([*subject.reasons, *reasons]),
        command=subject.command,
        artifact=str(subject.artifact or (subject.peer.path if subject.peer else "")),
        content_id=subject.content,
        compile_seconds=made.get("compile_s"),
        load_seconds=speed.load_seconds if speed else None,
        accuracy=storage.value_of(accuracy, Accuracy, "a stored accuracy") if accuracy else None,
        speed=speed.points if speed else (),
        latency=speed.latency if speed else None,
        memory=speed.memory if speed else None,
        energy=speed.energy if speed else None,
        why=storage.value_of(why, tuple[PhaseWhy, ...], "stored reasons") if why else (),
        layer_errors=errors,
        compile_command=subject.compile_command,
    )


def _runtime(subject: Subject, speed: Speed | None) -> str:
    if subject.peer is None:
        return f"gristmill {gristmill.__version__}"
    version = f" ({speed.version})" if speed and speed.version else ""
    return f"{subject.peer.kind}{version}"


def _layer_errors(subject: Subject) -> tuple[tuple[LayerError, ...], list[str]]:
    """What the artifact's manifest says of its matrices; nothing of a peer or where there is no artifact."""
    if subject.peer or subject.artifact is None or not subject.content:
        return (), []
    from gristmill.report.layer_errors import layer_errors

    try:
        return layer_errors(subject.artifact), []
    except GristmillError as error:
        return (), [f"errors by layer: {error}"]
