"""Running an exported folder with ONNX Runtime; the only part of the runtime that imports onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program

if TYPE_CHECKING:
    from gristmill.runtime.onnx.executor import OnnxExecutor

EXTRAS = {"cpu": "gristmill[onnx]", "cuda": "onnxruntime-gpu"}


def open_executor(
    folder: Artifact, program: Program, threads: int, max_len: int, max_slots: int, place: str
) -> OnnxExecutor:
    """An executor on the CPU or the first CUDA device, as `place` says.

    Raises GristmillError where onnxruntime is missing, has no CUDA or finds no device, and where it cannot
    load the graph.
    """
    try:
        from gristmill.runtime.onnx.executor import OnnxExecutor
    except ImportError as error:
        raise GristmillError(
            f"device 'onnx:{place}' needs onnxruntime ({error}); pip install {EXTRAS[place]}"
        ) from error
    return OnnxExecutor(folder, program, threads, max_len, max_slots, place)
