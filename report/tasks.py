"""What runs in a process of its own, see jobs.py: each task takes plain values and gives JSON."""

from __future__ import annotations

import functools
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from gristmill.report import storage
from gristmill.report.jobs import PATIENCE
from gristmill.runtime.ending import ended_by_signals
from gristmill.runtime.errors import GristmillError

Progress = Callable[[str, float], None]
TASKS: dict[str, Callable[..., Any]] = {}


def task(function: Callable[..., Any]) -> Callable[..., Any]:
    """Registers a task by its name."""
    TASKS[function.__name__] = function
    return function


@task
def compile_model(model: str, out: str, options: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Compiles, going on with a calibration that was killed."""
    from gristmill.compiler.calibration_store import IDENTITY, NotResumable, store_path
    from gristmill.compiler.options import CompileOptions
    from gristmill.compiler.pipeline import compile_model as make

    resume = (store_path(Path(out)) / IDENTITY).is_file()
    try:
        found = make(model, out, CompileOptions.of(**options, resume=resume), progress, export=_export())
    except NotResumable:  # made by another version, or with another number of threads
        found = make(model, out, CompileOptions.of(**options), progress, export=_export())
    return {"compile_s": found.summary["compile_s"]}


@task
def change_cache(
    model: str, base: str, out: str, options: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Makes an artifact from one that differs in its cache's type alone."""
    from gristmill.compiler.change_cache import change_cache as change
    from gristmill.compiler.options import CompileOptions

    started = time.perf_counter()
    change(model, base, out, CompileOptions.of(**options), progress, _export())
    return {"compile_s": time.perf_counter() - started}


@functools.cache
def _export() -> Callable[[Any], tuple[Any, Any]]:
    """One export for all compiles of this process, where two models of this size are not too much."""
    from gristmill.compiler import trace
    from gristmill.compiler.exports import remembered
    from gristmill.runtime.machine import available_memory_bytes

    return remembered(trace._export, (available_memory_bytes() or 0) // (4 * 2))


@task
def reference(
    cache: str, text: str | None, tokens: int, model: str | None, artifact: str | None, threads: int | None,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """The float model's logits, see reference.py; text: a file, None for the one that suits the tokenizer."""
    from gristmill.report import reference as module

    if model is not None:
        found = module.reference_from_model(
            model, cache, *_named_text(text, model, None), tokens=tokens, progress=progress, export=_export()
        )
    else:
        assert artifact is not None, "a model or an artifact"
        found = module.reference_from_artifact(
            artifact,
            cache,
            *_named_text(text, None, artifact),
            tokens=tokens,
            threads=threads,
            progress=progress,
        )
    return {"folder": str(found.folder), "name": found.name}


def _named_text(file: str | None, model: str | None, artifact: str | None) -> tuple[str, str]:
    from gristmill.compiler.gate import suiting_text
    from gristmill.runtime.evaluation import read_text

    if file is not None:
        return Path(file).name, read_text(file)
    if artifact is not None:
        from gristmill.runtime.session import load

        return suiting_text(load(artifact, max_slots=1).tokenizer)
    assert model is not None, "a model or an artifact"
    return suiting_text(model_tokenizer(model))


def model_tokenizer(model: str) -> Any:
    """The tokenizer that an artifact of this model gets."""
    from gristmill.compiler.gate import default_text
    from gristmill.compiler.load import load_source
    from gristmill.compiler.tokenizer_files import tokenizer_files
    from gristmill.runtime.tokenizer import Tokenizer

    texts = [default_text("prose"), default_text("code")]
    return Tokenizer.of_files(tokenizer_files(load_source(model).directory, texts))


@task
def accuracy(
    artifact: str, reference: str, last_word: str | None, device: str, threads: int | None, progress: Progress
) -> Any:
    from gristmill.report.accuracy import measure_accuracy
    from gristmill.report.reference import open_reference
    from gristmill.runtime.session import load

    session = load(artifact, device, threads=threads)
    return storage.plain(measure_accuracy(session, open_reference(reference), last_word=last_word))


@task
def speed(artifact: str, options: dict[str, Any], progress: Progress) -> Any:
    """One round of measure_speed, with the machine that it found."""
    from gristmill.report.speed import SpeedOptions, machine_of, measure_speed

    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    given = SpeedOptions(**plain)
    found = measure_speed(artifact, given)
    return {
        "machine": storage.plain(machine_of(found, given.device)),
        "points": storage.plain(found.points),
        "latency": storage.plain(found.latency) if found.latency else None,
        "load_seconds": found.load_seconds,
        "memory": storage.plain(found.memory) if found.memory else None,
        "energy": storage.plain(found.energy) if found.energy else None,
    }


@task
def why(artifact: str, options: dict[str, Any], progress: Progress) -> Any:
    from gristmill.report.explain import WhyOptions, explain

    return storage.plain(explain(artifact, WhyOptions(**options)))


@task
def peer_speed(peer: dict[str, Any], shapes: dict[str, Any], progress: Progress) -> Any:
    """The same of another engine, see peer_measures.Shapes."""
    from gristmill.report.peer_measures import Peer, measure_speed

    return measure_speed(Peer(**peer), shapes)


@task
def peer_accuracy(
    peer: dict[str, Any], reference: str, model: str | None, artifact: str | None, progress: Progress
) -> Any:
    """The same of another engine; model or artifact: what brings the tokenizer."""
    from gristmill.report.peer_measures import Peer, measure_accuracy
    from gristmill.runtime.session import load

    tokenizer = load(artifact, max_slots=1).tokenizer if artifact else model_tokenizer(model or "")
    return storage.plain(measure_accuracy(Peer(**peer), reference, tokenizer))


def main() -> None:
    """The child's side: requests in, for each lines of progress and one result, until stdin is closed."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to where errors go
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    with ended_by_signals():
        try:
            while True:
                request = requests.get()
                _say(out, _answer(request["task"], request["arguments"], out))
        except SystemExit as ended:  # nothing is left to be tidied up that the interpreter's end would do
            os._exit(ended.code if isinstance(ended.code, int) else 1)


def _answer(name: str, arguments: dict[str, Any], out: TextIO) -> dict[str, Any]:
    def progress(stage: str, fraction: float) -> None:
        _say(out, {"progress": [stage, fraction]})

    try:
        return {"result": TASKS[name](**arguments, progress=progress)}
    except GristmillError as error:
        return {"error": " ".join(str(error).split()), "expected": True}
    except Exception as error:  # the parent makes a row of it
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "expected": False}


def _say(out: TextIO, event: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):
        print(json.dumps(event), file=out, flush=True)


def _listen(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Reads requests, past sys.stdin, whose lock an interpreter that ends wants. When the parent has closed
    its side, which it does at the latest by its own end, this process ends: by SIGTERM, on which an
    artifact that is half written is removed, and outright where that takes too long."""
    rest = b""
    while data := os.read(0, 1 << 16):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            requests.put(json.loads(line))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)
