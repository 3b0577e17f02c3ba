"""What every configuration is compared with: the float model's logits on a text, computed once and kept.

A float model of some size takes longer to read a text than all its artifacts together, so its logits lie on
disk, in a folder named by the hash of what they follow from, and are mapped into memory by whoever measures.
All of them are kept, since the divergence between two distributions needs every token's probability: as f32
where that takes little, else as f16 of each logit less its row's largest. Rounding those moves a token's
log-probability by 2^-12 of itself, which makes KL uncertain by about 1e-6 nats.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.compiler.gate import HeldText
from gristmill.report.identity import RUNTIME, code_digest, versions
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.evaluation import text_windows, window_logits
from gristmill.runtime.program import FLOAT_BYTES, Program
from gristmill.runtime.report import read_program
from gristmill.runtime.session import load
from gristmill.runtime.tokenizer import Tokenizer

FORMAT = 1
TOKENS, WINDOW = 2048, 512
EXACT_BYTES = 256 << 20  # of logits that are kept as f32
MOST_BYTES = 1 << 30  # of logits that are kept as f16
GROUP_TOKENS = 2048  # that pass the float model's layers together: its weights are read once for each group
META, LOGITS, TEXT = "meta.json", "logits.npy", "text.txt"

Array = NDArray[Any]
Progress = Callable[[str, float], None]
Windows = list[list[int]]
# Given windows of token ids, yields the logits [len(window), vocabulary] f32 of each, in order.
Logits = Callable[[Windows], Iterator[Array]]


@dataclass(frozen=True)
class Reference:
    """Logits of a text's windows on disk. name: what gave them; dtype: "f32" or "f16"."""

    folder: Path
    name: str
    text: HeldText
    whole_text: str
    window: int
    vocabulary: int
    dtype: str

    @property
    def windows(self) -> Windows:
        """Of token ids, as `runtime.evaluation` cuts a text."""
        return text_windows(self.text.ids, self.text.prefix, self.window)

    def logits(self) -> Iterator[Array]:
        """For each window the logits [len(window) - 1, vocabulary] f32 before its second to last token."""
        stored = np.load(self.folder / LOGITS, mmap_mode="r")
        first = 0
        for window in self.windows:
            rows = stored[first : first + len(window) - 1]
            first += len(rows)
            yield np.asarray(rows, np.float32)


@dataclass(frozen=True)
class _Maker:
    """What computes a reference that is not there yet."""

    tokenizer: Tokenizer
    vocabulary: int
    max_len: int
    logits: Logits


def reference_from_model(
    model: str | Path, cache: str | Path, text_name: str, text: str, *, tokens: int = TOKENS,
    window: int = WINDOW, progress: Progress | None = None, export: Any = None,
) -> Reference:  # fmt: skip
    """The float model's logits on the first ``tokens`` tokens of a text, from ``cache`` or computed.

    model: a Hugging Face directory or hub name; window: tokens of a window, BOS included, at most those the
    model was traced for; export: see compiler/exports.py. Raises GristmillError for a model that does
    not compile, a text without a token to predict, and more logits than are kept.
    """
    from gristmill.compiler.load import load_source
    from gristmill.compiler.pipeline import float_model, float_reference

    report = progress or _ignore
    source = load_source(str(model))

    def make() -> _Maker:
        report("trace", 0.0)
        made = float_model(source, export)

        def logits(windows: Windows) -> Iterator[Array]:
            for group in _groups(windows):
                yield from float_reference(made.traced, group)

        return _Maker(Tokenizer.of_files(made.tokenizer), made.vocabulary, made.max_len, logits)

    identity = {**source.hashes, **made_by()}
    asked = _Asked(f"float model {source.name}", identity, text_name, text, tokens, window)
    return _cached(Path(cache), asked, make, report)


def reference_from_artifact(
    artifact: str | Path, cache: str | Path, text_name: str, text: str, *, tokens: int = TOKENS,
    window: int = WINDOW, device: str = "cpu", threads: int | None = None, progress: Progress | None = None,
) -> Reference:  # fmt: skip
    """The same of an artifact, where its model is not at hand: differences are then to its rounding."""
    opened, program = read_program(artifact)

    def make() -> _Maker:
        session = load(artifact, device=device, threads=threads, max_slots=1)

        def logits(windows: Windows) -> Iterator[Array]:
            for ids in windows:
                with session.slot() as slot:
                    yield np.concatenate([piece for _, piece in window_logits(session, ids, slot)])

        return _Maker(session.tokenizer, session.vocabulary, session.max_len, logits)

    name = f"artifact {Path(artifact).name}, {formats_text(program)}"
    identity = {"content_id": opened.content_id, "device": device, **made_by()}
    asked = _Asked(name, identity, text_name, text, tokens, window)
    return _cached(Path(cache), asked, make, progress or _ignore)


def made_by() -> dict[str, str]:
    """The code that computes a reference: another one may give other logits."""
    return {**versions(("torch", "transformers")), "code": code_digest(RUNTIME)}


def best_reference(artifacts: Sequence[str | Path]) -> tuple[Path, str] | None:
    """The artifact that is nearest to a float model, with its formats in words; None where every one of them
    has rounded weights, so that no figure against it would say what rounding costs."""
    found = [(Path(path), read_program(path)[1]) for path in artifacts]
    floats = [(path, program) for path, program in found if _formats(program) <= FLOAT_BYTES.keys()]
    if not floats:
        return None
    path, program = max(floats, key=lambda item: _precision(item[1]))
    return path, formats_text(program)


