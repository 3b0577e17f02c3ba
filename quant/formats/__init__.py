"""Checkpoints that others quantized: one module for each format, reading and, where it can be, writing.

`reader` chooses by quantization_config.quant_method; what is not in the table is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

from gristmill.quant.formats import awq, compressed_tensors, fp8, gptq
from gristmill.quant.formats.weight import QuantizedWeight, Tensors
from gristmill.runtime.errors import GristmillError

METHODS: dict[
    str, tuple[ModuleType, tuple[str, ...]]
] = {  # quant_method -> module, suffixes that mark a layer
    "gptq": (gptq, (gptq.MARKER, "qzeros", "scales")),
    "awq": (awq, (awq.MARKER, "qzeros", "scales")),
    "compressed-tensors": (compressed_tensors, ("weight_packed", compressed_tensors.MARKER)),
    "fp8": (fp8, fp8.MARKERS),
    "fbgemm_fp8": (fp8, fp8.MARKERS),
}


@dataclass(frozen=True)
class Reader:
    """How to read one checkpoint.

    markers: a tensor X.marker says that layer X is quantized. parts: suffixes of tensors that are part of the
    weight. weight: reads layer X. whole: what it has as floats keeps its type everywhere, embedding and head
    included. dequantized: how many matrices of which type are read as values, being exact in no format here.
    """

    method: str
    markers: tuple[str, ...]
    parts: tuple[str, ...]
    weight: Callable[[Tensors, str], QuantizedWeight]
    whole: bool = False
    dequantized: Mapping[str, int] = field(default_factory=dict)


def reader(config: Any) -> Reader:
    """The reader for a quantization_config. Raises GristmillError for one that is not supported, by name."""
    if not isinstance(config, Mapping):
        raise GristmillError(f"quantization_config is {type(config).__name__}, expected an object")
    method = str(config.get("quant_method", "missing")).lower()
    layouts = {str(config.get(key, "")).lower() for key in ("format", "quant_algo")}
    if method not in METHODS:
        named = ", ".join([method, *sorted(layouts - {""})])
        raise GristmillError(
            f"already quantized in a way that is not supported ({named}); expected quant_method "
            f"{', '.join(METHODS)}, or give the original float model"
        )
    module, markers = METHODS[method]
    return Reader(method, markers, module.PARTS, partial(module.read_weight, module.read_config(config)))
