"""Graphs of batches that come again, with the executor in Triton's interpreter: a capture records kernels and
their arguments, which a replay runs as they are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import Array, llama
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from cuda_cases import CASES, a_small_gpu, ints, make, run, tokens_for  # noqa: F401
from triton.runtime.interpreter import InterpretedFunction
from triton_device import INTERPRETED

from gristmill.runtime.cuda import device as cuda_device
from gristmill.runtime.cuda import executor as cuda_executor
from gristmill.runtime.cuda.executor import CudaExecutor
from gristmill.runtime.cuda.graphs import GraphCache
from gristmill.runtime.decoding.draws import Draws
from gristmill.runtime.decoding.options import GenerationOptions

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a device has graphs, see test_cuda_device.py")
Batch = tuple[Array, Array, Array, Array]


class NoOperations(TorchDispatchMode):
    """Whatever a recording would lose: all of torch's but views."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.is_view, f"{func} runs while kernels are recorded"
        return func(*args, **(kwargs or {}))


@contextmanager
def recording() -> Iterator[list[Callable[[], object]]]:
    """Until the end of the block kernels do not run; what would have run them."""
    found: list[Callable[[], object]] = []
    run = InterpretedFunction.run

    def record(self: Any, *args: Any, **options: Any) -> None:
        found.append(lambda: run(self, *args, **options))

    with pytest.MonkeyPatch.context() as patch, NoOperations():
        patch.setattr(InterpretedFunction, "run", record)
        yield found


class Recorded:
    """A graph, and how often it was replayed."""

    def __init__(self, launch: Callable[[], object]) -> None:
        with recording() as self.kernels:
            launch()
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for kernel in self.kernels:
            kernel()


class Captures:
    """Captures so many graphs, then fails."""

    def __init__(self, room: int = 100) -> None:
        self.made: list[Recorded] = []
        self._room = room

    def __call__(self, launch: Callable[[], object]) -> Recorded:
        if len(self.made) == self._room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nGPU 0 has")
        self.made.append(Recorded(launch))
        return self.made[-1]

    @property
    def replays(self) -> list[int]:
        return [graph.replays for graph in self.made]


def with_graphs(executor: CudaExecutor, captures: Captures, most: int = 16) -> CudaExecutor:
    executor._graph_cache = GraphCache(captures, most)
    return executor


def batch_of(tokens: Array, start: int = 0, slot: int = 0, wanted: int = 1) -> Batch:
    """Rows of one slot, and the logits of the last ones."""
    count = len(tokens)
    return (
        tokens, ints(range(start, start + count)), ints([slot] * count), ints(range(count - wanted, count)),
    )  # fmt: skip


def two_slots(program: Any) -> Batch:
    return tokens_for(program, 4, seed=5), ints([3, 4, 0, 1]), ints([0, 0, 2, 2]), ints([1, 3])


@pytest.mark.parametrize("case", ["int4_int8", "window_order"])
def test_a_shape_is_launched_then_captured_then_replayed(case: str, tmp_path: Path) -> None:
    """Other tokens, slots, positions and cuts of the same shape, and other shapes between them: the logits
    are those of launches, bit for bit."""
    program = llama(CASES[case])
    tokens = tokens_for(program, 8)
    batches = [
        batch_of(tokens[:4]), batch_of(tokens[4:], slot=1), batch_of(tokens[:1], 4, 1),
        batch_of(tokens[1:4], 5, 1), two_slots(program), batch_of(tokens[:4], 8, wanted=2),
        batch_of(tokens[:4], 12),
    ]  # fmt: skip
    plain, captures = make(program, tmp_path), Captures()
    executor = with_graphs(make(program, tmp_path), captures)
    for batch in batches:
        assert executor.forward(*batch).tobytes() == plain.forward(*batch).tobytes()
    assert captures.replays == [3, 1]  # for the logits of one row, and of two
    assert [len(graph.kernels) for graph in captures.made] == [len(captures.made[0].kernels)] * 2


