"""Other engines in a report: what `--peer` asks for, and its figures in the terms of schema.py."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.report import storage
from gristmill.report.peers.commands import KINDS
from gristmill.report.peers.peer_process import Peer as Process
from gristmill.report.peers.peer_process import PeerStopped, command_of
from gristmill.report.schema import Accuracy, Latency, Memory, SpeedPoint
from gristmill.runtime.errors import GristmillError

WITH_LOGITS = ("llama.cpp", "ctranslate2")  # whose interface gives the logits of every position
TOKENS = 32  # decoded in one measurement, which is repeated until it has taken long enough
WARM_UP = (16, 16, 2)


@dataclass(frozen=True)
class Peer:
    """An engine with a model. python: what runs it, and has it installed; threads: that it gets."""

    kind: str
    path: str
    python: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{Path(self.path).stem}"

    @property
    def words(self) -> list[str]:
        """The options of `gristmill report` that ask for it."""
        python = [] if self.python == sys.executable else ["--peer-python", f"{self.kind}={self.python}"]
        return ["--peer", f"{self.kind}:{self.path}", *python]


@dataclass(frozen=True)
class Shapes:
    """What own points were measured at, so that a peer is at the same."""

    prompts: tuple[int, ...]
    contexts: tuple[int, ...]
    latency_prompt: int
    latency_tokens: int
    seconds: float = 0.3  # least time of prefills, and of decoding

    @property
    def length(self) -> int:
        decoded = max(self.contexts) + TOKENS
        return max(*self.prompts, decoded, self.latency_prompt + self.latency_tokens) + 8


def parse_peers(given: Sequence[str], pythons: Sequence[str], threads: int) -> tuple[Peer, ...]:
    """--peer KIND:PATH and --peer-python KIND=PYTHON. Raises GristmillError for what is not there."""
    by_kind = dict(_python_of(text) for text in pythons)
    found = []
    for text in dict.fromkeys(given):
        kind, colon, path = text.partition(":")
        if kind not in KINDS or not colon or not path:
            raise GristmillError(f"--peer is {text!r}, expected KIND:PATH with one of {', '.join(KINDS)}")
        if not Path(path).exists():
            raise GristmillError(f"--peer {text}: {path} is missing; expected {_expected(kind)}")
        if Path(path).is_file() != (kind == "llama.cpp"):
            raise GristmillError(f"--peer {text}: {path} is not {_expected(kind)}")
        found.append(Peer(kind, path, by_kind.get(kind, sys.executable), threads))
    unused = by_kind.keys() - {peer.kind for peer in found}
    if unused:
        raise GristmillError(f"--peer-python names {min(unused)}, and no --peer is one")
    names = [peer.name for peer in found]
    if len(set(names)) < len(names):
        raise GristmillError(f"two peers are called {max(names, key=names.count)}; rename one of the files")
    return tuple(found)


def _expected(kind: str) -> str:
    return "a GGUF file" if kind == "llama.cpp" else f"a directory that {kind} reads"


def _python_of(text: str) -> tuple[str, str]:
    kind, equals, python = text.partition("=")
    if kind not in KINDS or not equals:
        raise GristmillError(
            f"--peer-python is {text!r}, expected KIND=PYTHON with one of {', '.join(KINDS)}"
        )
    found = shutil.which(python)
    if found is None:
        raise GristmillError(f"--peer-python {text}: {python} is no program that can be run")
    return kind, str(Path(found).absolute())  # not resolved: a venv's python is a link


@contextmanager
def running(peer: Peer, length: int, logits: bool = False) -> Iterator[Process]:
    options = ["--threads", str(peer.threads), "--length", str(length), *(["--logits"] if logits else [])]
    process = None
    try:
        process = Process(command_of(peer.python, "serve", peer.kind, peer.path, *options))
        yield process
    except PeerStopped as error:
        raise GristmillError(str(error)) from None
    finally:
        if process is not None:
            process.close()


def measure_speed(peer: Peer, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """One round, as `tasks.speed` has them. version: of the engine."""
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in shapes.items()}
    wanted = Shapes(**given)
    with running(peer, wanted.length) as process:
        process.measure(*WARM_UP)
        points = list(_points(process, wanted))
        seen = process.measure(wanted.latency_prompt, wanted.latency_prompt, wanted.latency_tokens)
        memory = process.ask({"memory": True})
        about = process.about
    p50, p95, p99 = (float(np.quantile(seen["token_s"], q)) for q in (0.5, 0.95, 0.99))
    sizes = Memory(about["bytes"], about.get("bits_per_weight"), None, **memory)
    return {
        "machine": None,
        "points": storage.plain(tuple(points)),
        "latency": asdict(Latency(wanted.latency_prompt, seen["first_s"], p50, p95, p99)),
        "load_seconds": about["load_s"],
        "memory": storage.plain(sizes),
        "energy": None,
        "version": about["version"],
    }


def _points(process: Process, wanted: Shapes) -> Iterator[SpeedPoint]:
    """Prefills and decodes of one sequence; a measurement has one of each, so they go in pairs."""
    for i in range(max(len(wanted.prompts), len(wanted.contexts))):
        prompt = wanted.prompts[i] if i < len(wanted.prompts) else 1
        context = wanted.contexts[i] if i < len(wanted.contexts) else 1
        tokens = TOKENS if i < len(wanted.contexts) else 1
        prefill, step = _means(process, prompt, context, tokens, wanted.seconds)
        if i < len(wanted.prompts):
            yield SpeedPoint("prefill", prompt, 0, 1, prefill, prompt / prefill, None, 1)
        if i < len(wanted.contexts):
            yield SpeedPoint("decode", 1, context, 1, step, 1 / step, None, 1)


def _means(process: Process, prompt: int, context: int, tokens: int, least: float) -> tuple[float, float]:
    """Mean seconds of a prefill and of a decoded token, as own points have them: over what fills `least`
    seconds, the first time for a warm-up where that does not fill it alone."""
    found: list[dict[str, Any]] = []
    passed = 0.0
    while passed < least or not found:
        began = time.perf_counter()
        found.append(process.measure(prompt, context, tokens))
        took = time.perf_counter() - began
        if len(found) > 1 or took >= least:
            passed += took
    kept = found[1:] or found
    steps = [second for one in kept for second in one["token_s"]]
    return statistics.fmean(one["first_s"] for one in kept), statistics.fmean(steps)


def measure_accuracy(peer: Peer, reference: str, tokenizer: Any) -> Accuracy:
    """reference: its folder; tokenizer: of the same model, to show tokens with."""
    from gristmill.report.accuracy import compare
    from gristmill.report.reference import open_reference

    opened = open_reference(reference)
    with running(peer, opened.window + 8, logits=True) as process, tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "logits.npy")

        def logits(ids: list[int]) -> Iterator[tuple[int, NDArray[Any]]]:
            process.ask({"logits": ids, "out": file})
            yield 0, np.load(file)

        return compare(logits, opened, lambda ids: tokenizer.decode(ids, skip_special_tokens=False))
