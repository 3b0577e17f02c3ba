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


def test_int4_by_gptq_with_the_gate(tmp_path: Path, text: Path) -> None:
    tokenizer = byte_tokenizer()
    module = randomized(Llama(layers=1, window=0)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    options: dict[str, Any] = {"method": "gptq", "calibration": text, "samples": 4, "sample_length": 64}
    result = gristmill.compile(
        module, tmp_path / "a", tokenizer=tokenizer, weights="int4", group_size=32, kv="int8", rotate=True,
        text=text, gate_tokens=200, max_len=64, **options,
    )  # fmt: skip
    evaluation = result.summary["evaluation"]
    assert evaluation["tokens"] > 100 and 0 < evaluation["kl"]["estimate"] < 1
    assert evaluation["command"].startswith("gristmill.compile(Llama, 'OUT', weights='int4', group_size=32")
    assert open_artifact(tmp_path / "a").manifest["quantization"]["rotated"]
    assert module.training and all(torch.equal(before[n], v) for n, v in module.state_dict().items())
    assert gristmill.load(tmp_path / "a", threads=1).generate("def f", max_new_tokens=4).text
    with pytest.raises(GristmillError, match="was compiled from a module"):
        gristmill.export_checkpoint(tmp_path / "a", tmp_path / "b", to="gptq")


class Bare(nn.Module):
    """An embedding, something, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 24), nn.Linear(24, 32)
        self.middle: nn.Module = self.Middle()

    class Middle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embed(tokens)))


def with_middle(forward: Any) -> nn.Module:
    """A Bare whose middle computes ``forward(x)``."""

    class Middle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(x)

    module = Bare()
    module.middle = Middle()
    return randomized(module)


def branch(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum() > 0 else x


def uncapped(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]


def biased(x: torch.Tensor) -> torch.Tensor:
    bias = torch.arange(x.shape[1]).float()[None, None, None, :].expand(1, 1, x.shape[1], -1)
    return torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], bias)[:, 0]


REFUSED: dict[str, tuple[Any, str]] = {
    "cumsum": (lambda x: x.cumsum(1), r"rows depend on each other at aten\.cumsum\.default in middle"),
    "mean over rows": (
        lambda x: x - x.mean(1, keepdim=True),
        r"rows depend on each other at aten\.mean\.dim in mid",
    ),
    "number of rows": (lambda x: x / x.shape[1], r"rows depend on each other at aten\.div\.Tensor in middle"),
    "branch": (
        branch,
        r"control flow or shapes depend on the values.*\(at middle, test_frontend_module\.py:\d+\)",
    ),
    "data-dependent shape": (
        lambda x: x[x[..., 0] > 0][None],
        r"its shapes depend on the values of tensors \(at .* in middle\)",
    ),
    "fixed rows": (lambda x: x.view(1, 13, 24), "fixes the number of tokens"),
    "an op": (lambda x: x.sort(-1).values, r"cannot lower aten\.sort\.default in middle"),
    "last row": (lambda x: x[:, -1:], r"logits \[1, 1, 32\] for \[1, T\] tokens; expected a row for each"),
    "not causal": (
        uncapped,
        "attention at aten.scaled_dot_product_attention.default in middle .* not causal",
    ),
    "a bias": (biased, r"what it adds to scores is not a mask of 0 and -inf"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    forward, message = REFUSED[name]
    with pytest.raises(GristmillError, match=message) as caught:
        gristmill.compile(with_middle(forward), tmp_path / "a", weights="f32", gate=False, max_len=32)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_its_own_is_refused(tmp_path: Path) -> None:
    class Cached(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.seen, torch.Tensor)
            self.seen.add_(1)
            return super().forward(tokens) * self.seen

    with pytest.raises(GristmillError, match="writes into its buffer 'seen' while it runs"):
        gristmill.compile(randomized(Cached()), tmp_path / "a", gate=False)


class Many(Bare):
    def forward(self, tokens: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(tokens) * scale


@pytest.mark.parametrize("module, given, message", [
    (Bare, {}, "the gate reads text, which needs a tokenizer"),
    (Bare, {"gate": False, "method": "gptq"}, "calibration reads text, which needs a tokenizer"),
    (Bare, {"tokenizer": byte_tokenizer()}, "the tokenizer has 258 ids, the logits are 32 wide"),
    (Bare, {"tokenizer": "nowhere"}, "tokenizer nowhere: no such file or directory"),
    (Bare, {"example": torch.zeros(1, 4)}, r"argument 0 is a tensor float32 \[1, 4\], expected token ids"),
    (Bare, {"example": (torch.zeros(2, 4).long(),)}, "has 2 sequences, expected one"),
    (Bare, {"example": (torch.zeros(1, 4).long(), torch.zeros(1, 4).long())}, "not hold the positions 0, 1"),
    (Many, {}, "forward needs 'scale', which is neither token ids nor positions; give example="),
    (lambda: Gpt(layers=1), {"gate": False, "max_len": BLOCK + 1}, f"{BLOCK + 1} is beyond the {BLOCK} pos"),
])  # fmt: skip
def test_arguments_are_checked(module: Any, given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match=message):
        gristmill.compile(module(), tmp_path / "a", **given)


def test_an_example_passes_constants_on_in_bf16(tmp_path: Path) -> None:
    module = randomized(Many()).to(torch.bfloat16)
    example = {"tokens": torch.zeros(4, dtype=torch.long)[None], "scale": 2.0}
    gristmill.compile(module, tmp_path / "a", example=example, weights="bf16", kv="f32", gate=False)
    tokens = list(range(20))
    with torch.no_grad():
        expected = module.float()(torch.tensor(tokens)[None], 2.0)[0].numpy()
    found = forward(gristmill.load(tmp_path / "a", threads=1), tokens)
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


def test_the_hook_trains() -> None:
    """Gradients of the op are those of torch's own attention."""
    tensors = [torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    results = []
    attends: tuple[Any, ...] = (
        gristmill.attention,
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
    )
    for attend in attends:
        given = [t.clone().requires_grad_() for t in tensors]
        out = attend(*given)
        results.append([out, *torch.autograd.grad(out.sin().sum(), given)])
    for ours, torchs in zip(*results, strict=True):
        assert torch.allclose(ours, torchs, atol=1e-10)
    with pytest.raises(ValueError, match="as many heads of k as of v"):
        gristmill.attention(tensors[0], tensors[1], tensors[0])
