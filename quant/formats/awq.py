"""AWQ checkpoints as AutoAWQ writes them, version GEMM.

A layer X of k inputs and n outputs has
    X.qweight  [k, n / 8] i32: words run along the outputs, eight of them in the order 0, 2, 4, 6, 1, 3, 5, 7
    X.qzeros   [G, n / 8] i32: the same
    X.scales   [G, n] f16
and w = scale * (q - zero) in groups of consecutive inputs. Nothing is stored minus one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from gristmill.quant.formats.words import pack_words, unpack_words
from gristmill.runtime.errors import GristmillError

Array = NDArray[Any]
BITS = 4
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # value i of a word is output ORDER[i] of its eight
MARKER = "qweight"
PARTS = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class AwqConfig:
    """group_size -1: the whole row."""

    group_size: int


def read_config(config: Mapping[str, Any]) -> AwqConfig:
    """Check quantization_config. Raises GristmillError for versions that are laid out otherwise."""
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise GristmillError(f"awq version {version!r} is not supported; expected gemm")
    bits = config.get("bits", config.get("w_bit", BITS))
    group_size = config.get("group_size", config.get("q_group_size", 128))
    if bits != BITS or type(group_size) is not int:
        raise GristmillError(
            f"awq with bits {bits!r} and group_size {group_size!r} is not supported; "
            "expected 4 bits and an integer"
        )
    return AwqConfig(group_size)


def read_weight(config: AwqConfig, tensors: Tensors, module: str) -> QuantizedWeight:
    """Layer `module` of an AWQ checkpoint."""
    require_tensors(tensors, module, ("qweight", "scales"))
    name = {part: f"{module}.{part}" for part in PARTS}
    k = tensors.shape(name["qweight"])[0]
    groups, n = tensors.shape(name["scales"])
    require_shape(tensors, name["qweight"], (k, n // 8))
    columns = plan_columns(module, k, groups, config.group_size)
    zero = None
    if name["qzeros"] in tensors:
        require_shape(tensors, name["qzeros"], (groups, n // 8))
        zero = unpack_outputs(tensors.read(name["qzeros"]).numpy()).T
    scale = np.ascontiguousarray(tensors.read(name["scales"]).numpy().T)

    def read_q() -> Array:
        return np.ascontiguousarray(unpack_outputs(tensors.read(name["qweight"]).numpy()).T)

    return assemble(module, k, BITS, columns, scale, zero, read_q)


def unpack_outputs(words: Array) -> NDArray[np.uint8]:
    """[R, n / 8] words to [R, n] values."""
    eights = unpack_words(words, BITS).reshape(len(words), -1, 8)
    values = np.empty_like(eights)
    values[:, :, ORDER] = eights
    return values.reshape(len(words), -1)


def pack_outputs(values: Array) -> NDArray[np.int32]:
    """The inverse of `unpack_outputs`."""
    eights = values.reshape(len(values), -1, 8)[:, :, ORDER]
    return pack_words(eights.reshape(len(values), -1), BITS)


def write_weight(q: Array, scale: Array, zero: Array) -> dict[str, Array]:
    """The tensors of a layer by suffix. q: [n, k] 0..15; scale: [n, G] f16; zero: [n, G] 0..15."""
    return {
        "qweight": pack_outputs(np.ascontiguousarray(q.T)),
        "qzeros": pack_outputs(np.ascontiguousarray(zero.T)),
        "scales": np.ascontiguousarray(scale.T),
    }