def _precision(program: Program) -> tuple[int, int]:
    """Bytes of a weight, and of a position in the caches."""
    stored = min(FLOAT_BYTES[format] for format in _formats(program))
    return stored, sum(cache.row_bytes() for cache in program.caches)


def open_reference(folder: str | Path) -> Reference:
    """A reference by its folder. Raises GristmillError for one that is not there or not complete."""
    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
        whole = (folder / TEXT).read_bytes().decode()
        if meta.pop("format") != FORMAT:
            raise ValueError("another format")
        return Reference(folder, text=HeldText(**meta.pop("text")), whole_text=whole, **meta)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise GristmillError(
            f"{folder} holds no reference ({error}); remove it to have it made again"
        ) from None


def formats_text(program: Program) -> str:
    """The formats of a program's weights: "f16 weights"."""
    return f"{' and '.join(sorted(_formats(program)))} weights"


def _formats(program: Program) -> set[str]:
    return {segment.format for segments in program.weights.values() for segment in segments}


@dataclass(frozen=True)
class _Asked:
    """What a reference follows from. identity: hashes of what gives the logits."""

    name: str
    identity: dict[str, str]
    text_name: str
    text: str
    tokens: int
    window: int

    @property
    def key(self) -> str:
        plain = json.dumps([FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _cached(cache: Path, asked: _Asked, make: Callable[[], _Maker], report: Progress) -> Reference:
    _check(asked)
    folder = cache / asked.key
    if not folder.exists():
        _compute(folder, asked, make(), report)
    return open_reference(folder)


def _check(asked: _Asked) -> None:
    for name, value in (("tokens", asked.tokens), ("window", asked.window)):
        if value < 2:
            raise GristmillError(f"{name} is {value}, expected 2 or more")


def _compute(folder: Path, asked: _Asked, maker: _Maker, report: Progress) -> None:
    held = HeldText.of(asked.text_name, asked.text, maker.tokenizer, asked.tokens)
    window = min(asked.window, maker.max_len)
    windows = text_windows(held.ids, held.prefix, window)
    if not windows:
        raise GristmillError(f"{held.name} is too short: it has no token that another one stands before")
    rows = sum(len(ids) - 1 for ids in windows)
    meta = {
        "format": FORMAT, "name": asked.name, "text": asdict(held), "window": window,
        "vocabulary": maker.vocabulary, "dtype": _dtype(rows, maker.vocabulary),
    }  # fmt: skip
    _write(folder, meta, asked.text, maker.logits(windows), rows, report)


def _ignore(stage: str, fraction: float) -> None:
    """Progress that nobody asked for."""


def _dtype(rows: int, vocabulary: int) -> str:
    """f32 where it is small, else f16. Raises GristmillError where that is too much as well."""
    if 4 * rows * vocabulary <= EXACT_BYTES:
        return "f32"
    if 2 * rows * vocabulary <= MOST_BYTES:
        return "f16"
    raise GristmillError(
        f"the float model's logits on {rows} tokens take {2 * rows * vocabulary >> 20} MiB at a vocabulary "
        f"of {vocabulary}, at most {MOST_BYTES >> 20} are kept; measure {MOST_BYTES // (2 * vocabulary)} "
        "tokens or fewer"
    )


def _write(
    folder: Path, meta: dict[str, Any], text: str, logits: Iterator[Array], rows: int, report: Progress
) -> None:
    """Into a folder beside it that is renamed once it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _refuse_full_disk(partial, rows * meta["vocabulary"] * int(meta["dtype"][1:]) // 8)
        _store(partial / LOGITS, logits, (rows, meta["vocabulary"]), meta["dtype"], report)
        (partial / TEXT).write_bytes(text.encode())
        (partial / META).write_text(json.dumps(meta), "utf-8")
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _store(path: Path, logits: Iterator[Array], shape: tuple[int, int], dtype: str, report: Progress) -> None:
    stored = np.lib.format.open_memmap(path, "w+", {"f32": np.float32, "f16": np.float16}[dtype], shape)
    first = 0
    report("reference", 0.0)
    for window in logits:
        found = window[:-1]
        if found.shape[1] != shape[1]:
            raise GristmillError(f"the reference gave {found.shape[1]} logits, expected {shape[1]}")
        if not np.isfinite(found).all():
            raise GristmillError(
                "the float model gave a logit that is NaN or infinite: its weights are damaged"
            )
        if dtype == "f16":
            found = np.maximum(found - found.max(1, keepdims=True), np.finfo(np.float16).min)
        stored[first : first + len(found)] = found
        first += len(found)
        report("reference", first / shape[0])
    assert first == shape[0], f"{first} rows of logits, expected {shape[0]}"
    stored.flush()


def _refuse_full_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise GristmillError(
            f"{folder.parent}: the float model's logits take {size >> 20} MiB, {free >> 20} are free; "
            "measure fewer tokens or make room"
        )


def _groups(windows: Windows) -> Iterator[Windows]:
    """Of some GROUP_TOKENS tokens each, whole windows."""
    group: Windows = []
    for window in windows:
        if group and sum(map(len, group)) + len(window) > GROUP_TOKENS:
            yield group
            group = []
        group.append(window)
    if group:
        yield group
