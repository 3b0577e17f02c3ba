"""The one file of the benchmark that knows the insides of the CUDA executor and of its kernels.

On the CPU the same runs in Triton's interpreter, without graphs: replaying is launching there.
"""

from __future__ import annotations

import gc
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu.paper import ROPES
from gristmill.compiler.memory import plan_arena
from gristmill.kernels.triton import linear_configs
from gristmill.kernels.triton.attention import attend
from gristmill.kernels.triton.attention_tilings import Tiling, tilings
from gristmill.kernels.triton.cache import LayerCache, allocate, row_bytes
from gristmill.kernels.triton.matrix import Matrix, merge, meta_matrix
from gristmill.kernels.triton.splits import allocate_partials
from gristmill.runtime.artifact import PROGRAM, open_artifact
from gristmill.runtime.cuda import executor as executors
from gristmill.runtime.cuda.buffers import Batch, Values
from gristmill.runtime.cuda.device import refuse_too_large
from gristmill.runtime.cuda.launch import TILE_QUERIES, Launcher
from gristmill.runtime.cuda.weights import Weights
from gristmill.runtime.profile import kind_of
from gristmill.runtime.program import Instruction, Program, Segment

Ids = NDArray[np.int32]
INTERPRETER = Path(__file__).resolve().parents[2] / "tests" / "kernels" / "triton_interpreter.py"


def use_interpreter() -> None:
    """For a run without a GPU: Triton's interpreter put right as in the tests, and launches cut for one
    processor, for it runs their programs one after the other."""
    if "triton_interpreter" not in sys.modules:
        sys.modules["triton_interpreter"] = cast(Any, SimpleNamespace(**runpy.run_path(str(INTERPRETER))))
    setattr(linear_configs, "MULTIPROCESSORS", 1)  # noqa: B010  (a constant to everyone else)
    setattr(executors, "PROCESSORS_OF_CPU", 1)  # noqa: B010


def with_max_tokens(program: Program, max_tokens: int) -> Program:
    """The same program planned for other forwards; nothing else of it depends on that."""
    made = replace(program, values=[replace(value) for value in program.values])
    made.limits = replace(program.limits, max_tokens=max_tokens)
    plan_arena(made)
    return made


class Decoder:
    """An artifact on a device, and one step of it that can be repeated."""

    def __init__(
        self, artifact: Path, device: torch.device, max_len: int, max_slots: int, max_tokens: int
    ) -> None:
        opened = open_artifact(artifact)
        self.program = with_max_tokens(Program.from_json(opened.json(PROGRAM)), max_tokens)
        weights = opened.weights_path
        gc.collect()  # the decoder before this one
        if device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(device)[0]
            refuse_too_large(self.program, max_len, max_slots, weights.stat().st_size, free)
        self.executor = executors.CudaExecutor(self.program, [weights], device, max_len, max_slots)
        self._rows = 0
        self._held: dict[int, tuple[Ids, Ids, Ids, Ids]] = {}  # ids, positions, slots, rows of a step

    def forward(self, ids: Ids, start: int = 0, slot: int = 0, logits: int = 1) -> NDArray[np.float32]:
        """Takes in ids of one sequence from a position on; the logits of the last ``logits`` of them."""
        count = len(ids)
        positions = np.arange(start, start + count, dtype=np.int32)
        rows = np.arange(count - logits, count, dtype=np.int32)
        found = self.executor.forward(ids, positions, np.full(count, slot, np.int32), rows)
        return np.asarray(found)

    def take_in(self, ids: Ids, chunk: int) -> NDArray[np.float32]:
        """A prompt in chunks; the logits of its last position."""
        found = np.zeros(0, np.float32)
        for start in range(0, len(ids), chunk):
            last = start + chunk >= len(ids)
            found = self.forward(ids[start : start + chunk], start, logits=int(last))
        return found

    def has_prompt_graph(self, rows: int) -> bool:
        """Whether such a forward of one sequence, with the logits of its last position, has a graph now."""
        cache = self.executor._graph_cache
        return cache is not None and (rows, 1, False) in cache

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Until the end of the block prompts are launched, whether they have graphs or not."""
        cache, self.executor._graph_cache = self.executor._graph_cache, None
        try:
            yield
        finally:
            self.executor._graph_cache = cache

    def hold(self, rows: int, context: int) -> None:
        """``rows`` sequences of ``context`` positions; `replay` and `launch` decode their next ones."""
        ids = random_ids(rows * (context + 1), self.executor.vocabulary).reshape(rows, -1)
        for slot in range(rows):
            self.forward(ids[slot, :-1], slot=slot, logits=0)
        slots = np.arange(rows, dtype=np.int32)
        self._held[rows] = (ids[:, -1].copy(), np.full(rows, context, np.int32), slots, slots)
        self.use(rows)

    def use(self, rows: int) -> None:
        """From here on the step is that of as many sequences, which were held before."""
        self._rows = rows
        self.step()

    @property
    def has_graph(self) -> bool:
        return self._rows in self.executor._graphs

    def replay(self) -> None:
        """The step from its graph."""
        if self.has_graph:
            self.executor._graphs[self._rows].replay()
        else:
            self.launch()

    def launch(self) -> None:
        """The step by launches of its kernels."""
        self.executor._launch_batch(self._rows, self._rows, None)

    def step(self) -> NDArray[np.float32]:
        """The step as a session runs it: ids go to the device, logits come back."""
        return np.asarray(self.executor.forward(*self._held[self._rows]))

    def forget(self) -> None:
        """Puts NaN where the next step leaves its logits: what is read there afterwards is that step's."""
        self.executor._values.logits[: self._rows].fill_(float("nan"))

    def logits(self) -> Tensor:
        """A copy of what the last step left, [rows, vocabulary] on the device."""
        return self.executor._values.logits[: self._rows].clone()

    def steps(self) -> list[Step]:
        """What `launch` does, one by one."""
        return steps(self.executor._launcher, self._rows)


