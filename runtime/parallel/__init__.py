"""Running one artifact as several processes, each with its share of the Program: tensor parallelism.

The only part of the runtime beside its devices that imports torch, for torch.distributed, and only when a
session asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program

if TYPE_CHECKING:
    from gristmill.runtime.parallel.executor import ParallelExecutor


def open_executor(
    artifact: Artifact, program: Program, world: int, threads: int, max_len: int, max_slots: int,
    hugepages: bool, device: str = "cpu",
) -> ParallelExecutor:  # fmt: skip
    """An executor whose rank 0 is this process and whose other ranks are processes of its own; device: "cpu",
    or "cuda" for a GPU each, those that torch numbers from 0 on.

    threads: of all ranks together, at least one each. Raises GristmillError where torch is missing, the
    program cannot be split so, there are too few GPUs, or a rank does not start.
    """
    from gristmill.runtime.parallel.split import refuse_unsplittable

    refuse_unsplittable(program, world)
    try:
        import torch.distributed as dist
    except ImportError as error:
        raise GristmillError(
            f"tensor_parallel needs torch ({error}); pip install 'gristmill[compile]'"
        ) from error
    if not dist.is_available() or not hasattr(dist, "ProcessGroupGloo"):
        raise GristmillError("tensor_parallel needs torch.distributed with gloo, and this torch has none")
    if device == "cuda":
        from gristmill.runtime.cuda import require_device

        require_device(world - 1)
        if not hasattr(dist, "ProcessGroupNCCL"):
            raise GristmillError("tensor_parallel on GPUs needs torch.distributed with NCCL, this has none")
    from gristmill.runtime.parallel.executor import ParallelExecutor

    return ParallelExecutor(artifact, program, world, threads, max_len, max_slots, hugepages, device)
