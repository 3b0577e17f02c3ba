"""Launches recorded once and replayed: CUDA Graphs."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import Any, Protocol

import torch

WARM_UPS = 3  # runs before a capture: kernels are compiled and loaded then
MOST_CACHED = 16  # graphs that are captured while batches come

Launch = Callable[[], object]
_one_at_a_time = threading.Lock()


class Graph(Protocol):
    def replay(self) -> None:
        """Launches all of it once more."""


def captured(
    launch: Launch, pool: Any = None, among_threads: bool = False, warm_ups: int = WARM_UPS
) -> torch.cuda.CUDAGraph:
    """What ``launch`` launches, after warming up on another stream, as a graph. among_threads: other threads
    of this process, NCCL's or those of a server, may ask the device for something meanwhile. warm_ups: none
    where it has run before."""
    side, current = _side_stream(torch.cuda.current_device()), torch.cuda.current_stream()
    graph, mode = torch.cuda.CUDAGraph(), "thread_local" if among_threads else "global"
    with _one_at_a_time:
        _warm_up(launch, warm_ups, side)
        with (
            torch.cuda.stream(current),  # where a capture fails torch does not come back to it
            torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode=mode),
        ):
            launch()
    return graph


def _warm_up(launch: Launch, times: int, side: torch.cuda.Stream) -> None:
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda.current_blas_handle()  # of this thread, with a workspace: a capture could make neither
        for _ in range(times):
            launch()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all warm-ups and captures, for cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


class GraphCache:
    """Graphs of batches whose shapes come again, each captured when its shape comes a second time.

    The first time is launched, which compiles and loads the kernels, so that a capture needs no warm-up and
    runs nothing: the batch that is waiting is then replayed. Beyond ``most`` graphs the one that was not used
    for longest goes, and its shape begins anew. A capture that fails, as it does where memory ends, is the
    last: shapes without a graph are launched from then on.
    """

    def __init__(self, capture: Callable[[Launch], Graph], most: int = MOST_CACHED) -> None:
        self._capture, self._most, self._failed = capture, most, False
        self._launched: set[Hashable] = set()
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()

    @staticmethod
    def on_device(pool: Any) -> GraphCache:
        """Of CUDA Graphs; pool: of memory, which they share with others."""
        return GraphCache(partial(captured, pool=pool, among_threads=True, warm_ups=0))

    def __contains__(self, shape: Hashable) -> bool:
        return shape in self._graphs

    def run(self, shape: Hashable, launch: Launch) -> None:
        """Does what ``launch`` does, which is the same for every batch of that shape."""
        if shape in self._launched and shape not in self._graphs and not self._failed:
            self._add(shape, launch)
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            self._graphs[shape].replay()
            return
        launch()
        self._launched.add(shape)

    def _add(self, shape: Hashable, launch: Launch) -> None:
        if len(self._graphs) == self._most:
            oldest, _ = self._graphs.popitem(last=False)
            self._launched.remove(oldest)
        try:
            self._graphs[shape] = self._capture(launch)
        except RuntimeError as error:  # torch's own errors and the driver's are such
            self._failed = True
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"no more CUDA Graphs are captured, batches are launched: {first}", stacklevel=2)
