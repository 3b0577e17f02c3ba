"""TorchScript files, scripted and traced, become artifacts with their logits; others are refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import Gpt, SpelledBlock, randomized
from scripts import VOCABULARY, Scripted
from tiny import byte_tokenizer
from torch import nn

import gristmill
from gristmill.cli import run_command
from gristmill.runtime.errors import GristmillError

pytest.importorskip("torch._export.converter", reason="this torch reads no TorchScript any more")
TOLERANCE = 1e-4  # of the largest logit


class First(nn.Module):
    """The first result of a module, for torch.jit.trace."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(tokens)[0]


def traced() -> Any:
    return torch.jit.trace(
        randomized(First(Gpt(SpelledBlock, layers=1))), torch.zeros(1, 9).long(), check_trace=False
    )


SCRIPTS: dict[str, Any] = {
    "traced, attention spelled out": traced,
    "scripted, torch's attention": lambda: torch.jit.script(randomized(Scripted(hook=False))),
    "scripted, our attention": lambda: torch.jit.script(randomized(Scripted(hook=True))),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", SCRIPTS)
def test_logits_are_the_files(name: str, tmp_path: Path) -> None:
    module = SCRIPTS[name]()
    torch.jit.save(module, tmp_path / "decoder.pt")
    gristmill.compile(tmp_path / "decoder.pt", tmp_path / "a", weights="f32", gate=False, max_len=64)
    session = gristmill.load(tmp_path / "a", threads=1)
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, 40).tolist()
    with torch.no_grad():
        expected = module(torch.tensor(tokens)[None])[0].numpy()
    with session.slot() as slot:
        found = session.forward(tokens, range(40), [slot] * 40, list(range(40)))
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()
    assert session.program.weights, "a program without weights"


def test_the_command_takes_a_tokenizer(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(randomized(Scripted(hook=True))), tmp_path / "d.pt")
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    words = ["compile", str(tmp_path / "d.pt"), "-o", str(tmp_path / "a"), "--tokenizer",
             str(tmp_path / "tokenizer.json"), "--group-size", "32",
             "--gate-tokens", "100", "--max-len", "64"]  # fmt: skip
    assert run_command(words) == 0
    assert gristmill.load(tmp_path / "a", threads=1).generate("ab", max_new_tokens=3).text is not None


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        while bool(x.sum() > 1):
            x = x / 2
        return self.head(x)


class Three(Loop):
    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.head(self.embed(a + b + c))


@pytest.mark.parametrize("module, message", [
    (Loop, r"d\.pt: torch cannot convert this TorchScript: prim::Loop"),
    (Three, r"d\.pt: forward\(a: Tensor, b: Tensor, c: Tensor\) is not forward\(tokens\)"),
])  # fmt: skip
def test_what_cannot_be_converted_is_named(module: Any, message: str, tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(module()), tmp_path / "d.pt")
    with pytest.raises(GristmillError, match=message) as caught:
        gristmill.compile(tmp_path / "d.pt", tmp_path / "a", gate=False)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    with pytest.raises(GristmillError, match=r"state\.pt: not a TorchScript file"):
        gristmill.compile(tmp_path / "state.pt", tmp_path / "a")
    with pytest.raises(GristmillError, match=r"none\.pt: no such file"):
        gristmill.compile(tmp_path / "none.pt", tmp_path / "a")
    with pytest.raises(GristmillError, match="tokenizer is for modules and TorchScript files"):
        gristmill.compile(tmp_path, tmp_path / "a", tokenizer="x")
    with pytest.raises(GristmillError, match="model is int, expected a directory"):
        gristmill.compile(3, tmp_path / "a")
