"""ONNX Runtime's session for a folder, on the CPU or a CUDA device, or why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from gristmill.runtime.errors import GristmillError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {"cpu": [CPU], "cuda": [CUDA, CPU]}  # the CPU for operators that CUDA lacks
# What ONNX Runtime makes of DequantizeLinear and MatMul multiplies int8 unless told 1: f32, as it says there.
FUSED_ACTIVATIONS = "session.qdq_matmulnbits_accuracy_level"


def open_session(file: Path, threads: int, place: str) -> Any:
    """The graph in `file`. Raises GristmillError where onnxruntime cannot load it or finds no CUDA device."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(FUSED_ACTIVATIONS, "1")
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=PROVIDERS[place])
    except Exception as error:  # of pybind: onnxruntime has no public base class for them
        reason = str(error).splitlines()[0]
        raise GristmillError(
            f"onnxruntime {onnxruntime.__version__} cannot load {file}: {reason}; export again or install a "
            "newer onnxruntime"
        ) from error
    # Without a device it goes on with the CPU, and a line in its log.
    if place == "cuda" and CUDA not in session.get_providers():
        raise GristmillError(
            f"onnxruntime {onnxruntime.__version__} found no CUDA device, or not the CUDA and cuDNN "
            "libraries it was built for; its log above says which; load with device='onnx:cpu'"
        )
    return session


def require_cuda() -> None:
    """Raises GristmillError where onnxruntime was built without CUDA."""
    if CUDA not in onnxruntime.get_available_providers():
        raise GristmillError(
            f"device 'onnx:cuda' needs onnxruntime's {CUDA}, which onnxruntime {onnxruntime.__version__} "
            "here lacks; install onnxruntime-gpu in its place, or load with device='onnx:cpu'"
        )
    if hasattr(onnxruntime, "preload_dlls"):  # of NVIDIA's own packages, as torch installs them
        onnxruntime.preload_dlls()
