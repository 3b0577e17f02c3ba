"""The example's training script: what is held out stays out, and what is saved is what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import train_py7m
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM


def test_held_out_files_are_never_trained_on() -> None:
    train, held = train_py7m.corpus()
    assert 0.01 < sum(map(len, held)) / sum(map(len, train)) < 0.06
    assert not set(train) & set(held)


def test_the_rate_warms_up_and_ends_small() -> None:
    assert train_py7m.rate(0, 100, 0.0) == pytest.approx(0.01)
    assert train_py7m.rate(100, 100, 0.0) == pytest.approx(1.0)
    assert train_py7m.rate(5000, 100, 1.0) == pytest.approx(0.02)


def test_saving_replaces_a_model_and_stores_the_tied_head_once(py7m: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(py7m, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(py7m / "tokenizer.json"))
    for loss in (3.0, 2.0):
        train_py7m.save(model, tokenizer, tmp_path / "out", {"held_out_loss": loss})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == {"held_out_loss": 2.0}
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 16_000_000
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight.float(), model.lm_head.weight)


def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    model, data = train_py7m.new_model(), torch.arange(600) % 50
    plan = train_py7m.Plan(sequence=32, batch=4, lr=1e-2, warmup=2, every=1.0, seed=0)
    losses = []
    for step, loss, _ in train_py7m.steps(model, data, plan, 1e9):
        losses.append(loss)
        if step == 12:
            break
    assert losses[-1] < losses[0] / 2
