"""LoRA adapters as PEFT writes them, made by hand, and what they make of a model's weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "made/by-hand", "r": 4,
    "lora_alpha": 12, "lora_dropout": 0.05, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
    "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    "init_lora_weights": True, "inference_mode": True, "layers_to_transform": None, "revision": None,
}  # fmt: skip


def targets_of(model: Any, kinds: Iterable[str]) -> dict[str, Any]:
    """The modules of a transformers model whose names end in one of `kinds`, by name."""
    wanted = set(kinds)
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in wanted}


def random_pairs(
    model: Any, kinds: Iterable[str], rank: int = 4, seed: int = 0, size: float = 0.2
) -> dict[str, Tensor]:
    """lora_A and lora_B of every target, under PEFT's names."""
    made, generator = {}, torch.Generator().manual_seed(seed)
    for name, module in targets_of(model, kinds).items():
        n, k = module.weight.shape
        if type(module).__name__ in ("Conv1D", "Embedding"):  # both keep [inputs, outputs]
            n, k = k, n
        table = type(module).__name__ == "Embedding"
        ends = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
        for end, shape in zip(ends, ((rank, k), (n, rank)), strict=True):
            made[f"{PREFIX}{name}.{end}"] = size * torch.randn(shape, generator=generator)
    return made


def save_adapter(directory: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """Writes the folder; `config` changes CONFIG."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


def merged(model: Any, tensors: dict[str, Tensor], scale: float = 3.0) -> Any:
    """The model with W + scale B A in place of W, by the textbook."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for key, a in tensors.items():
            if "lora_A" not in key and "lora_embedding_A" not in key:
                continue
            b = tensors[key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
            module = modules[key.removeprefix(PREFIX).rpartition(".lora_")[0]]
            delta = scale * (b.double() @ a.double()).float()
            module.weight += delta if module.weight.shape == delta.shape and not _turned(module) else delta.T
    return model


def _turned(module: Any) -> bool:
    return type(module).__name__ in ("Conv1D", "Embedding")


def logits_of(model: Any, ids: Iterable[int]) -> np.ndarray:
    """transformers' logits [T, V] of one sequence."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()
