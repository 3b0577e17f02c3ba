"""An executor over ONNX Runtime: the rows of each slot are a run of their own, over its keys and values,
which stay on the device.

Two flavours of graph: those with ONNX Runtime's attention write new rows into one buffer for past and
present; plain ones give back the past with the new rows behind it, so each step copies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime

from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.onnx.providers import open_session, require_cuda
from gristmill.runtime.program import CacheSpec, Program
from gristmill.runtime.slotwise import Array, SlotwiseExecutor

GRAPH = "rows.onnx"  # logits of the rows that are asked for
DTYPES = {"f32": np.float32, "f16": np.float16, "int8": np.uint8}  # of keys and values
Feeds = dict[str, Array]
OrtValue = Any


class Histories(Protocol):
    """The keys and values of all slots."""

    def run(self, slot: int, start: int, feeds: Feeds, outputs: list[str]) -> list[Array]:
        """The graph over rows that follow the first `start` of a slot."""
        ...

    def copy(self, source: int, target: int, length: int, start: int) -> None: ...


class OnnxExecutor(SlotwiseExecutor):
    """See SlotwiseExecutor. place: "cpu", or "cuda" for the first device."""

    def __init__(
        self, folder: Artifact, program: Program, threads: int, max_len: int, max_slots: int, place: str
    ) -> None:
        weight_bytes = sum(e.size for name, e in folder.files.items() if name.endswith(".data"))
        super().__init__(program, weight_bytes, threads, max_len, max_slots)
        shares = bool(folder.manifest["settings"]["shared_buffer"])
        if place == "cuda":
            require_cuda()
            _refuse_wide(program, shares)
        session = open_session(folder.path / GRAPH, threads, place)
        self._inputs = {i.name for i in session.get_inputs()}
        histories: Callable[..., Histories] = SharedBuffers if shares else Appended
        self._histories = histories(session, program.caches, max_len, place)

    def run(self, slot: int, tokens: Array, positions: Array, rows: Array, hidden: bool) -> list[Array]:
        feeds = {
            "input_ids": tokens[None].astype(np.int64),
            "attention_mask": np.ones((1, int(positions[-1]) + 1), np.int64),
            "position_ids": positions[None].astype(np.int64),
            "rows": rows,
        }
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        outputs = ["logits", "hidden_states"] if hidden else ["logits"]
        return [found[0] for found in self._histories.run(slot, int(positions[0]), feeds, outputs)]

    def copy(self, source: int, target: int, length: int, start: int) -> None:
        self._histories.copy(source, target, length, start)


def _refuse_wide(program: Program, shares: bool) -> None:
    """The attention operator, which alone shares buffers, has no f32 on CUDA: ONNX Runtime would run it on
    the CPU without a word."""
    if shares and any({c.k_dtype, c.v_dtype} != {"f16"} for c in program.caches):
        raise GristmillError(
            "this folder's attention computes in f32, which ONNX Runtime's GroupQueryAttention on CUDA "
            "lacks; export again with --activations f16 (activations='f16') or with --plain"
        )


class SharedBuffers:
    """[1, kv_heads, max_len, dim] of each slot, made when a slot is first used, and bound both as past and as
    present."""

    def __init__(self, session: Any, caches: list[CacheSpec], max_len: int, place: str) -> None:
        self._session, self._place = session, place
        self._entries = list(_entries(caches))
        self._max_len = max_len
        self._slots: dict[int, list[tuple[Array | None, OrtValue]]] = {}  # the memory, on the CPU

    def run(self, slot: int, start: int, feeds: Feeds, outputs: list[str]) -> list[Array]:
        binding = _bound(self._session, feeds, outputs)
        for entry, (_, value) in zip(self._entries, self._slot(slot), strict=True):
            binding.bind_ortvalue_input(f"past_key_values.{entry.name}", value)
            binding.bind_ortvalue_output(f"present.{entry.name}", value)
        self._session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[: len(outputs)]]

    def copy(self, source: int, target: int, length: int, start: int) -> None:
        """On a device all of a buffer: what is behind `length` is not read before it is written."""
        pairs = zip(self._slot(source), self._slot(target), strict=True)
        for (ours, our_value), (theirs, their_value) in pairs:
            if ours is None or theirs is None:
                their_value.update_inplace(our_value.numpy())
            else:
                theirs[:, :, start:length] = ours[:, :, start:length]

    def _slot(self, slot: int) -> list[tuple[Array | None, OrtValue]]:
        if slot not in self._slots:
            arrays = [entry.zeros(self._max_len) for entry in self._entries]
            kept = arrays if self._place == "cpu" else [None] * len(arrays)
            self._slots[slot] = [(own, _on(self._place, array)) for own, array in zip(kept, arrays)]
        return self._slots[slot]


class Appended:
    """[1, kv_heads, length, dim] of each slot as the last run gave them back."""

    def __init__(self, session: Any, caches: list[CacheSpec], max_len: int, place: str) -> None:
        del max_len
        self._session, self._place = session, place
        self._entries = list(_entries(caches))
        self._slots: dict[int, tuple[int, list[OrtValue]]] = {}  # the length and the values

    def run(self, slot: int, start: int, feeds: Feeds, outputs: list[str]) -> list[Array]:
        binding = _bound(self._session, feeds, outputs)
        past = self._first(slot, start)  # kept until the run is over: memory of the CPU is not the binding's
        for entry, value in zip(self._entries, past, strict=True):
            binding.bind_ortvalue_input(f"past_key_values.{entry.name}", value)
            binding.bind_output(f"present.{entry.name}", self._place)
        self._session.run_with_iobinding(binding)
        found = binding.get_outputs()
        self._slots[slot] = start + feeds["input_ids"].shape[1], found[len(outputs) :]
        return [value.numpy() for value in found[: len(outputs)]]

    def copy(self, source: int, target: int, length: int, start: int) -> None:
        """Values are never written again, so both slots may have the same."""
        del start
        self._slots[target] = length, self._first(source, length)

    def _first(self, slot: int, length: int) -> list[OrtValue]:
        """The values of a slot's first positions."""
        held, values = self._slots.get(slot, (0, []))
        if not values:
            return [_on(self._place, entry.zeros(length)) for entry in self._entries]
        if held == length:
            return values
        return [_on(self._place, np.ascontiguousarray(value.numpy()[:, :, :length])) for value in values]


@dataclass(frozen=True)
class Entry:
    """A tensor of a cache: the part of its name behind past_key_values or present, heads, columns, type."""

    name: str
    kv_heads: int
    dim: int
    dtype: Any

    def zeros(self, length: int) -> Array:
        return np.zeros((1, self.kv_heads, length, self.dim), self.dtype)


def _entries(caches: list[CacheSpec]) -> Iterator[Entry]:
    """The tensors of all caches; an int8 row has a step and an offset, see export/onnx_cache.py."""
    for number, cache in enumerate(caches):
        for name, dim, dtype in ("key", cache.k_dim, cache.k_dtype), ("value", cache.v_dim, cache.v_dtype):
            yield Entry(f"{number}.{name}", cache.kv_heads, dim, DTYPES[dtype])
            for part in ("step", "offset") if dtype == "int8" else ():
                yield Entry(f"{number}.{name}_{part}", cache.kv_heads, 1, np.float32)


def _bound(session: Any, feeds: Feeds, outputs: list[str]) -> Any:
    """A binding with what comes from the host and goes there."""
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    for name in outputs:
        binding.bind_output(name)
    return binding


def _on(place: str, array: Array) -> OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array, place, 0)
