"""Adapters over artifacts of AWQ, whose linears read and give scaled channels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import logits_of, merged, random_pairs, save_adapter
from families import save_tiny

import gristmill
from gristmill.export.weights import Contents
from gristmill.runtime.adapters.bind import refuse_artifact
from gristmill.runtime.artifact import open_artifact
from gristmill.runtime.errors import GristmillError

IDS = [0, 17, 42, 5, 99, 256, 3, 3, 71]
LINEARS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "qwen2": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}


class Scaled(Contents):
    """An artifact's weights as its source would have them: channels not scaled."""

    def values(self, segment: Any, rows: Any = slice(None)) -> Any:
        w: Any = super().values(segment, rows)
        for side, at in (("output_scale", (slice(None), None)), ("input_scale", (None, slice(None)))):
            if f"{segment.name}.{side}" in self._header:
                w = w / self.tensor(f"{segment.name}.{side}")[at]
        return w

    @property
    def count(self) -> int:
        return sum(name.endswith("put_scale") for name in self._header)


def with_weights_of(model: Any, contents: Scaled) -> Any:
    """The model with the matrices that the artifact holds."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())  # a tied one once
    for name in contents.segments:
        tensor, w = contents.float_matrix(name)
        parameters[tensor].data = torch.from_numpy(np.ascontiguousarray(w)).float()
    return model


@pytest.mark.parametrize("family, method", [*((family, "awq") for family in LINEARS), ("llama", "awq+gptq")])
def test_an_adapter_follows_the_scales(tmp_path: Path, text: Path, family: str, method: str) -> None:
    model = save_tiny(tmp_path / "model", family)
    with torch.no_grad():  # channels that differ, so that scaling them helps
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                parameter.mul_(torch.logspace(-1, 1, len(parameter)))
    model.save_pretrained(tmp_path / "model")
    gristmill.compile(
        tmp_path / "model", tmp_path / "out", method=method, weights="int4", group_size=32, activations="f32",
        kv="f32", calibration=text, samples=4, sample_length=64, gate=False,
    )  # fmt: skip
    tensors = random_pairs(model, LINEARS[family], size=0.1)
    folder = save_adapter(tmp_path / "adapter", tensors)
    contents = Scaled(open_artifact(tmp_path / "out"))
    assert contents.count > 0
    base = with_weights_of(model, contents)
    session = gristmill.load(tmp_path / "out", threads=2, adapters={"a": folder})
    for adapter, expected in ((None, logits_of(base, IDS)), ("a", logits_of(merged(base, tensors), IDS))):
        with session.slot(adapter=adapter) as slot:
            got = session.forward(IDS, np.arange(len(IDS)), [slot] * len(IDS))
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_an_artifact_without_its_scales_is_refused(tmp_path: Path, text: Path) -> None:
    """As versions before wrote it."""
    save_tiny(tmp_path / "model", "llama")
    gristmill.compile(
        tmp_path / "model", tmp_path / "out", method="awq", calibration=text, samples=2, sample_length=16,
        gate=False,
    )  # fmt: skip
    artifact = open_artifact(tmp_path / "out")
    artifact.manifest["quantization"].pop("channel_scales")
    with pytest.raises(GristmillError, match="did not keep how it scaled.*--lora"):
        refuse_artifact(artifact)
