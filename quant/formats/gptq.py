"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them.

A layer X of k inputs and n outputs has
    X.qweight  [k * bits / 32, n] i32: words run down the inputs
    X.qzeros   [G, n * bits / 32] i32: words run along the outputs
    X.scales   [G, n] f16
    X.g_idx    [k] i32: the group of each input; arbitrary with desc_act and no static groups
and w = scale * (q - zero). Format `gptq` (v1) stores every zero minus one, `gptq_v2` as it is.

v1 is not one format where a zero is 0. AutoGPTQ's kernels add one to each value and let it wrap; GPTQModel
subtracts and adds one constant to whole words, so that a borrow runs into the neighbour (and for 3 bits the
constant is not the one that its packing would ask for, which its own reader undoes). `meta.quantizer` in the
config says who wrote a file, and symmetric files show by their zeros which reading is meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.quant.formats.weight import (
    QuantizedWeight,
    Tensors,
    assemble,
    plan_columns,
    require_shape,
    require_tensors,
)
from gristmill.quant.formats.words import WORD, pack_words, span, unpack_words
from gristmill.runtime.errors import GristmillError

Array = NDArray[Any]
BITS = (2, 3, 4, 8)
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
MARKER = "qweight"
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GptqConfig:
    """The parts of quantization_config that say what the tensors mean. group_size -1: the whole row."""

    bits: int
    group_size: int
    checkpoint_format: str = "gptq"
    symmetric: bool = True
    quantizer: str = ""
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, module: str) -> tuple[int, int]:
        """Bits and group size of a layer: the first rule of `dynamic` that its name begins with counts."""
        for rule, changes in self.dynamic.items():
            if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), module):
                return int(changes.get("bits", self.bits)), int(changes.get("group_size", self.group_size))
        return self.bits, self.group_size


def read_config(config: Mapping[str, Any]) -> GptqConfig:
    """Check quantization_config. Raises GristmillError for a variant that is laid out otherwise."""
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in CHECKPOINT_FORMATS:
        raise GristmillError(
            f"gptq checkpoint_format {layout!r} is not supported; expected {', '.join(CHECKPOINT_FORMATS)}"
        )
    words = config.get("pack_dtype", "int32")
    if words != "int32":
        raise GristmillError(f"gptq weights packed into {words} are not supported; expected int32")
    bits, group_size = config.get("bits"), config.get("group_size", -1)
    if bits not in BITS or type(group_size) is not int:
        raise GristmillError(
            f"gptq with bits {bits!r} and group_size {group_size!r} is not supported; "
            f"expected bits {', '.join(map(str, BITS))} and an integer"
        )
    meta = config.get("meta")
    quantizer = str(meta.get("quantizer", "")) if isinstance(meta, dict) else ""
    symmetric = bool(config.get("sym", True))
    return GptqConfig(bits, group_size, str(layout), symmetric, quantizer, config.get("dynamic") or {})


def read_weight(config: GptqConfig, tensors: Tensors, module: str) -> QuantizedWeight:
    """Layer `module` of a GPTQ checkpoint."""
    require_tensors(tensors, module, ("qweight", "qzeros", "scales"))
    bits, group_size = config.of(module)
    name = {part: f"{module}.{part}" for part in PARTS}
    groups, n = tensors.shape(name["scales"])
    g_idx = tensors.read(name["g_idx"]).numpy() if name["g_idx"] in tensors else None
    k = len(g_idx) if g_idx is not None else tensors.shape(name["qweight"])[0] * WORD // bits
    require_shape(tensors, name["qweight"], (_words(k, bits), n))
    require_shape(tensors, name["qzeros"], (groups, _words(n, bits)))
    columns = plan_columns(module, k, groups, group_size, g_idx)
    scale = np.ascontiguousarray(tensors.read(name["scales"]).numpy().T)
    zero = decode_zeros(tensors.read(name["qzeros"]).numpy(), bits, config)[:, :n].T

    def read_q() -> Array:
        return unpack_words(tensors.read(name["qweight"]).numpy().T, bits)[:, :k]

    return assemble(module, k, bits, columns, scale, zero, read_q)


def decode_zeros(words: Array, bits: int, config: GptqConfig) -> NDArray[np.uint8]:
    """Zero points [G, n] of qzeros [G, words]."""
    if config.checkpoint_format == "gptq_v2":
        return unpack_words(words, bits)
    readings = [(unpack_words(words, bits) + np.uint8(1)) & np.uint8((1 << bits) - 1)]
    if "gptqmodel" in config.quantizer.lower():
        readings.insert(0, unpack_words(_add_one_to_words(words, bits), bits))
    middle = 1 << (bits - 1)
    symmetric = [zeros for zeros in readings if config.symmetric and (zeros == middle).all()]
    return (symmetric or readings)[0]


def _add_one_to_words(words: Array, bits: int) -> Array:
    """What GPTQModel does to whole words. Its constants for 3 bits stand in this order."""
    ones = pack_words(np.ones((1, span(bits) * WORD // bits), np.uint8), bits).view(np.uint32)[0]
    pattern = np.resize(ones[::-1], words.shape[1])
    total: Array = np.ascontiguousarray(words).view(np.uint32) + pattern
    return total


def _words(count: int, bits: int) -> int:
    """Words of `count` values; 3 bits come in threes."""
    return -(-count * bits // (WORD * span(bits))) * span(bits)


def write_weight(config: GptqConfig, q: Array, scale: Array, zero: Array, g_idx: Array) -> dict[str, Array]:
    """The tensors of a layer by suffix; `read_weight` is the inverse.

    q: [n, k] 0..2**bits - 1 in the layer's column order. scale: [n, G] f16. zero: [n, G], not 0 in v1, where
    readers do not agree about it. g_idx: [k].
    """
    stored = zero if config.checkpoint_format == "gptq_v2" else zero - 1
    return {
        "qweight": np.ascontiguousarray(pack_words(q, config.bits).T),
        "qzeros": pack_words(np.ascontiguousarray(stored.T), config.bits),
        "scales": np.ascontiguousarray(scale.T),
        "g_idx": g_idx.astype(np.int32),
    }
