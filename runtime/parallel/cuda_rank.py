"""One rank on a GPU of its own: the CUDA executor of its program, with the exchanges between its kernels, in
its graphs as well."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gristmill.runtime.cuda import device as devices
from gristmill.runtime.cuda.executor import CudaExecutor
from gristmill.runtime.cuda.probe import event_seconds, wall_seconds
from gristmill.runtime.decoding.draws import Draws
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.parallel.device_exchange import DeviceExchanges, DeviceGroup, nccl
from gristmill.runtime.parallel.exchange import gloo
from gristmill.runtime.parallel.rank import Share
from gristmill.runtime.parallel.slices import sliced_weights
from gristmill.runtime.parallel.split import bytes_of_all, split
from gristmill.runtime.program import Program

Array = np.ndarray[Any, Any]
Batch = tuple[Array, Array, Array, Array]
LOOK_S = 0.05  # how often the others are looked after while the device works


class CudaRank:
    """Opened by the parent and by each worker; `connect` before the first forward."""

    def __init__(self, program: Program, weights: Path, share: Share) -> None:
        self._share = share
        self.made = split(program, share.rank, share.world, share.gather_pays)
        device = devices.open_device(share.rank)
        self.exchanges = DeviceExchanges(self.made.exchanges)
        own = self.made.program
        if device.type == "cuda":
            devices.refuse_fp8(own, device)
            free = torch.cuda.mem_get_info(device)[0]
            devices.refuse_too_large(own, share.max_len, share.max_slots, bytes_of_all([own]), free)
        doing = f"loading {share.max_slots} slots of {share.max_len}"
        remedy = "load with a smaller max_len or max_slots, or end what else uses the GPU"
        with (
            sliced_weights(weights, self.made) as slices,
            devices.current(device),
            devices.refuse_out_of_memory(device, doing, remedy),
        ):
            self.executor = CudaExecutor(
                own, [Path(slices), weights], device, share.max_len, share.max_slots, self.exchanges
            )

    def join(self, store: Any) -> None:
        """Connects to the other ranks, which all meet at the store."""
        rank, world = self._share.rank, self._share.world
        on_device = self.executor.device.type == "cuda"
        with devices.current(self.executor.device):
            backend = nccl(store, rank, world) if on_device else gloo(store, rank, world, local=True)
        self.connect(DeviceGroup(backend, rank, world))

    def connect(self, group: DeviceGroup) -> None:
        """Captures the graphs, exchanges in them: all ranks at once."""
        self.exchanges.connect(group)
        if self.executor.device.type == "cuda":
            with devices.current(self.executor.device):
                self.executor.capture()

    def forward(
        self, tokens: Array, positions: Array, slots: Array, rows: Array, hidden: bool = False
    ) -> Any:
        """Logits [R, vocabulary], and with ``hidden`` the hidden states; all ranks get the same."""
        run = self.executor.forward_hidden if hidden else self.executor.forward
        return self._run(partial(run, tokens, positions, slots, rows), (tokens, positions, slots, rows))

    def sample(self, tokens: Array, positions: Array, slots: Array, rows: Array, draws: Draws) -> Any:
        """The next tokens [R]; the other ranks follow."""
        draw = partial(self.executor.sample, tokens, positions, slots, rows, draws)
        return self._run(draw, (tokens, positions, slots, rows))

    def follow(self, tokens: Array, positions: Array, slots: Array, rows: Array, hidden: bool) -> None:
        """`forward`, where rank 0 has the result: it stays on the device."""
        del hidden
        batch = (tokens, positions, slots, rows)
        self._run(partial(self.executor.follow, *batch), batch)

    def _run(self, run: Callable[[], Any], batch: Batch) -> Any:
        """What all ranks refuse in the same words is a GristmillError; what goes wrong on one of them, while
        the others wait for it, is not."""
        self.executor.check(*batch)
        try:
            return run()
        except GristmillError as error:
            raise RuntimeError(str(error)) from error

    def watch(self, alive: Callable[[], None]) -> None:
        """From now on no result is waited for longer than ``alive`` does not raise: a device that waits for
        another has no end."""
        if self.executor.device.type == "cuda":
            self.executor.wait = partial(_until_done, alive)

    def close(self) -> None:
        """Ends what is under way between the devices."""
        self.exchanges.abort()

    def time_exchanges(self, kind: str, repeats: int) -> float:
        """Seconds of all exchanges of a kind in a forward like the last one; all ranks at once."""
        self.exchanges.only = kind
        try:
            if self.executor.device.type == "cuda":
                with devices.current(self.executor.device):
                    return event_seconds(self.executor.exchange_last, repeats, among_threads=True)
            return wall_seconds(self.executor.exchange_last, repeats)
        finally:
            self.exchanges.only = None


def _until_done(alive: Callable[[], None]) -> None:
    """Waits for the current device's stream."""
    event = torch.cuda.Event()
    event.record()
    look = time.perf_counter() + LOOK_S
    while not event.query():
        if time.perf_counter() > look:
            alive()
            look = time.perf_counter() + LOOK_S
