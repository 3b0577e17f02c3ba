"""A sweep: what is missing is compiled, everything is measured, and a Report comes out.

The order is that of its cost when it is cut short: artifacts first, accuracy, then rounds of speed that go
through all points and peers in turn, so that a machine that slows down meanwhile slows all of them, and last
the reasons. Each job is a process of its own (jobs.py) and ends in a piece on the disk (pieces.py), so a run
that was killed goes on where it was. A job that fails makes its point a failed row and ends nothing else.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gristmill.compiler.statistics import are_enough
from gristmill.report import ray_tasks
from gristmill.report.assemble import assemble
from gristmill.report.identity import (
    RUNTIME,
    code_digest,
    file_digest,
    machine_key,
    model_digests,
    model_directory,
)
from gristmill.report.jobs import PATIENCE, TaskFailed, Worker, run_task
from gristmill.report.peer_measures import WITH_LOGITS, Shapes
from gristmill.report.pieces import Piece, Pieces, Run
from gristmill.report.schema import Report
from gristmill.report.subjects import (
    Subject,
    Wanted,
    artifact_subjects,
    content_of,
    model_subjects,
    peer_subjects,
    wanted_artifacts,
)
from gristmill.report.sweep_options import SweepOptions, refuse_full_disk
from gristmill.report.watch import Watcher
from gristmill.runtime.errors import GristmillError

WORK, REFERENCES = "work", "references"
FALLBACK = Shapes((128, 512), (16,), 128, 64)  # of peers where no own point could be measured
LATENCY = (128, 64)  # tokens of prompt and generation
SPEED_KINDS = ("speed", "peer_speed", "why")  # that every run takes anew
SWEEP_GRACE_S = PATIENCE + 1  # that a sweep has to end its child
RAY_GRACE_S = 15.0  # and a Ray of its own
FULL_BYTES = 8 << 20  # with less room than this, the disk is what failed


def run_sweep(options: SweepOptions, watcher: Watcher | None = None) -> Report:
    """Compiles, measures and returns the report; it writes none. Raises GristmillError for what concerns all
    points: an unusable model or text, a full disk, another sweep in the same folder."""
    with _held(options.out / WORK) as pieces:
        run = pieces.begin(options.fresh, options.reuse_speed)
        report = _Sweep(options, pieces, run, watcher or Watcher()).report()
        pieces.finish(run)
        return report


@contextmanager
def _held(folder: Path) -> Iterator[Pieces]:
    pieces = Pieces(folder)
    try:
        yield pieces
    finally:
        pieces.close()


class _Sweep:
    """One start of a run: what all of its stages share."""

    def __init__(self, options: SweepOptions, pieces: Pieces, run: Run, watcher: Watcher) -> None:
        self.options, self.pieces, self.run, self.watcher = options, pieces, run, watcher
        self.began = time.monotonic()
        self.started = time.time()
        self.reused: dict[str, int] = {}  # pieces by kind that an earlier start or run has made
        self.directory = model_directory(options.model) if options.model else None
        self.wanted = wanted_artifacts(options, self.directory) if self.directory else []
        self.remarks: list[str] = []

    def report(self) -> Report:
        if self.directory:
            missing = [w for w in self.wanted if not w.is_there]
            refuse_full_disk(self.options, self.directory, [w.configuration for w in missing])
            own = model_subjects(self.options, self.wanted)
        else:
            missing = []
            self._choose_reference()
            own = artifact_subjects(self.options)
        peers = peer_subjects(self.options)
        self._expect(missing, own, peers)
        with Worker() as worker:  # one for these: they share the export of the model
            self._compile(own, worker)
            reference = self._reference(worker)
        self._accuracies([*own, *peers], reference)
        self._speeds(own, peers)
        if self.options.explain:
            self._reasons(own)
        self._remark([*own, *peers])
        return assemble(self.options, [*own, *peers], self.remarks, time.monotonic() - self.began)

    def _choose_reference(self) -> None:
        """Among artifacts, the one nearest to float; without one, accuracy is not measured."""
        from gristmill.report.reference import best_reference

        if self.options.reference is not None:
            return
        found = best_reference(self.options.artifacts)
        if found is None:
            self.remarks.append(
                "Accuracy was not measured: all artifacts have rounded weights, and no --reference was given."
            )
            return
        path, formats = found
        self.options = replace(self.options, reference=path)
        self.remarks.append(
            f"Accuracy is against the artifact {path.name} ({formats}), the nearest to float."
        )

    def _expect(self, missing: list[Wanted], own: list[Subject], peers: list[Subject]) -> None:
        """What is ahead, for the time left."""
        bases: set[tuple[str, str]] = set()
        jobs: dict[str, int] = {"compile": 0, "calibrate": 0, "change_cache": 0}
        for wanted in self.wanted:
            c = wanted.configuration
            if wanted in missing:
                based = c.calibrated and (c.weights, c.method) in bases
                jobs["change_cache" if based else "calibrate" if c.calibrated else "compile"] += 1
            bases.add((c.weights, c.method))
        compared = self._is_compared()
        jobs["reference"] = int(compared)
        jobs["accuracy"] = len(own) if compared else 0
        jobs["peer_accuracy"] = (
            sum(p.peer is not None and p.peer.kind in WITH_LOGITS for p in peers) * compared
        )
        jobs["speed"] = self.options.rounds * len(own)
        jobs["peer_speed"] = self.options.rounds * len(peers)
        jobs["why"] = len(own) * self.options.explain
        self.watcher.expect(jobs, self.pieces.seconds)

    def _is_compared(self) -> bool:
        return self.options.model is not None or self.options.reference is not None

    def _compile(self, own: list[Subject], worker: Worker) -> None:
        problems = self._fan_out() if self.options.ray is not None else {}
        for wanted in self.wanted:
            if not wanted.is_there and not problems.get(wanted.path):
                problems[wanted.path] = self._make(wanted, worker)
        for subject in own:
            assert subject.artifact is not None, "own points have artifacts"
            content = content_of(subject.artifact)
            if content is None:
                subject.fail(problems.get(subject.artifact) or "its artifact is not whole")
            subject.content = content or ""
            made = self._compile_piece(subject)
            subject.results["compile"] = made.value if made else None

    def _make(self, wanted: Wanted, worker: Worker) -> str:
        """Compiles one configuration, from an artifact that differs in its cache alone where there is one;
        why it could not be done, or ""."""
        kind, task, arguments = self._work_of(wanted)
        try:
            key = {"artifact": wanted.key}
            what = f"compile {wanted.configuration.label}"
            self._done(kind, key, what, task, arguments, anew=True, worker=worker)
        except TaskFailed as error:
            self._stop_if_full(error)
            return f"compile: {error}"
        return ""

    def _work_of(self, wanted: Wanted) -> tuple[str, str, dict[str, Any]]:
        """Kind of job, task and arguments that make an artifact."""
        base = next((w.path for w in self.wanted if self._is_base(w, wanted)), None)
        calibrated = wanted.configuration.calibrated
        kind = "change_cache" if base else "calibrate" if calibrated else "compile"
        arguments: dict[str, Any] = {
            "model": self.options.model, "out": str(wanted.path),
            "options": {**wanted.options, "force": True},
            **({"base": str(base)} if base else {}),
        }  # fmt: skip
        return kind, "change_cache" if base else "compile_model", arguments

    def _fan_out(self) -> dict[Path, str]:
        """Compiles what is missing side by side, calibrations that others begin with first; why what could
        not be made. What was not even tried the sweep makes itself."""
        problems: dict[Path, str] = {}
        if all(w.is_there for w in self.wanted):
            return problems
        assert self.directory is not None and self.options.ray is not None
        locks = (self.options.out / WORK / ray_tasks.LOCKS).resolve()
        locks.mkdir(exist_ok=True)
        size = sum(file.stat().st_size for file in self.directory.glob("*.safetensors"))
        threads = self.options.threads or 1
        with ray_tasks.RayPool(self.options.ray, size, threads) as pool:
            while wave := self._wave(problems):
                works = [self._work_of(w) for w in wave]
                jobs = [
                    ray_tasks.Job(task, self._absolute(arguments), str(locks / w.path.name))
                    for w, (_, task, arguments) in zip(wave, works, strict=True)
                ]
                for (kind, _, _), w in zip(works, wave, strict=True):
                    self.watcher.start(kind, f"compile {w.configuration.label}")
                for number, outcome in pool.run(jobs):
                    problems[wave[number].path] = self._take_in(wave[number], works[number][0], outcome)
        return problems

    def _wave(self, tried: dict[Path, str]) -> list[Wanted]:
        """What may be made at once: of configurations that differ in their cache alone, the first one."""
        missing = [w for w in self.wanted if not w.is_there and w.path not in tried]
        begun: set[tuple[str, str]] = set()
        found = []
        for wanted in missing:
            c = wanted.configuration
            shared = (c.weights, c.method)
            if c.calibrated and shared in begun:
                continue
            has_base = any(self._is_base(w, wanted) for w in self.wanted)
            begun |= set() if has_base else {shared}
            found.append(wanted)
        return found

    def _absolute(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Paths as another process finds them."""
        given = [name for name in ("out", "base") if name in arguments]
        places: dict[str, Any] = {name: str(Path(arguments[name]).resolve()) for name in given}
        return {**arguments, "model": str((self.directory or Path()).resolve()), **places}

    def _take_in(self, wanted: Wanted, kind: str, outcome: ray_tasks.Outcome) -> str:
        """Keeps what a task gave; why it gave nothing, or ""."""
        what = f"compile {wanted.configuration.label}"
        if outcome.problem is not None:
            self.watcher.finish(kind, what, outcome.seconds, str(outcome.problem))
            self._stop_if_full(outcome.problem)
            return f"compile: {outcome.problem}"
        self.pieces.put(kind, {"artifact": wanted.key}, outcome.value, outcome.seconds)
        self.watcher.finish(kind, what, outcome.seconds)
        return ""

    def _is_base(self, other: Wanted, wanted: Wanted) -> bool:
        """Only for methods that take long: rounding again is as quick as copying."""
        a, b = other.configuration, wanted.configuration
        same = (a.weights, a.method) == (b.weights, b.method) and other.path != wanted.path
        return b.calibrated and same and other.is_there

    def _compile_piece(self, subject: Subject) -> Piece | None:
        wanted = next((w for w in self.wanted if w.path == subject.artifact), None)
        if wanted is None:
            return None
        found = (
            self.pieces.get(kind, {"artifact": wanted.key})
            for kind in ("compile", "calibrate", "change_cache")
        )
        return next((piece for piece in found if piece), None)

    def _reference(self, worker: Worker) -> str | None:
        """The folder of the float model's logits. Raises GristmillError where there can be none: no point
        could be compared, and a model that cannot be read compiles to nothing either."""
        from gristmill.report.reference import made_by

        o = self.options
        if not self._is_compared():
            return None
        subject = (
            {"model": model_digests(self.directory)}
            if self.directory
            else {"content": content_of(o.reference or Path())}
        )
        text = file_digest(o.text) if o.text else "built in"
        key = {**subject, "text": text, "tokens": o.tokens, **made_by()}
        arguments = {
            "cache": str(o.out / WORK / REFERENCES), "text": str(o.text) if o.text else None,
            "tokens": o.tokens, "model": o.model, "artifact": str(o.reference) if o.reference else None,
            "threads": o.threads,
        }  # fmt: skip
        known = self.pieces.get("reference", key)
        lost = known is not None and not Path(known.value["folder"]).is_dir()
        try:
            found = self._done("reference", key, "the float model", "reference", arguments, lost, worker)
            return str(found["folder"])
        except TaskFailed as error:
            raise GristmillError(f"the float model cannot be measured: {error}") from None

    def _accuracies(self, subjects: list[Subject], reference: str | None) -> None:
        o = self.options
        for subject in subjects:
            reason = self._without_accuracy(subject, reference)
            if reason:
                subject.reasons.append(reason)
            if subject.failed and not reason:
                self.watcher.drop("peer_accuracy" if subject.peer else "accuracy")
            if subject.failed or reason:
                continue
            assert reference is not None, "there are reasons for all others"
            key = {
                "content": self._content(subject), "reference": Path(reference).name,
                "code": code_digest(RUNTIME), "machine": machine_key(subject.device),
            }  # fmt: skip
            what = f"accuracy of {subject.label}"
            if subject.peer:
                arguments: dict[str, Any] = {
                    "peer": asdict(subject.peer), "reference": reference, "model": o.model,
                    "artifact": None if o.model else str(o.reference),
                }  # fmt: skip
                self._measure(subject, "peer_accuracy", key, what, arguments)
            else:
                key["last_word"] = file_digest(o.last_word) if o.last_word else None
                arguments = {
                    "artifact": str(subject.artifact), "reference": reference, "device": subject.device,
                    "last_word": str(o.last_word) if o.last_word else None, "threads": self._threads(subject),
                }  # fmt: skip
                self._measure(subject, "accuracy", key, what, arguments)

    def _without_accuracy(self, subject: Subject, reference: str | None) -> str:
        """Why a point's accuracy is not measured, "" where it is."""
        if reference is None:
            return "accuracy: there is no float artifact to compare with"
        if subject.peer and subject.peer.kind not in WITH_LOGITS:
            return f"accuracy: the interface of {subject.peer.kind} gives no logits of a text"
        return ""

    def _speeds(self, own: list[Subject], peers: list[Subject]) -> None:
        """Rounds over all; memory is sampled in the first."""
        for number in range(self.options.rounds):
            for subject in own:
                options = {
                    "device": subject.device, "threads": self._threads(subject), "rounds": 1, "budget": 0.0,
                    "seconds": self.options.seconds,
                    "memory": number == 0, "latency_prompt": LATENCY[0], "latency_tokens": LATENCY[1],
                    **self._ranks(),
                }  # fmt: skip
                arguments = {"artifact": str(subject.artifact), "options": options}
                self._round(subject, "speed", number, options, arguments)
            shapes = asdict(self._shapes(own)) if peers else {}
            for subject in peers:
                assert subject.peer is not None
                arguments = {"peer": asdict(subject.peer), "shapes": shapes}
                options = {**shapes, "threads": subject.peer.threads}
                self._round(subject, "peer_speed", number, options, arguments)

    def _round(
        self, subject: Subject, kind: str, number: int, options: dict[str, Any], arguments: dict[str, Any]
    ) -> None:
        if subject.failed:
            self.watcher.drop(kind)
            return
        key = self._speed_key(subject, options) | {"round": number}
        what = f"speed of {subject.label}, round {number + 1} of {self.options.rounds}"
        found = self._measure(subject, kind, key, what, arguments)
        if found is not None:
            subject.rounds.append(found)

    def _shapes(self, own: list[Subject]) -> Shapes:
        """Prompts and contexts of the own points on the CPU."""
        points = next((s.rounds[0]["points"] for s in own if s.rounds and s.device == "cpu"), None)
        if points is None:
            return FALLBACK
        prompts = [p["rows"] for p in points if p["phase"] == "prefill" and not p["context"]]
        contexts = [p["context"] for p in points if p["phase"] == "decode" and p["sequences"] == 1]
        return Shapes(tuple(prompts), tuple(contexts), *LATENCY, seconds=self.options.seconds)

    def _reasons(self, own: list[Subject]) -> None:
        for subject in own:
            if subject.failed:
                self.watcher.drop("why")
                continue
            options = {
                "device": subject.device, "threads": self._threads(subject), "seconds": self.options.seconds,
                **self._ranks(),
            }  # fmt: skip
            arguments = {"artifact": str(subject.artifact), "options": options}
            key = self._speed_key(subject, options)
            self._measure(subject, "why", key, f"why {subject.label} is as fast as it is", arguments)

    def _speed_key(self, subject: Subject, options: dict[str, Any]) -> dict[str, Any]:
        return {
            "content": self._content(subject), "options": options, "machine": machine_key(subject.device),
            "code": code_digest(RUNTIME), "run": self.run.id,
        }  # fmt: skip

    def _content(self, subject: Subject) -> Any:
        if subject.peer and not subject.content:
            subject.content = file_digest(subject.peer.path)
        return [subject.content, subject.peer.kind, subject.peer.python] if subject.peer else subject.content

    def _ranks(self) -> dict[str, int]:
        """Said where it is asked for: what was measured before is still known by its options."""
        asked = self.options.tensor_parallel
        return {} if asked is None else {"tensor_parallel": asked}

    def _threads(self, subject: Subject) -> int | None:
        return self.options.threads if subject.device == "cpu" else None

    def _measure(
        self, subject: Subject, kind: str, key: dict[str, Any], what: str, arguments: dict[str, Any]
    ) -> Any:
        """The result, kept in the subject as well; None and a failed subject where there is none. That the
        reasons cannot be told does not make a point one that failed."""
        try:
            found = self._done(kind, key, what, kind, arguments)
        except TaskFailed as error:
            self._stop_if_full(error)
            reason = f"{kind.removeprefix('peer_')}: {error}"
            if kind == "why":
                subject.reasons.append(reason)
            else:
                subject.fail(reason)
            return None
        subject.results[kind.removeprefix("peer_")] = found
        return found

    def _done(
        self, kind: str, key: dict[str, Any], what: str, task: str, arguments: dict[str, Any],
        anew: bool = False, worker: Worker | None = None,
    ) -> Any:  # fmt: skip
        """A piece from the disk, or by its task, in `worker` or a process of its own. Raises TaskFailed."""
        since = self.run.started if self.run.fresh and kind != "reference" else 0.0
        piece = None if anew else self.pieces.get(kind, key, since)
        if piece is not None:
            self.reused[kind] = self.reused.get(kind, 0) + 1
            self.watcher.finish(kind, what, None)
            return piece.value
        self.watcher.start(kind, what)
        began = time.monotonic()
        try:
            run = worker.run if worker else run_task
            value = run(task, arguments, self.watcher.stage)
        except TaskFailed as error:
            self.watcher.finish(kind, what, time.monotonic() - began, str(error))
            raise
        seconds = time.monotonic() - began
        value = self.pieces.put(kind, key, value, seconds).value
        self.watcher.finish(kind, what, seconds)
        return value

    def _stop_if_full(self, error: TaskFailed) -> None:
        """A full disk is not the fault of one point. Raises GristmillError."""
        free = shutil.disk_usage(self.options.out).free
        if free < FULL_BYTES or "No space left" in str(error):
            raise GristmillError(
                f"{self.options.out}: the disk is full ({free >> 20} MiB free); make room and run it again: "
                "it goes on"
            ) from None

    def _remark(self, subjects: list[Subject]) -> None:
        rounds = self.options.rounds
        found = (subject.results.get("accuracy") for subject in subjects)
        tokens = min((accuracy["tokens"] for accuracy in found if accuracy), default=None)
        if tokens is not None and not are_enough(tokens):
            self.remarks.append(
                f"{tokens} tokens are too few for the intervals of perplexity and KL to say anything."
            )
        self.remarks.append(
            f"Speeds are medians of {rounds} round{'s' * (rounds > 1)} that go through all points and peers "
            "in turn; every measurement has a process of its own."
        )
        kept = sum(count for kind, count in self.reused.items() if kind.endswith("accuracy"))
        if kept:
            self.remarks.append(
                f"{kept} accuracies are from an earlier run: the same artifact, text, code and machine give "
                "the same figures; --fresh measures them anew."
            )
        resumed = sum(self.reused.get(kind, 0) for kind in SPEED_KINDS)
        if resumed:
            began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.run.started))
            self.remarks.append(
                f"{resumed} measurements of speed are from an earlier start of this run, begun {began}."
            )
