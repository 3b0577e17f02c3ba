"""Errors of matrices as the manifest has them."""

from __future__ import annotations

import doctest
from pathlib import Path

from tiny import resign, tiny_artifact

from gristmill.report import layer_errors as module
from gristmill.report.layer_errors import layer_errors
from gristmill.report.schema import LayerError


def test_errors_by_layer_and_part(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a")
    assert layer_errors(artifact) == (), "the manifest has none"
    resign(
        artifact,
        quantization={
            "relative_error": {"model.layers.11.mlp.up_proj": 0.25, "lm_head": 0.5, "odd": None},
            "matrices": {"lm_head": {"method": "gptq", "error": 0.125}},
        },
    )
    assert layer_errors(artifact) == (
        LayerError("model.layers.11.mlp.up_proj", 11, "mlp.up_proj", 0.25),
        LayerError("lm_head", None, "lm_head", 0.125),
    )


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0
