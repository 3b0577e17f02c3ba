"""Modules that transformers does not know compile to artifacts whose logits are theirs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import BLOCK, VOCABULARY, Gpt, Llama, Repeated, SpelledBlock, randomized
from tiny import byte_tokenizer
from torch import nn

import gristmill
from gristmill.compiler.frontends.forward import call_of
from gristmill.runtime.artifact import open_artifact
from gristmill.runtime.errors import GristmillError

TOLERANCE = 1e-4  # of the largest logit
DECODERS: dict[str, Any] = {
    "learned positions": Gpt,
    "attention spelled out": lambda: Gpt(SpelledBlock),
    "own rotations, windows": Llama,
    "a mask, repeated heads": Repeated,
    "a mask with a window": lambda: Repeated(window=5),
}


def eager(module: nn.Module, tokens: list[int]) -> np.ndarray:
    """The module's own logits [T, V]."""
    ids = torch.tensor(tokens)[None]
    call = call_of(module)
    with torch.no_grad():
        return call.run(module, ids, torch.arange(len(tokens))[None])[0].numpy()


def eager_greedy(module: nn.Module, tokens: list[int], count: int) -> list[int]:
    out = list(tokens)
    for _ in range(count):
        out.append(int(eager(module, out)[-1].argmax()))
    return out[len(tokens) :]


def forward(session: Any, tokens: list[int]) -> np.ndarray:
    with session.slot() as slot:
        return session.forward(tokens, range(len(tokens)), [slot] * len(tokens), list(range(len(tokens))))


@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_greedy_text_are_the_modules(name: str, tmp_path: Path) -> None:
    module = randomized(DECODERS[name]())
    gristmill.compile(module, tmp_path / "a", weights="f32", gate=False)
    session = gristmill.load(tmp_path / "a", threads=1)
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, 40).tolist()
    expected = eager(module, tokens)
    assert np.abs(forward(session, tokens) - expected).max() < TOLERANCE * np.abs(expected).max()
    found = session.generate(tokens[:20], max_new_tokens=50, temperature=0).token_ids
    assert found == eager_greedy(module, tokens[:20], 50)
