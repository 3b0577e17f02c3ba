"""Launches recorded once and replayed: CUDA Graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 3  # runs before a capture: kernels are compiled and loaded then


def captured(
    launch: Callable[[], object], pool: Any = None, among_threads: bool = False
) -> torch.cuda.CUDAGraph:
    """What ``launch`` launches, after warming up on another stream, as a graph. among_threads: other threads
    of this process, NCCL's, may ask the device for something meanwhile."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            launch()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    mode = "thread_local" if among_threads else "global"
    with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
        launch()
    return graph
