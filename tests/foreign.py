"""Tiny checkpoints in the layouts of other quantizers, packed by the book: one value after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import save_tiny
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

Array = NDArray[Any]
LLAMA: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Layer:
    """w[i, j] = scale[i, g_idx[j]] * (q[i, j] - zero[i, g_idx[j]]); q and zero unsigned."""

    bits: int
    q: Array  # [n, k]
    scale: Array  # [n, G] f16
    zero: Array  # [n, G]
    g_idx: Array  # [k]

    def values(self) -> Array:
        scale = self.scale.astype(np.float32)[:, self.g_idx]
        return scale * (self.q.astype(np.int64) - self.zero[:, self.g_idx]).astype(np.float32)


@dataclass(frozen=True)
class Kind:
    """group 0: the whole row. order: columns belong to groups at random."""

    bits: int = 4
    group: int = 32
    symmetric: bool = True
    order: bool = False


def random_layer(n: int, k: int, kind: Kind, seed: int, order_seed: int = 0) -> Layer:
    random = np.random.default_rng(seed)
    width = kind.group or k
    groups, middle = -(-k // width), 1 << (kind.bits - 1)
    scale = random.uniform(0.5, 1.5, (n, groups)) * 0.15 / middle * random.choice([-1, 1], (n, groups))
    zero = np.full((n, groups), middle)
    if not kind.symmetric:
        zero = random.integers(1, 2 * middle, (n, groups))  # readers do not agree about 0
    g_idx = np.arange(k) // width
    if kind.order:
        g_idx = np.random.default_rng(order_seed).permutation(g_idx)
    q = random.integers(0, 2 * middle, (n, k))
    return Layer(kind.bits, q, scale.astype(np.float16), zero, g_idx)


def words(values: Sequence[int], bits: int) -> list[int]:
    """32-bit words of a row of values, first value lowest; as signed integers."""
    number = sum(int(v) << (bits * i) for i, v in enumerate(values))
    count = -(-len(values) * bits // 32)
    plain = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [w - (1 << 32) if w >= 1 << 31 else w for w in plain]


def packed(rows: Array, bits: int) -> Tensor:
    return torch.tensor([words(row, bits) for row in rows.tolist()], dtype=torch.int32)


def gptq_tensors(layer: Layer, v1: bool = True) -> dict[str, Tensor]:
    top = (1 << layer.bits) - 1
    zero = (layer.zero - 1) & top if v1 else layer.zero
    return {
        "qweight": packed(layer.q, layer.bits).T.contiguous(),
        "qzeros": packed(zero.T, layer.bits),
        "scales": torch.from_numpy(layer.scale.T.copy()),
        "g_idx": torch.from_numpy(layer.g_idx.astype(np.int32)),
    }


def awq_tensors(layer: Layer) -> dict[str, Tensor]:
    def pack(rows: Array) -> Tensor:  # [R, n]
        eights = [[row[at + o] for at in range(0, len(row), 8) for o in AWQ_ORDER] for row in rows.tolist()]
        return packed(np.array(eights), 4)

    return {
        "qweight": pack(layer.q.T),
        "qzeros": pack(layer.zero.T),
        "scales": torch.from_numpy(layer.scale.T.copy()),
    }


def compressed_tensors(
    layer: Layer, symmetric: bool, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": packed(layer.q, layer.bits),
        "weight_scale": torch.from_numpy(layer.scale).to(dtype),
        "weight_shape": torch.tensor(layer.q.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = packed(layer.zero.T, layer.bits).T.contiguous()
    if (np.diff(layer.g_idx) < 0).any():
        tensors["weight_g_idx"] = torch.from_numpy(layer.g_idx.astype(np.int32))
    return tensors


def gptq_config(kind: Kind, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": kind.bits, "group_size": kind.group or -1, "sym": kind.symmetric,
        "desc_act": kind.order, "checkpoint_format": "gptq", **changes,
    }  # fmt: skip


def awq_config(kind: Kind, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": kind.group or -1, "version": "gemm",
        "zero_point": True, **changes,
    }  # fmt: skip


def compressed_config(kind: Kind, **changes: Any) -> dict[str, Any]:
    weights = {
        "num_bits": kind.bits, "type": "int", "symmetric": kind.symmetric, "dynamic": False,
        "strategy": "group" if kind.group else "channel", "group_size": kind.group or None,
        "actorder": "group" if kind.order else None,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], **changes,
    }  # fmt: skip


Pack = Callable[[str, Layer], dict[str, Tensor]]


def save_quantized(
    directory: Path, kind: Kind, settings: dict[str, Any], pack: Pack, family: str = "llama", **changes: Any
) -> dict[str, Layer]:
    """A model in `directory` whose linears are random layers, and beside it a float twin.

    Linears of one input share their order where kind.order. Returns the layers by name.
    """
    plain = directory.with_name(directory.name + "-float")
    plain.mkdir(parents=True)
    save_tiny(plain, family, **(LLAMA if family == "llama" else {}) | changes)
    tensors = load_file(plain / "model.safetensors")
    names = [n for n in tensors if n.endswith(("_proj.weight", ".c_attn.weight", ".c_fc.weight"))]
    turned = family == "gpt2"  # its Conv1D keeps weights as [inputs, outputs]
    layers = {}
    for seed, name in enumerate(sorted(names)):
        n, k = tensors[name].T.shape if turned else tensors[name].shape
        layers[name.removesuffix(".weight")] = random_layer(n, k, kind, seed)
    values = {f"{n}.weight": torch.from_numpy(layer.values()) for n, layer in layers.items()}
    floats = tensors | {n: v.T if turned else v for n, v in values.items()}
    write_model(plain, floats, None)
    rest = {n: t for n, t in tensors.items() if n not in names}
    foreign = {f"{n}.{part}": t for n, layer in layers.items() for part, t in pack(n, layer).items()}
    copy_model(plain, directory, rest | foreign, settings)
    return layers


def copy_model(
    source: Path, directory: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (directory / name).write_bytes((source / name).read_bytes())
    write_model(directory, tensors, settings)


def write_model(directory: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None) -> None:
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    if settings is not None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def changed(kind: Kind, **changes: Any) -> Kind:
    return replace(kind, **changes)
