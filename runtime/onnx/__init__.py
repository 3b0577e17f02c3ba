"""Running an exported folder with ONNX Runtime; the only part of the runtime that imports onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program

if TYPE_CHECKING:
    from gristmill.runtime.onnx.executor import OnnxExecutor


def open_executor(
    folder: Artifact, program: Program, threads: int, max_len: int, max_slots: int
) -> OnnxExecutor:
    """An executor on the CPU. Raises GristmillError where onnxruntime is missing or cannot load the graph."""
    try:
        from gristmill.runtime.onnx.executor import OnnxExecutor
    except ImportError as error:
        raise GristmillError(
            f"device 'onnx:cpu' needs onnxruntime ({error}); pip install gristmill[onnx]"
        ) from error
    return OnnxExecutor(folder, program, threads, max_len, max_slots)
