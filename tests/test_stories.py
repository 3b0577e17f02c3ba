"""The real small model: greedy text equal to transformers in float32, and what quantization costs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import gristmill
from gristmill.runtime.evaluation import score_text

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
MODEL = SHARED / "models" / "stories260k"
TEXT = SHARED / "data" / "tinystories_dev.txt"

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="../shared/models/stories260k is not here")


@pytest.fixture(scope="module")
def text() -> str:
    return TEXT.read_text("utf-8")[:100_000]


@pytest.fixture(scope="module")
def float_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stories") / "f32"
    gristmill.compile(MODEL, out, weights="f32", gate=False)
    return out


def test_two_hundred_greedy_tokens_equal_transformers(float_artifact: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    bos = model.config.bos_token_id
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        want = model.generate(torch.tensor([[bos]]), max_new_tokens=200, do_sample=False)
    got = gristmill.load(float_artifact).generate([bos], max_new_tokens=200, ignore_eos=True)
    assert got.token_ids == want[0, 1:].tolist()


def test_int8_weights_and_cache_cost_under_three_per_mille(
    float_artifact: Path, tmp_path: Path, text: str
) -> None:
    gristmill.compile(MODEL, tmp_path / "int8", weights="int8", kv="int8", gate=False)
    exact = score_text(gristmill.load(float_artifact), text)
    quantized = score_text(gristmill.load(tmp_path / "int8"), text)
    increase = np.exp(quantized.nll - exact.nll) - 1
    assert abs(increase) < 0.003, f"perplexity changes by {100 * increase:.3f} %"
