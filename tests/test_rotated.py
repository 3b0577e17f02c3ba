"""Artifacts compiled with rotate: the same logits, two matrices for a tied pair, or one line that says no."""

from pathlib import Path

import numpy as np
import pytest
from families import VOCABULARY, save_tiny

import gristmill
from gristmill.compiler.options import CompileOptions
from gristmill.runtime.artifact import open_artifact
from gristmill.runtime.errors import GristmillError

TOLERANCE = 1e-5  # of the largest logit, float32 throughout


def logits(path: Path) -> np.ndarray:
    """Of one text of 40 tokens in slot 0."""
    ids = np.random.default_rng(1).integers(2, VOCABULARY, 32).astype(np.int32)
    rows = np.arange(len(ids), dtype=np.int32)
    session = gristmill.load(path, threads=1)
    return np.array(session.forward(ids, rows, np.zeros_like(rows), rows))


def test_a_rotated_artifact_computes_the_same(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "qwen2")
    for name, rotate in (("plain", False), ("rotated", True)):
        options = {"weights": "f32", "rotate": rotate, "max_tokens": 64, "gate_tokens": 128, "explain": True}
        result = gristmill.compile(tmp_path / "model", tmp_path / name, check_passes=rotate, **options)
    assert "is no longer the head too" in result.summary["ledger"]
    expected, got = logits(tmp_path / "plain"), logits(tmp_path / "rotated")
    assert float(np.abs(got - expected).max() / np.abs(expected).max()) < TOLERANCE
    artifact = open_artifact(tmp_path / "rotated")
    assert artifact.manifest["quantization"]["rotated"] is True
    assert {"model.embed_tokens", "lm_head"} <= set(artifact.manifest["quantization"]["schemes"])
    assert "--rotate" in result.summary["evaluation"]["command"]
    assert result.summary["evaluation"]["kl"]["estimate"] < 1e-7


@pytest.mark.parametrize("family, reason", [
    ("gpt2", r"gpt2: the residual stream cannot be rotated: a layer norm subtracts .* \(.*ln_f\)"),
    ("gemma2", r"gemma2: the residual stream cannot be rotated: a post-norm's weight .* \(.*layers\.1\)"),
])  # fmt: skip
def test_a_stream_that_cannot_be_rotated_is_refused(family: str, reason: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", family)
    with pytest.raises(GristmillError, match=reason):
        gristmill.compile(tmp_path / "model", tmp_path / "out", rotate=True, gate=False)
    assert not (tmp_path / "out").exists()


def test_rotate_is_yes_or_no() -> None:
    with pytest.raises(GristmillError, match="rotate is 'x', expected True or False"):
        CompileOptions.of(rotate="x")
