"""Checkpoints of compressed-tensors (llm-compressor): integers packed into words, and fp8.

Integers (`pack-quantized`), a layer X of k inputs and n outputs:
    X.weight_packed      [n, ceil(k * bits / 32)] i32: words run along the inputs, q + 2**(bits - 1) unsigned
    X.weight_scale       [n, G]
    X.weight_zero_point  asymmetric: [ceil(n * bits / 32), G] i32, words run down the outputs; older files
                         have [n, G] i8
    X.weight_shape       [2]: n, k
    X.weight_g_idx       [k] i32, with actorder "group": the group of each input
Unpacked int8 (`int-quantized`, `naive-quantized`) has X.weight [n, k] i8 in place of weight_packed. For fp8
(`float-quantized`) see the module fp8. How activations would be quantized is not read: that is the compiler's
decision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.quant.formats import fp8
from gristmill.quant.formats.weight import (
    QuantizedWeight,
    Tensors,
    assemble,
    plan_columns,
    require_shape,
    require_tensors,
)
from gristmill.quant.formats.words import WORD, pack_words, unpack_words
from gristmill.runtime.errors import GristmillError

Array = NDArray[Any]
PACKED, UNPACKED, FLOAT = "pack-quantized", ("int-quantized", "naive-quantized"), "float-quantized"
FORMATS = (PACKED, *UNPACKED, FLOAT)
STRATEGIES = ("tensor", "channel", "group", "block")
MARKER = "weight_scale"
PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
    "input_zero_point", "output_scale", "output_zero_point",
)  # fmt: skip


@dataclass(frozen=True)
class WeightArguments:
    """How the weights of a group of layers are quantized. kind: "int" or "float"; group_size 0: the row."""

    targets: tuple[str, ...]
    layout: str
    kind: str
    bits: int
    strategy: str
    group_size: int
    symmetric: bool
    block: tuple[int, int] | None = None

    def names(self, module: str) -> bool:
        """Whether a target is this very layer, or a pattern that its name begins with."""
        return any(
            re.match(t.removeprefix("re:"), module) if t.startswith("re:") else t == module
            for t in self.targets
        )


@dataclass(frozen=True)
class CompressedConfig:
    """config_groups in their order."""

    groups: tuple[WeightArguments, ...]

    def of(self, module: str) -> WeightArguments:
        """A layer's group: one that names it, else the first that names a class (all are linears here)."""
        named = [group for group in self.groups if group.names(module)]
        classes = [g for g in self.groups if any("." not in t and not t.startswith("re:") for t in g.targets)]
        found = named or classes
        if not found:
            raise GristmillError(f"{module} is quantized, but no entry of config_groups is meant for it")
        return found[0]


def read_config(config: Mapping[str, Any]) -> CompressedConfig:
    """Check quantization_config. Raises GristmillError for what is laid out otherwise."""
    for extra in ("transform_config", "sparsity_config"):
        settings = config.get(extra)
        if settings and not (isinstance(settings, dict) and settings.get("format") == "dense"):
            raise GristmillError(f"compressed-tensors with {extra} is not supported")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise GristmillError(
            "compressed-tensors: quantization_config has no config_groups; expected one or more"
        )
    return CompressedConfig(tuple(_arguments(name, g, config.get("format")) for name, g in groups.items()))


def _arguments(name: str, group: Any, layout: Any) -> WeightArguments:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise GristmillError(f"compressed-tensors: {name} does not quantize weights, which is not supported")
    layout = group.get("format") or layout or PACKED
    if layout not in FORMATS:
        raise GristmillError(
            f"compressed-tensors format {layout!r} is not supported; expected one of {', '.join(FORMATS)}"
        )
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits"), weights.get("strategy")
    group_size = int(weights.get("group_size") or 0)
    strategy = strategy or ("group" if group_size > 0 else "channel" if group_size == -1 else "tensor")
    if (
        strategy not in STRATEGIES
        or (kind == "float") != (layout == FLOAT)
        or not isinstance(bits, int)
        or bits not in ((8,) if layout != PACKED else (4, 8))
    ):
        raise GristmillError(
            f"compressed-tensors: {name} has {bits} bits of type {kind!r} by {strategy!r} in {layout}, which "
            f"is not supported; expected int of 4 or 8 bits or float of 8, by {', '.join(STRATEGIES)}"
        )
    block = weights.get("block_structure") if strategy == "block" else None
    return WeightArguments(
        tuple(map(str, group.get("targets") or ())), layout, kind, bits, strategy,
        max(group_size, 0) if strategy == "group" else 0, bool(weights.get("symmetric", True)),
        (int(block[0]), int(block[1])) if block else None,
    )  # fmt: skip


