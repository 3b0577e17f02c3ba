"""The real small model: greedy text equal to transformers in float32, and what quantization costs it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import gristmill
from gristmill.runtime.evaluation import score_text


@pytest.fixture(scope="module")
def text(shared: Path) -> str:
    return (shared / "data" / "tinystories_dev.txt").read_text("utf-8")[:100_000]


def test_two_hundred_greedy_tokens_equal_transformers(stories260k: Path, stories_f32: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32).eval()
    bos = model.config.bos_token_id
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        want = model.generate(torch.tensor([[bos]]), max_new_tokens=200, do_sample=False)
    got = gristmill.load(stories_f32).generate([bos], max_new_tokens=200, ignore_eos=True)
    assert got.token_ids == want[0, 1:].tolist()


def test_int8_weights_and_cache_cost_under_three_per_mille(
    stories260k: Path, stories_f32: Path, tmp_path: Path, text: str
) -> None:
    gristmill.compile(stories260k, tmp_path / "int8", weights="int8", kv="int8", gate=False)
    exact = score_text(gristmill.load(stories_f32), text)
    quantized = score_text(gristmill.load(tmp_path / "int8"), text)
    increase = np.exp(quantized.nll - exact.nll) - 1
    assert abs(increase) < 0.003, f"perplexity changes by {100 * increase:.3f} %"