@dataclass(frozen=True)
class Step:
    """A part of a step: an instruction, or what comes before all of them."""

    kind: str
    instruction: Instruction | None
    run: Callable[[], None]


def steps(launcher: Launcher, rows: int) -> list[Step]:
    """The parts of decoding ``rows`` sequences; to be run in their order."""
    program = launcher.program

    def begin() -> None:
        launcher.program = replace(program, instructions=[])
        launcher.run(rows, rows, None)
        launcher.program = program

    def of(index: int, instruction: Instruction) -> Callable[[], None]:
        return lambda: getattr(launcher, f"_{instruction.op}")(index, instruction)

    found = [Step(kind_of(program, i), i, of(n, i)) for n, i in enumerate(program.instructions)]
    return [Step(ROPES, None, begin), *found]


def random_ids(count: int, vocabulary: int) -> Ids:
    """The same ids every time."""
    return np.random.default_rng(11).integers(0, vocabulary, count).astype(np.int32)


# ---- attention alone


@dataclass
class LongAttention:
    """Attention of one new row per layer over full caches of random numbers, as decoding launches it."""

    caches: list[LayerCache]
    heads: int
    q: Tensor
    new: tuple[Tensor, Tensor]
    out: Tensor

    @staticmethod
    def make(
        dtype: str, heads: int, kv_heads: int, dim: int, context: int, layers: int, device: torch.device
    ) -> LongAttention:
        caches = [
            allocate(dtype, dtype, dim, dim, kv_heads, 1, context, device=device) for _ in range(layers)
        ]
        for cache in caches:
            _fill(cache)
        q = torch.randn(1, heads * dim, device=device)
        k, v = torch.randn(2, 1, kv_heads * dim, device=device)
        return LongAttention(caches, heads, q, (k, v), torch.empty(1, heads * dim, device=device))

    @property
    def bytes(self) -> int:
        """Bytes of one layer's cache, all of which is read."""
        cache = self.caches[0]
        row = row_bytes(cache.k.dtype, cache.k.dim) + row_bytes(cache.v.dtype, cache.v.dim)
        return row * cache.kv_heads * cache.ring

    def tilings(self, processors: int) -> list[Tiling]:
        """Those that come into question, the executor's first."""
        first = self.caches[0]
        group = self.heads // first.kv_heads
        return tilings(first, self.heads, max(1, TILE_QUERIES // group), 1, processors)

    def launcher(self, tiles: Tiling) -> Callable[[], None]:
        """A function that launches every layer's attention once."""
        first, device = self.caches[0], self.q.device
        partials = None
        if tiles.splits > 1:
            partials = allocate_partials(1, self.heads, first.kv_heads, tiles.splits, first.v.dim, device)
        position = torch.full((1,), first.ring - 1, dtype=torch.int32, device=device)
        slot = torch.zeros(1, dtype=torch.int32, device=device)
        scale = first.k.dim**-0.5

        def launch() -> None:
            for cache in self.caches:
                attend(
                    self.q, cache, position, slot, scale, tiles, self.out, new=self.new, partials=partials
                )

        return launch


def _fill(cache: LayerCache) -> None:
    for rows in (cache.k, cache.v):
        if rows.data.dtype.is_floating_point:
            rows.data.normal_()
        elif rows.dtype == "int8":
            rows.data.random_(-127, 128)
        else:
            rows.data.random_(0, 0x7F)  # as e4m3: all that is positive and a number
        if rows.scales is not None:
            rows.scales.uniform_(0.001, 0.01)


# ---- launches counted, and launched on nothing


class _Operations(TorchDispatchMode):
    """Counts torch operations that run a kernel; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.name() not in ("aten::empty.memory_format", "aten::_unsafe_view"):
            self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Launches:
    """What was launched: Triton kernels by name, grid, and what was compiled; operations of torch's."""

    kernels: list[tuple[str, tuple[int, ...], Any]]
    operations: int = 0

    @property
    def count(self) -> int:
        return len(self.kernels) + self.operations


def launches_by_kind(steps: Sequence[Step], launch: bool = True) -> dict[str, Launches]:
    """What all instructions of a kind launch."""
    found: dict[str, Launches] = {}
    for step in steps:
        with counted(launch) as once:
            step.run()
        of_kind = found.setdefault(step.kind, Launches([]))
        of_kind.kernels += once.kernels
        of_kind.operations += once.operations
    return found


def count_on_nothing(program: Program, processors: int) -> dict[str, int]:
    """Kernels by kind of instruction that decoding one row takes; nothing is compiled or run."""
    launcher = meta_launcher(program, 1, 4096, processors)
    return {kind: made.count for kind, made in launches_by_kind(steps(launcher, 1), launch=False).items()}


@contextmanager
def counted(launch: bool = True) -> Iterator[Launches]:
    """Counts kernels until the end of the block, in the interpreter too; launch: and lets them run."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    found, operations = Launches([]), _Operations()
    kinds: tuple[Any, ...] = (JITFunction, InterpretedFunction)
    before = [kind.run for kind in kinds]

    def recording(run: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(self: Any, *args: Any, **options: Any) -> Any:
            with torch.utils._python_dispatch._disable_current_modes():
                kernel = run(self, *args, **options) if launch else None
            found.kernels.append((self.__name__, tuple(options["grid"]), kernel))
            return kernel

        return recorded

    for kind in kinds:
        kind.run = recording(kind.run)
    try:
        with operations:
            yield found
    finally:
        for kind, run in zip(kinds, before):
            kind.run = run
        found.operations = operations.count


def meta_launcher(program: Program, rows: int, max_len: int, processors: int) -> Launcher:
    """A launcher of a program without weights, whose tensors are all of the device "meta"."""
    meta = torch.device("meta")
    names = {rope.inv_freq for rope in program.ropes}
    names |= {name for i in program.instructions for name in i.vectors.values()}
    weights = SimpleNamespace(
        matrices={key: merge([_meta(s) for s in segments]) for key, segments in program.weights.items()},
        vectors={name: torch.empty(_length(program, name), device=meta) for name in names},
    )
    caches = [
        allocate(c.k_dtype, c.v_dtype, c.k_dim, c.v_dim, c.kv_heads, 1, max_len, c.window, meta)
        for c in program.caches
    ]
    values, batch = Values(program, meta), Batch(program.limits.max_tokens, 1, meta)
    return Launcher(program, cast(Weights, weights), caches, values, batch, [rows], processors)


def _length(program: Program, name: str) -> int:
    """Of a vector: half the rotated dimensions, or the width of what it belongs to."""
    for rope in program.ropes:
        if rope.inv_freq == name:
            return rope.dims // 2
    for i in program.instructions:
        if name in i.vectors.values():
            return i.out.width
    raise AssertionError(f"nobody uses {name}")


def _meta(s: Segment) -> Matrix:
    return meta_matrix(s.format, s.n, s.k, s.group, s.symmetric)


def weights_of_lane(segments: Sequence[Segment], act_group: int) -> float:
    """Weights that a lane takes in one turn of the loop of a product with one row."""
    first = merge([_meta(segment) for segment in segments])[0]
    config = linear_configs.choose(first, 1, act_group)
    if config.integer:
        return config.rows * config.chunks * (first.k / linear_configs.quads(first)) / (32 * config.warps)
    return config.rows * config.chunks * first.width * first.parts / (32 * config.warps)
