"""Scales tuned together: gradients reach them, and the result is kept where it helps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny

import gristmill
from gristmill.compiler import calibrate, tune_scales
from gristmill.quant.methods import Calibrated, quantize_calibrated
from gristmill.runtime.report import artifact_summary, quantization_rows, read_program

OPTIONS: dict[str, Any] = {
    "group_size": 32, "gate": False, "samples": 128, "sample_length": 64, "activations": "f32", "kv": "f32",
}  # fmt: skip


def sharp_model(directory: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny model whose predictions are far from even, so that quantizing costs something."""
    net = save_tiny(directory, family, **changes)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 2:
                parameter *= 2
    net.save_pretrained(directory)
    return directory


def record(path: Path) -> dict[str, Any] | None:
    found: dict[str, Any] = json.loads((path / "manifest.json").read_text())["quantization"]
    return found.get("tuning")


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {"hidden_size": 48, "intermediate_size": 80}),  # groups of 32 with a short last one
        ("gpt2", {}),
    ],
)
def test_scales_that_are_off_are_brought_back(
    family: str, changes: dict[str, Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quantizer is made to return scales a tenth too large."""
    honest = quantize_calibrated

    def too_large(*args: Any) -> Calibrated:
        result = honest(*args)
        q = result.quantized
        return replace(result, quantized=replace(q, scale=(q.scale * 1.1).astype(q.scale.dtype)))

    monkeypatch.setattr(calibrate, "quantize_calibrated", too_large)
    model = sharp_model(tmp_path / "model", family, **changes)
    lines: list[str] = []
    options = OPTIONS | {"calibration": text, "weights": "int4", "method": "gptq"}
    gristmill.compile(model, tmp_path / "plain", **options, tune_epochs=0)
    gristmill.compile(model, tmp_path / "tuned", **options, tune_epochs=3, note=lines.append)
    assert record(tmp_path / "plain") is None
    done = record(tmp_path / "tuned")
    assert done is not None and done["kept"] and done["kl_after"] < 0.9 * done["kl_before"]
    assert (done["samples"], done["held_samples"]) == (112, 16)
    assert any("scales tuned together" in line for line in lines)
    assert "scales" in dict(quantization_rows(artifact_summary(*read_program(tmp_path / "tuned"))))
    assert measured_kl(tmp_path / "tuned", model, text) < measured_kl(tmp_path / "plain", model, text)


def measured_kl(artifact: Path, model: Path, text: Path) -> float:
    """Of the artifact's own predictions, on the tokens of its calibration."""
    from transformers import AutoModelForCausalLM

    session = gristmill.load(artifact)
    tokens = session.tokenizer.encode(text.read_text()[:800])[:200]
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total = 0.0
    for first in range(0, 200, 50):
        ids = tokens[first : first + 50]
        with torch.inference_mode():
            expected = net(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = torch.from_numpy(session.forward(ids, range(len(ids)), [0] * len(ids))).log_softmax(-1)
        total += float((expected.exp() * (expected - found)).sum())
    return total / 200


def test_two_runs_have_the_same_bytes(text: Path, tmp_path: Path) -> None:
    model = sharp_model(tmp_path / "model", "llama")
    options = OPTIONS | {"calibration": text, "weights": "int2", "method": "awq+gptq", "samples": 16}
    options["asymmetric"] = True
    ids = []
    for name in ("a", "b"):
        gristmill.compile(model, tmp_path / name, **options)
        found = record(tmp_path / name)
        assert found is not None and found["epochs"] == tune_scales.DEFAULT_EPOCHS
        ids.append(json.loads((tmp_path / name / "manifest.json").read_text())["content_id"])
    assert ids[0] == ids[1]
    assert not list(tmp_path.glob(".*"))


def test_what_would_not_help_is_left(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide weights and single samples are not tuned, small losses not by themselves, bad results not kept."""
    model = sharp_model(tmp_path / "model", "llama")
    options = OPTIONS | {"calibration": text, "method": "gptq", "samples": 16}
    gristmill.compile(model, tmp_path / "wide", **options, weights="int8", tune_epochs=1)
    assert record(tmp_path / "wide") is None
    gristmill.compile(model, tmp_path / "one", **options | {"samples": 1}, weights="int4", tune_epochs=1)
    assert record(tmp_path / "one") is None
    gristmill.compile(model, tmp_path / "search", **options | {"method": "rtn+search"}, weights="int4")
    assert record(tmp_path / "search") is None  # only GPTQ's scales are tuned unasked
    monkeypatch.setattr(tune_scales, "WORTHWHILE_KL", 1e9)
    gristmill.compile(model, tmp_path / "small", **options, weights="int4")
    small = record(tmp_path / "small")
    assert small is not None and small["epochs"] == 0 and not small["kept"]
    monkeypatch.setattr(tune_scales, "RATE", 10.0)
    gristmill.compile(model, tmp_path / "bad", **options, weights="int4", tune_epochs=1)
    bad = record(tmp_path / "bad")
    assert bad is not None and bad["epochs"] == 1 and not bad["kept"] and bad["kl_after"] > bad["kl_before"]
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("small", "bad")]
    assert weights[0] == weights[1]


def test_large_models_are_not_tuned_unasked(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    model = sharp_model(tmp_path / "model", "llama")
    monkeypatch.setattr(tune_scales, "MOST_OPERATIONS", 1.0)
    gristmill.compile(model, tmp_path / "a", **OPTIONS, calibration=text, method="gptq")
    assert record(tmp_path / "a") is None
