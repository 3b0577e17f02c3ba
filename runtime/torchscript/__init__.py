"""Running an exported folder with libtorch's TorchScript, from Python; imports torch when it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program

if TYPE_CHECKING:
    from gristmill.runtime.torchscript.executor import TorchScriptExecutor


def open_executor(
    folder: Artifact, program: Program, threads: int, max_len: int, max_slots: int
) -> TorchScriptExecutor:
    """An executor on the CPU. Raises GristmillError where torch is missing or cannot load the module."""
    try:
        from gristmill.runtime.torchscript.executor import TorchScriptExecutor
    except ImportError as error:
        raise GristmillError(
            f"device 'torchscript' needs torch ({error}); pip install gristmill[compile]"
        ) from error
    return TorchScriptExecutor(folder, program, threads, max_len, max_slots)
