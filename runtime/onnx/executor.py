"""An executor over ONNX Runtime: the rows of each slot are a run of their own, over its keys and values.

Two flavours of graph: those with ONNX Runtime's attention write new rows into one buffer for past and
present; plain ones give back the past with the new rows behind it, so each step copies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import onnxruntime

from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import CacheSpec, Program
from gristmill.runtime.slotwise import Array, SlotwiseExecutor

GRAPH = "rows.onnx"  # logits of the rows that are asked for
# What ONNX Runtime makes of DequantizeLinear and MatMul multiplies int8 unless told 1: f32, as it says there.
FUSED_ACTIVATIONS = "session.qdq_matmulnbits_accuracy_level"
Feeds = dict[str, Array]


class Histories(Protocol):
    """The keys and values of all slots."""

    def run(self, slot: int, start: int, feeds: Feeds, outputs: list[str]) -> list[Array]:
        """The graph over rows that follow the first `start` of a slot."""
        ...

    def copy(self, source: int, target: int, length: int, start: int) -> None: ...


class OnnxExecutor(SlotwiseExecutor):
    """See SlotwiseExecutor."""

    def __init__(
        self, folder: Artifact, program: Program, threads: int, max_len: int, max_slots: int
    ) -> None:
        weight_bytes = sum(e.size for name, e in folder.files.items() if name.endswith(".data"))
        super().__init__(program, weight_bytes, threads, max_len, max_slots)
        session = _session(folder, threads)
        self._inputs = {i.name for i in session.get_inputs()}
        shares = bool(folder.manifest["settings"]["shared_buffer"])
        histories: Callable[..., Histories] = SharedBuffers if shares else Appended
        self._histories = histories(session, program.caches, max_len)

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


class SharedBuffers:
    """[1, kv_heads, max_len, dim] f32 of each slot, made when a slot is first used, and bound both as past
    and as present."""

    def __init__(self, session: Any, caches: list[CacheSpec], max_len: int) -> None:
        self._session, self._caches, self._max_len = session, caches, max_len
        self._slots: dict[int, list[tuple[str, Array, Any]]] = {}

    def run(self, slot: int, start: int, feeds: Feeds, outputs: list[str]) -> list[Array]:
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for name in outputs:
            binding.bind_output(name)
        for name, _, value in self._slot(slot):
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        self._session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[: len(outputs)]]

    def copy(self, source: int, target: int, length: int, start: int) -> None:
        for (_, ours, _), (_, theirs, _) in zip(self._slot(source), self._slot(target), strict=True):
            theirs[:, :, start:length] = ours[:, :, start:length]

    def _slot(self, slot: int) -> list[tuple[str, Array, Any]]:
        """Name, memory and OrtValue of each cache's keys and values."""
        if slot not in self._slots:
            arrays = [
                (name, np.zeros((1, heads, self._max_len, dim), np.float32))
                for name, heads, dim in _entries(self._caches)
            ]
            self._slots[slot] = [
                (name, array, onnxruntime.OrtValue.ortvalue_from_numpy(array)) for name, array in arrays
            ]
        return self._slots[slot]


class Appended:
    """[1, kv_heads, length, dim] f32 of each slot as the last run gave them back."""

    def __init__(self, session: Any, caches: list[CacheSpec], max_len: int) -> None:
        del max_len
        self._session = session
        entries = list(_entries(caches))
        self._names = [name for name, _, _ in entries]
        self._empty = [np.zeros((1, heads, 0, dim), np.float32) for _, heads, dim in entries]
        self._slots: dict[int, list[Array]] = {}

    def run(self, slot: int, start: int, feeds: Feeds, outputs: list[str]) -> list[Array]:
        past = self._slots.get(slot, self._empty)
        feeds = feeds | {f"past_key_values.{name}": a[:, :, :start] for name, a in zip(self._names, past)}
        found = self._session.run([*outputs, *(f"present.{name}" for name in self._names)], feeds)
        self._slots[slot] = found[len(outputs) :]
        return list(found[: len(outputs)])

    def copy(self, source: int, target: int, length: int, start: int) -> None:
        self._slots[target] = [array[:, :, :length].copy() for array in self._slots.get(source, self._empty)]


def _entries(caches: list[CacheSpec]) -> Iterator[tuple[str, int, int]]:
    """The part of a name behind past_key_values or present, heads and columns, of all caches."""
    for number, cache in enumerate(caches):
        yield f"{number}.key", cache.kv_heads, cache.k_dim
        yield f"{number}.value", cache.kv_heads, cache.v_dim


def _session(folder: Artifact, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(FUSED_ACTIVATIONS, "1")
    try:
        return onnxruntime.InferenceSession(
            str(folder.path / GRAPH), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # of pybind: onnxruntime has no public base class for them
        reason, file = str(error).splitlines()[0], folder.path / GRAPH
        raise GristmillError(
            f"onnxruntime {onnxruntime.__version__} cannot load {file}: {reason}; export again or install a "
            "newer onnxruntime"
        ) from error