def test_a_batch_with_more_blocks_than_a_graph_has_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its shape has a graph or not; empty blocks change no bit."""
    program = llama(CASES["f32"])
    tokens = tokens_for(program, 5)
    scattered = tokens, ints([0, 0, 0, 1, 1]), ints([0, 1, 2, 0, 1]), ints([4])
    whole = batch_of(tokens, 1, 2)
    batches = scattered, scattered, whole, whole, scattered, whole
    plain, captures = make(program, tmp_path), Captures()
    expected = [plain.forward(*batch).tobytes() for batch in batches]
    assert {len(blocks) for blocks in (plain._last[2] or {}).values()} == {8}
    monkeypatch.setattr(cuda_executor, "SPARE_BLOCKS", 1)
    executor = with_graphs(make(program, tmp_path), captures)
    assert [executor.forward(*batch).tobytes() for batch in batches] == expected
    assert captures.replays == [2]
    assert executor._last[2] is not None
    (blocks,) = executor._last[2].values()
    assert blocks.tolist() == [[0, 5, 2, 1], [0, 0, 0, 0]]  # of up to eight rows, and one to spare


def test_tokens_are_drawn_after_a_replay(tmp_path: Path) -> None:
    """Sampled with penalties for what the slot holds: the tokens of a replayed batch are remembered."""
    program = llama(CASES["f32"])
    tokens = tokens_for(program, 12)
    plain, captures = make(program, tmp_path), Captures()
    executor = with_graphs(make(program, tmp_path), captures)
    sampled = Draws.of([GenerationOptions(temperature=1.5, repetition_penalty=3.0)], [7], [0])
    for start in range(0, 12, 4):
        for draws in (sampled, Draws.greedy(1)):
            batch = batch_of(tokens[start : start + 4], start)
            assert executor.sample(*batch, draws).tolist() == plain.sample(*batch, draws).tolist()
    assert captures.replays == [5]
    assert (executor._drawing._history == plain._drawing._history).all()


def test_hidden_states_and_timing_after_a_replay(tmp_path: Path) -> None:
    program = llama(CASES["f32"])
    tokens = tokens_for(program, 3)
    plain, captures = make(program, tmp_path), Captures()
    executor = with_graphs(make(program, tmp_path), captures)
    batch = batch_of(tokens, wanted=3)
    expected = plain.forward_hidden(*batch)
    for _ in range(3):
        run(executor, tokens[:1], 7, 1)  # of another size in between
        logits, hidden = executor.forward_hidden(*batch)
        assert logits.tobytes() == expected[0].tobytes() and hidden.tobytes() == expected[1].tobytes()
        executor._values.logits.zero_()
        executor.relaunch(range(len(executor._program.instructions)))()
        assert executor._values.logits[:3].numpy().tobytes() == logits.tobytes()
    assert captures.replays == [2, 2]


def test_more_logits_than_fit_one_piece_are_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "LOGIT_ROWS", 2)
    program = llama(CASES["f32"])
    tokens, captures = tokens_for(program, 4), Captures()
    executor = with_graphs(make(program, tmp_path, max_slots=1), captures)
    all_logits = [run(executor, tokens).tobytes() for _ in range(3)]
    assert not captures.made and len(set(all_logits)) == 1
    none = [executor.forward(*batch_of(tokens, wanted=0)).shape for _ in range(3)]
    assert captures.replays == [2] and none == [(0, 40)] * 3


def test_the_graph_that_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    program = llama(CASES["f32"])
    tokens, captures = tokens_for(program, 8), Captures()
    executor = with_graphs(make(program, tmp_path), captures, most=2)
    cache = executor._graph_cache

    def kept(*rows: int) -> list[int]:
        """The rows of graphs that are there after batches of so many rows."""
        for count in rows:
            executor.forward(*batch_of(tokens[:count]))
        assert cache is not None
        return [count for count in (2, 4, 8) if (count, 1, False) in cache]

    assert kept(2, 4, 8) == [] and kept(4, 2, 4) == [2, 4]
    assert kept(8) == [4, 8] and kept(2) == [4, 8] and kept(2) == [2, 8]
    assert len(captures.made) == 4


def test_a_capture_that_fails_is_the_last(tmp_path: Path) -> None:
    program = llama(CASES["f32"])
    tokens, captures = tokens_for(program, 8), Captures(room=1)
    plain, executor = make(program, tmp_path), with_graphs(make(program, tmp_path), captures)
    expected = {count: plain.forward(*batch_of(tokens[:count])).tobytes() for count in (2, 4, 8)}

    def same(count: int) -> bool:
        return executor.forward(*batch_of(tokens[:count])).tobytes() == expected[count]

    assert all(same(count) for count in (2, 4, 2, 8))
    told = "no more CUDA Graphs are captured, batches are launched: CUDA out of memory. Tried to allocate 1"
    with pytest.warns(UserWarning, match=re.escape(told)):
        assert same(4)
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert all(same(count) for count in (8, 4, 2))
    assert captures.replays == [2]


def test_a_launch_that_fails_leaves_its_shape_unknown() -> None:
    """Its kernels may not be there: a capture could not compile them."""
    captures, launched = Captures(), []
    cache = GraphCache(captures)

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            cache.run("shape", fail)
    cache.run("shape", lambda: launched.append(1))
    assert launched == [1] and not captures.made


def test_graphs_of_a_load_are_those_of_one_row_for_each_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All their kernels are launched before the first capture, which is that of the largest graph."""
    made: list[object] = []

    def capture(launch: Callable[[], object], pool: object, shared: bool) -> object:
        made.append(launch)
        return launch

    executor = make(llama(CASES["f32"]), tmp_path, max_slots=2)
    launched: list[tuple[int, int]] = []
    run_batch = executor._launcher.run

    def launch_batch(rows: int, wanted: int, *rest: Any) -> None:
        launched.append((rows, wanted))
        run_batch(rows, wanted, *rest)

    monkeypatch.setattr(executor._launcher, "run", launch_batch)
    monkeypatch.setattr(cuda_executor, "captured", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    executor.capture()
    assert list(executor._graphs) == [2, 1] and launched == [(2, 2), (1, 1)]
    assert list(executor._draw_graphs) == [(2, True), (2, False), (1, True), (1, False)]
    assert len(made) == 6
