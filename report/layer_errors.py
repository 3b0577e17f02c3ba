"""What rounding did to each weight matrix, as the artifact's manifest has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gristmill.report.schema import LayerError
from gristmill.runtime.artifact import read_manifest

_LAYER = re.compile(r"\.(\d+)\.")


def layer_errors(artifact: str | Path) -> tuple[LayerError, ...]:
    """One for each matrix in the order of the program: of its outputs on the calibration texts where a method
    measured those, else of the weights themselves; () where the manifest has none. Both are squared errors
    relative to the squares."""
    quantization = _mapping(read_manifest(Path(artifact)).get("quantization"))
    records = _mapping(quantization.get("matrices"))
    found = []
    for name, error in _mapping(quantization.get("relative_error")).items():
        measured = _mapping(records.get(name)).get("error", error)
        if isinstance(measured, (int, float)) and not isinstance(measured, bool):
            layer, part = split_name(name)
            found.append(LayerError(name, layer, part, float(measured)))
    return tuple(found)


def split_name(name: str) -> tuple[int | None, str]:
    """The number of the layer, and what stands behind it.

    >>> split_name("model.layers.3.mlp.up_proj")
    (3, 'mlp.up_proj')
    >>> split_name("lm_head")
    (None, 'lm_head')
    """
    found = _LAYER.search(name)
    return (int(found[1]), name[found.end() :]) if found else (None, name)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
