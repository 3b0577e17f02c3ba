"""The C++ executor of compiled programs. Users' errors come as gristmill.runtime.errors.GristmillError."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

class Executor:
    """Runs one program.json over one weights.safetensors; keeps the KV cache of `max_slots` slots."""

    def __init__(
        self,
        program_json: bytes,
        weights_path: str,
        *,
        threads: int,
        max_len: int,
        max_slots: int,
        isa: str = "auto",
        huge_pages: bool = False,
        pinned: bool = False,
        alone_below: int = 1048576,
        base_weights: str = "",
        partial: bool = False,
    ) -> None:
        """`threads` 0: physical cores of this process. A second Executor of the same file shares its pages.

        `huge_pages`: weights are copied into them, caches and arena lie in them, where the system has any.
        A forward of fewer than `alone_below` multiplications stays on the calling thread.
        For a rank's program: `base_weights` is the file of tensors that its own lacks, and with `partial`
        other ranks write the columns that it does not.
        """
    def forward(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        slots: NDArray[np.int32],
        rows: NDArray[np.int32],
        adapters: NDArray[np.int32] | None = None,
        *,
        after: Sequence[int] = (),
        band: Sequence[int] = (),
        between: Callable[[int, int, int, NDArray[np.float32]], object] | None = None,
    ) -> NDArray[np.float32]:
        """tokens, positions, slots: i32 [T]; rows: i32 [R], indices below T. -> logits f32 [R, vocabulary].

        adapters: i32 [T], numbers of `add_adapter`, -1: none; None: none at all.
        Appends each row's K and V at (slot, position), then attends. Releases the GIL; callers take turns.
        When instruction after[i] (ascending) is done for rows [first, first + rows), between(i, first, rows,
        logits) is called; what it raises ends the forward. band[i]: rows that it does at a time, 0: all.
        """
    def forward_hidden(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        slots: NDArray[np.int32],
        rows: NDArray[np.int32],
        adapters: NDArray[np.int32] | None = None,
        *,
        after: Sequence[int] = (),
        band: Sequence[int] = (),
        between: Callable[[int, int, int, NDArray[np.float32]], object] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """`forward`, and the hidden states f32 [R, hidden_width] of the same rows: what the head multiplies.

        Refused where the program's last instruction is not a linear that writes the logits.
        """
    def add_adapter(
        self, pairs: list[tuple[int, int, str, NDArray[np.generic], NDArray[np.generic], float]]
    ) -> int:
        """Copies an adapter: instruction, segment, format ("f32", or "f16", "bf16" as bits), A [r, K], B
        [N, r], scale of each matrix that it adds scale * B A to. Returns its number."""
    def remove_adapter(self, adapter: int) -> None:
        """Forgets an adapter; no other one gets its number."""
    @property
    def adapter_bytes(self) -> int:
        """Memory of all adapters."""
    def copy_slot(self, src: int, dst: int, length: int, start: int = 0) -> None:
        """Slot `dst` gets positions `start` to `length` of slot `src`; those before, both hold alike.

        A sliding window keeps its last rows only: neither slot may be more than max_tokens past `length`.
        """
    def profile(self, enable: bool) -> None:
        """Begins (from zero) or ends the timing of every instruction."""
    def profile_results(self) -> list[tuple[str, int, int]]:
        """Per instruction: label, nanoseconds since profile(True), bytes of weights that one pass reads."""
    def stall(self, nanoseconds: int) -> None:
        """Every instruction begins with a busy wait, 0: none. For tests of what judges speed."""
    @property
    def shared_phases(self) -> int:
        """Phases of the last forward that its threads shared: so often they waited for each other."""
    @property
    def threads(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def max_slots(self) -> int: ...
    @property
    def max_len(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def hidden_width(self) -> int:
        """Columns of a hidden state; 0: the program has none to give."""
    @property
    def isa(self) -> str: ...
    @property
    def arena(self) -> NDArray[np.uint8]:
        """The memory of the program's values, shared: for who exchanges them between instructions."""
    @property
    def arena_bytes(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights read for one decode row; an embedding counts one row."""

def isas() -> list[str]:
    """Instruction sets that this CPU can run, best first."""

def default_threads() -> int:
    """Physical cores that this process may run on."""

def read_bandwidth(bytes: int, threads: int, seconds: float) -> float:
    """GB/s that all threads read of anonymous memory of so many bytes, sustained for `seconds`."""

def arithmetic_peak(isa: str, integer: bool, threads: int, seconds: float) -> float:
    """1e9 operations per second of independent multiply-adds in registers, of f32 or of bytes.

    isa: "auto" for the best that this CPU has.
    """
