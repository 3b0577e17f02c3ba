"""Running an exported folder with an AOTInductor package, from Python; imports torch when it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program

if TYPE_CHECKING:
    from gristmill.runtime.pt2.executor import Pt2Executor


def open_executor(
    folder: Artifact, program: Program, threads: int, max_len: int, max_slots: int, place: str
) -> Pt2Executor:
    """An executor on the CPU, the only `place` there is. Raises GristmillError where torch is missing or
    cannot load the package."""
    assert place == "cpu", place
    try:
        from gristmill.runtime.pt2.executor import Pt2Executor
    except ImportError as error:
        raise GristmillError(
            f"device 'pt2:cpu' needs torch ({error}); pip install gristmill[compile]"
        ) from error
    return Pt2Executor(folder, program, threads, max_len, max_slots)
