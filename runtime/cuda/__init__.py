"""Running an artifact on an NVIDIA GPU; the only part of the runtime that imports torch and triton."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program

if TYPE_CHECKING:
    import torch

    from gristmill.runtime.cuda.executor import CudaExecutor


def require_device(index: int | None = None) -> None:
    """Raises GristmillError where torch or triton is missing, and without a device that will do: the current
    one, or that of a number."""
    _open_device(index)


def open_executor(program: Program, weights: Path, max_len: int, max_slots: int) -> CudaExecutor:
    """An executor on the current CUDA device, its graphs captured.

    Raises GristmillError where torch or triton is missing, without a device that will do, for fp8 where the
    device has none, and where it has too little free memory.
    """
    device = device_for(program, weights, max_len, max_slots)
    from gristmill.runtime.cuda.device import refuse_out_of_memory
    from gristmill.runtime.cuda.executor import CudaExecutor

    remedy = "load with a smaller max_len or max_slots, or end what else uses the GPU"
    with refuse_out_of_memory(device, f"loading {max_slots} slots of {max_len}", remedy):
        return CudaExecutor(program, [weights], device, max_len, max_slots)


def device_for(program: Program, weights: Path, max_len: int, max_slots: int) -> torch.device:
    """The current CUDA device, which has what the program needs; raises GristmillError as `open_executor`."""
    device = _open_device()
    import torch

    from gristmill.runtime.cuda.device import refuse_fp8, refuse_too_large

    refuse_fp8(program, device)
    refuse_too_large(program, max_len, max_slots, weights.stat().st_size, torch.cuda.mem_get_info(device)[0])
    return device


def _open_device(index: int | None = None) -> torch.device:
    try:
        import triton  # noqa: F401  (what the kernels need, asked for here to say what to install)

        from gristmill.runtime.cuda.device import open_device
    except ImportError as error:
        raise GristmillError(
            f"device 'cuda' needs torch and triton ({error}); pip install gristmill[cuda]"
        ) from error
    return open_device(index)
