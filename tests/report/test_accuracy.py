"""Accuracy against a reference on disk: figures against their definitions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_artifact

import gristmill
from gristmill.compiler import pipeline
from gristmill.report import reference as references
from gristmill.report.accuracy import compare, measure_accuracy
from gristmill.report.reference import (
    Reference,
    best_reference,
    open_reference,
    reference_from_artifact,
    reference_from_model,
)
from gristmill.report.schema import Accuracy
from gristmill.runtime.errors import GristmillError

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 3


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one shape: what the second takes for the first differs much."""
    folder = tmp_path_factory.mktemp("artifacts")
    return [tiny_artifact(folder / f"a{seed}", seed) for seed in (0, 1)]


@pytest.fixture
def reference(artifacts: list[Path], tmp_path: Path) -> Reference:
    return reference_from_artifact(artifacts[0], tmp_path, "clocks.txt", TEXT, tokens=150, window=50)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(1, keepdims=True)))


def whole(path: Path, windows: list[list[int]]) -> list[np.ndarray]:
    """Logits before every token but the first of each window, by Session.forward."""
    session = gristmill.load(path, threads=1, max_slots=1)
    found = []
    for ids in windows:
        parts = []
        for start in range(0, len(ids), session.max_tokens):
            piece = ids[start : start + session.max_tokens]
            parts.append(session.forward(piece, range(start, start + len(piece)), [0] * len(piece)))
        found.append(np.concatenate(parts)[:-1])
    return found


def test_the_reference_is_what_the_model_says(artifacts: list[Path], reference: Reference) -> None:
    assert reference.name == "artifact a0, f32 weights" and reference.dtype == "f32"
    assert [len(ids) for ids in reference.windows] == [50, 50, 50, 4] and reference.windows[1][0] == 0
    for stored, expected in zip(reference.logits(), whole(artifacts[0], reference.windows), strict=True):
        np.testing.assert_array_equal(stored, expected)


def test_a_model_against_itself_loses_nothing(artifacts: list[Path], reference: Reference) -> None:
    found = measure_accuracy(gristmill.load(artifacts[0], threads=1), reference)
    assert found.kl.high == found.kl_max == found.ppl_increase.high == 0
    assert found.top1_agreement == found.top5_agreement == 1
    assert found.reference == reference.name and found.text == "clocks.txt" and found.last_word is None


def test_figures_equal_their_definitions(artifacts: list[Path], reference: Reference) -> None:
    """Of logits that come from elsewhere, as a peer's do."""
    draw = np.random.default_rng(0)
    float_logits = whole(artifacts[0], reference.windows)
    noisy = [(0.8 * x + draw.normal(0, 2.0, x.shape)).astype(np.float32) for x in float_logits]
    given = {tuple(ids): x for ids, x in zip(reference.windows, noisy, strict=True)}
    found = compare(lambda ids: iter([(0, given[tuple(ids)])]), reference, str, worst=7)
    p, q = (log_softmax(np.concatenate(x)) for x in (float_logits, noisy))
    targets = np.concatenate([ids[1:] for ids in reference.windows])
    at = np.arange(len(targets))
    kl = (np.exp(p) * (p - q)).sum(1)
    assert found.tokens == 150 == len(targets)
    assert found.reference_ppl == pytest.approx(np.exp(-p[at, targets].mean()), rel=1e-6)
    assert found.ppl == pytest.approx(np.exp(-q[at, targets].mean()), rel=1e-6)
    assert found.kl.estimate == pytest.approx(kl.mean()) and found.kl_max == pytest.approx(kl.max())
    assert found.kl.low < found.kl.estimate < found.kl.high
    assert found.top1_agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    among = [first in row for first, row in zip(p.argmax(1), np.argsort(-q)[:, :5], strict=True)]
    assert found.top5_agreement == pytest.approx(np.mean(among))
    assert 0 < found.top1_agreement < found.top5_agreement < 1
    order = np.argsort(-kl)[:7]
    assert [token.kl for token in found.worst] == pytest.approx(kl[order].tolist())
    assert [t.reference_probability for t in found.worst] == pytest.approx(np.exp(p[order].max(1)).tolist())
    assert [t.probability for t in found.worst] == pytest.approx(np.exp(q[order].max(1)).tolist())


def test_positions_are_counted_in_the_window(artifacts: list[Path], reference: Reference) -> None:
    found = measure_accuracy(gristmill.load(artifacts[1], threads=1), reference)
    bins = [(b.first, b.last, b.tokens) for b in found.by_position]
    assert bins == [(1, 15, 3 * 15 + 3), (16, 31, 3 * 16), (32, 49, 3 * 18)]
    assert sum(b.kl * b.tokens for b in found.by_position) == pytest.approx(found.tokens * found.kl.estimate)
    increase = sum(b.nll_increase * b.tokens for b in found.by_position) / found.tokens
    assert np.expm1(increase) == pytest.approx(found.ppl_increase.estimate)


def test_the_worst_tokens_stand_in_their_text(artifacts: list[Path], reference: Reference) -> None:
    found = measure_accuracy(gristmill.load(artifacts[1], threads=1), reference, worst=150)
    assert len(found.worst) == 150 and len({(t.before, t.token, t.position) for t in found.worst}) > 90
    for token in found.worst:
        said = (token.before + token.token).removeprefix("<s>")
        assert said in TEXT and len(said) == min(token.position, 33)


