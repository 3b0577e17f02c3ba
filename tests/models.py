"""Tiny random transformers models, traced and fused with their weights held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gristmill.compiler import interpret, pipeline
from gristmill.compiler.trace import trace
from gristmill.passes.graph import Traced
from gristmill.passes.manager import run_passes

VOCABULARY = 96
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


class MemoryCheckpoint:
    """A state dict with the interface of a Checkpoint; ``reads`` lists what was read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.reads = tensors, list[str]()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def same(self, first: str, second: str) -> bool:
        return torch.equal(self.tensors[first], self.tensors[second])

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name].float()


def config_of(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **BASE | changes)


def random_model(config: Any) -> Any:
    """A transformers model in eager mode with weights that make its logits differ."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    return model


def checkpoint_of(model: Any) -> Any:
    tied = set(model.all_tied_weights_keys)
    return MemoryCheckpoint({k: v for k, v in model.state_dict().items() if k not in tied})


def traced_of(model: Any, config: Any, max_len: int = 64) -> Traced:
    return trace(config, checkpoint_of(model), max_len)


def fused(traced: Traced) -> Traced:
    run_passes(traced, pipeline.PASSES)
    return traced


def texts(*lengths: int) -> list[Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(2, VOCABULARY, n)) for n in lengths]


def batch(sequences: list[Tensor]) -> dict[str, Tensor]:
    """The inputs of a graph: the rows of every sequence in its own slot, logits of all rows."""
    slots = torch.cat([torch.full((len(s),), n) for n, s in enumerate(sequences)])
    return {
        "tokens": torch.cat(sequences)[None],
        "positions": torch.cat([torch.arange(len(s)) for s in sequences])[None],
        "slots": slots[None],
        "rows": torch.arange(len(slots)),
    }


def logits(traced: Traced, sequences: list[Tensor]) -> Tensor:
    return interpret.run(traced, batch(sequences))[0]


def expected(model: Any, sequences: list[Tensor]) -> Tensor:
    """transformers' logits, every sequence by itself."""
    with torch.no_grad():
        return torch.cat([model(input_ids=s[None]).logits[0] for s in sequences])


def relative(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest of ``wanted``."""
    return float((got - wanted).abs().max() / wanted.abs().max())