def read_weight(config: CompressedConfig, tensors: Tensors, module: str) -> QuantizedWeight:
    """Layer `module` of a compressed-tensors checkpoint."""
    arguments = config.of(module)
    if arguments.layout == FLOAT:
        require_tensors(tensors, module, ("weight", "weight_scale"))
        return fp8.read_scaled(tensors, module, "weight_scale", arguments.block, arguments.group_size)
    packed = arguments.layout == PACKED
    require_tensors(
        tensors, module, ("weight_packed", "weight_scale", "weight_shape") if packed else ("weight",)
    )
    n, k = _shape(tensors, module, packed)
    scale = _scale(tensors, module, n, k, arguments)
    name = f"{module}.weight_g_idx"
    g_idx = tensors.read(name).numpy() if name in tensors else None
    columns = plan_columns(module, k, scale.shape[1], arguments.group_size, g_idx)
    zero = None if arguments.symmetric else _zero(tensors, module, scale.shape, arguments.bits)
    return assemble(
        module, k, arguments.bits, columns, scale, zero,
        lambda: _integers(tensors, module, n, k, arguments.bits, packed),
    )  # fmt: skip


def _shape(tensors: Tensors, module: str, packed: bool) -> tuple[int, int]:
    """n, k of a layer."""
    if not packed:
        n, k = tensors.shape(f"{module}.weight")
        return n, k
    n, k = (int(x) for x in tensors.read(f"{module}.weight_shape").tolist())
    return n, k


def _integers(tensors: Tensors, module: str, n: int, k: int, bits: int, packed: bool) -> Array:
    """q [n, k], unsigned."""
    if not packed:
        signed: Array = tensors.read(f"{module}.weight").numpy()
        return (signed.astype(np.int16) + 128).astype(np.uint8)
    return unpack_words(tensors.read(f"{module}.weight_packed").numpy(), bits)[:, :k]


def _scale(tensors: Tensors, module: str, n: int, k: int, arguments: WeightArguments) -> Array:
    """[n, G] f32; a single scale of a whole tensor is every row's."""
    if arguments.layout == PACKED:
        require_shape(tensors, f"{module}.weight_packed", (n, -(-k * arguments.bits // WORD)))
    name = f"{module}.weight_scale"
    scale: Array = tensors.read(name).numpy().astype(np.float32)
    if scale.size == 1:
        return np.full((n, 1), scale.reshape(()))
    if scale.ndim == 1:
        scale = scale[:, None]
    if scale.ndim != 2 or len(scale) != n:
        require_shape(tensors, name, (n, -(-k // (arguments.group_size or k))))
    return np.ascontiguousarray(scale)


def _zero(tensors: Tensors, module: str, shape: Sequence[int], bits: int) -> Array:
    """[n, G], unsigned."""
    require_tensors(tensors, module, ("weight_zero_point",))
    name = f"{module}.weight_zero_point"
    n, groups = shape
    stored: Array = tensors.read(name).numpy()
    if stored.dtype == np.int32:
        require_shape(tensors, name, (-(-n * bits // WORD), groups))
        return np.ascontiguousarray(unpack_words(stored.T, bits)[:, :n].T)
    signed = np.broadcast_to(
        stored.astype(np.int16).reshape(len(stored) if stored.ndim else 1, -1), (n, groups)
    )
    return (signed + (1 << (bits - 1))).astype(np.uint8)


def write_weight(
    bits: int, q: Array, scale: Array, zero: Array | None, g_idx: Array | None
) -> dict[str, Array]:
    """The tensors of a layer by suffix.

    q: [n, k] and zero: [n, G] of 0..2**bits - 1; zero None: symmetric. scale: [n, G]. g_idx: [k] or None.
    """
    tensors = {
        "weight_packed": pack_words(q, bits),
        "weight_scale": np.ascontiguousarray(scale),
        "weight_shape": np.array(q.shape, np.int64),
    }
    if zero is not None:
        tensors["weight_zero_point"] = np.ascontiguousarray(pack_words(np.ascontiguousarray(zero.T), bits).T)
    if g_idx is not None:
        tensors["weight_g_idx"] = g_idx.astype(np.int32)
    return tensors