def test_half_precision_is_as_good(
    artifacts: list[Path], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "EXACT_BYTES", 0)
    half = reference_from_artifact(artifacts[0], tmp_path / "half", "clocks.txt", TEXT, tokens=150, window=50)
    assert half.dtype == "f16"
    same, other = (
        [measure_accuracy(gristmill.load(path, threads=1), r) for r in (reference, half)]
        for path in artifacts
    )
    assert 0 < same[1].kl_max < 1e-5, "rounding is all that differs"
    assert other[1].kl.estimate == pytest.approx(other[0].kl.estimate, rel=1e-4)
    assert other[1].top1_agreement == pytest.approx(other[0].top1_agreement, abs=0.02)


def test_too_many_logits_are_refused(
    artifacts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "EXACT_BYTES", 0)
    monkeypatch.setattr(references, "MOST_BYTES", 2 * 258 * 100)
    with pytest.raises(GristmillError, match="measure 100 tokens or fewer"):
        reference_from_artifact(artifacts[0], tmp_path, "clocks.txt", TEXT, tokens=150, window=50)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "given, message",
    [({"tokens": 1}, "tokens is 1"), ({"window": 1}, "window is 1"), ({"text": " "}, "too short")],
)
def test_what_cannot_be_measured(
    artifacts: list[Path], tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    asked: dict[str, Any] = {"text": TEXT, "tokens": 100, "window": 50, **given}
    text = "" if asked.pop("text") == " " else TEXT
    with pytest.raises(GristmillError, match=message):
        reference_from_artifact(artifacts[0], tmp_path, "clocks.txt", text, **asked)
    assert list(tmp_path.iterdir()) == []


def test_a_reference_is_computed_once(
    artifacts: list[Path], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = reference.folder.parent
    with monkeypatch.context() as patch:
        patch.setattr(references, "load", None)
        again = reference_from_artifact(artifacts[0], cache, "clocks.txt", TEXT, tokens=150, window=50)
    assert again == reference == open_reference(reference.folder)
    reference_from_artifact(artifacts[0], cache, "clocks.txt", TEXT, tokens=149, window=50)
    reference_from_artifact(artifacts[1], cache, "clocks.txt", TEXT, tokens=150, window=50)
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr(references, "code_digest", lambda folders: "other code")
    reference_from_artifact(artifacts[0], cache, "clocks.txt", TEXT, tokens=150, window=50)
    assert len(list(cache.iterdir())) == 4, "other code may give other logits"


def test_an_interrupted_reference_leaves_nothing(
    artifacts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(references, "window_logits", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reference_from_artifact(artifacts[0], tmp_path, "clocks.txt", TEXT)
    assert list(tmp_path.iterdir()) == []
    assert reference_from_artifact(artifacts[0], tmp_path, "clocks.txt", TEXT).window == 64, "max_len"


def test_a_damaged_reference_is_refused(reference: Reference) -> None:
    meta = reference.folder / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 2}))
    with pytest.raises(GristmillError, match="remove it to have it made again"):
        open_reference(reference.folder)
    with pytest.raises(GristmillError, match="holds no reference"):
        open_reference(reference.folder / "nowhere")


def test_other_models_are_refused(artifacts: list[Path], reference: Reference, tmp_path: Path) -> None:
    other = tiny_artifact(tmp_path / "without BOS", bos=False)
    with pytest.raises(GristmillError, match="makes other tokens of clocks.txt"):
        measure_accuracy(gristmill.load(other, threads=1), reference)
    with pytest.raises(GristmillError, match="max_len 40; load with more"):
        measure_accuracy(gristmill.load(artifacts[0], threads=1, max_len=40), reference)
    with pytest.raises(GristmillError, match="not the same model"):
        compare(lambda ids: iter([(0, np.zeros((len(ids), 7), np.float32))]), reference, str)


def test_last_words(artifacts: list[Path], reference: Reference, tmp_path: Path) -> None:
    passages = tmp_path / "passages.jsonl"
    passages.write_text("".join(json.dumps({"text": f"the clock struck {n}"}) + "\n" for n in ("one", "two")))
    found = measure_accuracy(gristmill.load(artifacts[0], threads=1), reference, last_word=passages)
    assert found.last_word is not None and found.last_word.passages == 2
    assert found.last_word.low <= found.last_word.accuracy <= found.last_word.high


@pytest.fixture(scope="module")
def py7m_int8(py7m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("py7m") / "int8"
    gristmill.compile(py7m, out, weights="int8", gate=False)
    return out


def test_the_best_reference(artifacts: list[Path], py7m_int8: Path) -> None:
    assert best_reference([py7m_int8, artifacts[1]]) == (artifacts[1], "f32 weights")
    assert best_reference([py7m_int8]) is None and best_reference([]) is None


def test_the_example_model(
    py7m: Path, py7m_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the model itself, in groups of windows; the second time nothing is traced."""
    text = (Path(__file__).parents[2] / "compiler" / "data" / "gate_code.txt").read_text()
    monkeypatch.setattr(references, "GROUP_TOKENS", 200)
    asked: dict[str, Any] = {"tokens": 500, "window": 128}
    stages: list[tuple[str, float]] = []
    found = reference_from_model(
        py7m, tmp_path, "gate_code.txt", text, **asked, progress=lambda *now: stages.append(now)
    )
    assert stages[0] == ("trace", 0.0) and stages[-1] == ("reference", 1.0)
    assert found.name == "float model py7m"
    monkeypatch.setattr(pipeline, "float_model", None)
    assert reference_from_model(py7m, tmp_path, "gate_code.txt", text, **asked) == found
    measured: Accuracy = measure_accuracy(gristmill.load(py7m_int8, threads=1), found)
    assert 0 < measured.kl.estimate < 0.01 and measured.top1_agreement > 0.95
    assert measured.ppl == pytest.approx(measured.reference_ppl, rel=0.05)
    assert measured.tokens == 496, "the first token of a window has nothing before it"
