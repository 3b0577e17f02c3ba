"""The executor of one program on one device: pads a batch to its bucket and launches or replays it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gristmill.kernels.triton.attention import blocks_of
from gristmill.kernels.triton.cache import allocate, copy_slot
from gristmill.kernels.triton.linear_configs import Config
from gristmill.runtime.cuda.buffers import Batch, Values
from gristmill.runtime.cuda.compiling import compiled_together
from gristmill.runtime.cuda.device import (
    buckets,
    captured_rows,
    current,
    few_rows,
    kv_bytes,
    refuse_out_of_memory,
)
from gristmill.runtime.cuda.drawing import MAX_VOCABULARY, Drawing, drawing_bytes
from gristmill.runtime.cuda.graphs import GraphCache, captured
from gristmill.runtime.cuda.launch import Between, Launcher, Taken
from gristmill.runtime.cuda.residuals import added_in_place
from gristmill.runtime.cuda.tuning import Timer, Tuned, tune_all, works
from gristmill.runtime.cuda.weights import Weights
from gristmill.runtime.decoding.draws import Draws
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.footprint import kv_rows
from gristmill.runtime.program import NO_HIDDEN_STATES, Program

if TYPE_CHECKING:
    from gristmill.runtime.cuda.probe import CudaProbe
    from gristmill.runtime.session import Session

SPARE_BLOCKS = 16  # of attention, empty ones end at once
PROCESSORS_OF_CPU = 4  # what the interpreter pretends to have; kept small, for it runs one after the other


class CudaExecutor:
    """What a Session needs, see runtime/session.py; on CPU tensors where Triton's interpreter runs kernels.

    Batches of one row per slot and up to 256 rows are replayed from CUDA Graphs that are captured at load,
    others from the second one of a shape on, see `GraphCache`; the rest is launched.
    """

    threads = 1
    rows_agree = False  # buckets differ in rounding

    def __init__(
        self, program: Program, weights: Sequence[Path], device: torch.device, max_len: int, max_slots: int,
        between: Between | None = None,
    ) -> None:  # fmt: skip
        """weights: the files that hold them. between: what several devices that share a program do between
        instructions, see runtime/parallel; `capture` then comes after all are connected, else it is done."""
        self.max_tokens, self.vocabulary = program.limits.max_tokens, program.vocabulary
        self.max_len, self.max_slots, self.device = max_len, max_slots, device
        if between is None:
            program = added_in_place(program)
        self._program = program
        self._buckets = buckets(self.max_tokens)
        self._few_rows = few_rows(max_slots, self.max_tokens)
        self._weights = Weights(program, weights, device)
        self._caches = [
            allocate(
                c.k_dtype, c.v_dtype, c.k_dim, c.v_dim, c.kv_heads, max_slots + 1,
                kv_rows(c, max_len, self.max_tokens), c.window, device,
            )
            for c in program.caches
        ]  # fmt: skip
        self._values = Values(program, device, self._few_rows)
        self._batch = Batch(self.max_tokens, max_slots, device)
        self.draws_tokens = self.vocabulary <= MAX_VOCABULARY
        self._drawing = Drawing(self._batch, self._values.logits, max_len, max_slots)
        self.processors = PROCESSORS_OF_CPU
        if device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._launcher = Launcher(
            program, self._weights, self._caches, self._values, self._batch, self._buckets, self.processors,
            self._few_rows, Tuned.read(device), between,
        )  # fmt: skip
        self._blocks = {
            rows: torch.zeros(self.max_tokens, 4, dtype=torch.int32, device=device)
            for rows in set().union(*self._launcher.block_rows.values())
        }
        self.kv_bytes = kv_bytes(program, max_len, max_slots + 1)
        drawing = drawing_bytes(self._few_rows, self.vocabulary, max_len, max_slots)
        values = self._values.arena.nbytes + self._values.logits.nbytes
        self.arena_bytes = values + drawing + self._launcher.bytes
        self.weight_bytes = self._weights.bytes
        self.weight_bytes_per_token = self._weights.bytes_per_token(program)
        self._shortest_ring = min((cache.ring for cache in self._caches), default=max_len)
        self._last: tuple[int, int, dict[int, Tensor] | None] = (0, 0, None)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._draw_graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._graph_cache: GraphCache | None = None
        self.wait: Callable[[], None] | None = None  # before results are taken, where that must not block
        self._shared = between is not None
        if device.type == "cuda" and not self._shared:
            self.capture()

    def forward(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Logits [R, vocabulary] f32 of the rows named by ``rows``; see Session.forward.

        Raises GristmillError for ids out of range, for positions that a slot cannot hold together and where
        the device's memory does not suffice.
        """
        logits = np.empty((len(rows), self.vocabulary), np.float32)

        def take(first: int, count: int) -> None:
            to = torch.from_numpy(logits[first : first + count])
            to.copy_(self._values.logits[: len(to)])

        self._execute(tokens, positions, slots, rows, take)
        return logits

    def sample(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray, draws: Draws
    ) -> np.ndarray:
        """The next tokens [R] i32 of the same batch, -1 where a row's logits are not finite; draws: of each
        of ``rows``. Only the tokens come to the host.

        Raises GristmillError as `forward` does, and where the vocabulary is too large to draw from here.
        """
        if not self.draws_tokens:
            raise GristmillError(
                f"a vocabulary of {self.vocabulary} is drawn from on the host, up to {MAX_VOCABULARY} here; "
                "use forward"
            )
        if len(draws) != len(rows):
            raise GristmillError(f"{len(rows)} rows need as many draws, got {len(draws)}")
        drawn = np.empty(len(rows), np.int32)

        def take(first: int, count: int) -> None:
            given = draws[first : first + count]
            self._drawing.fill(given)
            if (count, given.all_greedy) in self._draw_graphs and not first:
                self._draw_graphs[count, given.all_greedy].replay()
            else:
                self._drawing.launch(first, count, given.all_greedy)
            drawn[first : first + count] = self._drawing.read(len(given))

        self._execute(tokens, positions, slots, rows, take)
        return drawn

    def _execute(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray, take: Taken
    ) -> None:
        """Runs the batch; ``take`` gets the logits, piece by piece."""
        self.check(tokens, positions, slots, rows)
        count, wanted = self._bucket(len(tokens)), self._bucket(len(rows))
        alone = len(np.unique(slots)) == len(slots) and count <= self._few_rows
        if alone and 0 < wanted <= count:
            wanted = count  # as a graph has it
        remedy = "give fewer rows at once, or load with a smaller max_len or max_slots"
        with self._current(), refuse_out_of_memory(self.device, f"in a batch of {len(tokens)} rows", remedy):
            self._batch.fill({"tokens": tokens, "positions": positions, "slots": slots, "rows": rows})
            self._last = (count, wanted, None if alone else self._cut(len(tokens)))
            self._run_last(self._waiting(take), len(rows))
            if self.wait is not None:
                self.wait()
            if self.device.type == "cuda":  # nothing may be under way when the ids are filled again
                torch.cuda.current_stream().synchronize()

    def _run_last(self, take: Taken, asked: int) -> None:
        """Replays or launches the batch that `_last` is about."""
        rows, wanted, blocks = self._last
        if blocks is None and wanted == rows and rows in self._graphs:
            self._graphs[rows].replay()
        elif self._graph_cache is not None and self._has_fixed_launches(rows, wanted, blocks):
            launch = partial(self._launch_batch, rows, wanted, blocks)
            self._graph_cache.run((rows, wanted, blocks is None), launch)
        else:
            self._launch_batch(rows, wanted, blocks, take, asked)
            return
        if wanted:
            take(0, wanted)

    def _has_fixed_launches(self, rows: int, wanted: int, blocks: dict[int, Tensor] | None) -> bool:
        """Whether all batches of these buckets launch the same: logits in one piece, and blocks that fit."""
        fit = blocks is None or all(len(b) == _most_blocks(rows, size) for size, b in blocks.items())
        return fit and wanted <= len(self._values.logits)

    def follow(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray
    ) -> None:
        """`forward` for those who share the work and not the result."""
        self._execute(tokens, positions, slots, rows, lambda first, count: None)

    def forward_hidden(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`forward`, and the hidden states [R, hidden] f32 of the same rows: what the head multiplies.

        Raises GristmillError also where the program has none to give, see Program.hidden.
        """
        if (view := self._program.hidden) is None:
            raise GristmillError(NO_HIDDEN_STATES)
        logits = self.forward(tokens, positions, slots, rows)
        with self._current():
            return logits, self._values.view(view, len(rows)).to("cpu", copy=True).numpy()

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Gives ``target`` positions ``start`` to ``length`` of ``source``; those before, both hold alike."""
        last = self.max_slots - 1
        limits = {"source": last, "target": last, "length": self.max_len, "start": length}
        for (name, most), value in zip(limits.items(), (source, target, length, start), strict=True):
            if not 0 <= value <= most:
                raise GristmillError(f"copy_slot: {name} is {value}, expected 0 to {most}")
        if source != target:
            with self._current():
                copy_slot(self._caches, source, target, length, start)
                self._drawing.copy_slot(source, target, length, start)

    def exchange_last(self) -> None:
        """What is exchanged in a forward of the last batch's size, all of it once more; values are spoilt."""
        rows, wanted, blocks = self._last
        with self._current():
            self._launcher.begin(rows, min(wanted, len(self._values.logits)), blocks)
            for index in range(len(self._program.instructions)):
                self._launcher.exchange(index)

    def relaunch(self, instructions: Sequence[int]) -> Callable[[], None]:
        """What launches some instructions of the last batch once more, to be timed; values are spoilt by it,
        and of rows of logits there are as many as are computed at once."""
        rows, wanted, blocks = self._last
        wanted = min(wanted, len(self._values.logits))

        def launch() -> None:
            with self._current():
                for index in instructions:
                    self._launcher.launch(index)

        with self._current():
            self._launcher.begin(rows, wanted, blocks)
        return launch

    def probe(self, session: Session) -> CudaProbe:
        """What measures this device, for `gristmill bench`."""
        from gristmill.runtime.cuda.probe import CudaProbe

        remedy = "measure with a smaller --context or --prompt, or load with fewer max_slots"
        with refuse_out_of_memory(self.device, "measuring", remedy):
            return CudaProbe(self, session)

    def tune(self, max_rows: int | None = None, time: Timer | None = None) -> Iterator[tuple[str, Config]]:
        """Times the candidates for every product of the program in its buckets of up to ``max_rows`` rows.

        The winners are stored for the executors that are made from now on; yields what was timed and the
        config that won, as they come. time: of a call, None: on the device. Raises GristmillError where they
        cannot be stored and where memory ends.
        """
        chosen = [rows for rows in self._buckets if max_rows is None or rows <= max_rows]
        wanted = works(self._program, self._weights.matrices, chosen, len(self._values.logits))
        remedy = "load with a smaller max_len"
        with self._current(), refuse_out_of_memory(self.device, "tuning", remedy):
            for work, config in tune_all(wanted, self.device, time):
                yield work.key, config

    def _waiting(self, take: Taken) -> Taken:
        wait = self.wait
        if wait is None:
            return take

        def after_wait(first: int, count: int) -> None:
            wait()
            take(first, count)

        return after_wait

    def _bucket(self, rows: int) -> int:
        return next(bucket for bucket in [0, *self._buckets] if rows <= bucket)

    def _cut(self, count: int) -> dict[int, Tensor]:
        """The blocks of the batch's own rows, on the device, by rows of a block; empty ones make them as many
        as most batches of the bucket have, so that these launch the same."""
        bucket, found = self._bucket(count), {}
        for rows in self._launcher.block_rows[bucket]:
            cut = blocks_of(self._batch.host("positions", count), self._batch.host("slots", count), rows)
            padded = torch.zeros(max(len(cut), _most_blocks(bucket, rows)), 4, dtype=torch.int32)
            padded[: len(cut)] = cut
            found[rows] = self._blocks[rows][: len(padded)]
            found[rows].copy_(padded)
        return found

    def _current(self) -> AbstractContextManager[object]:
        """The device is current in the calling thread, whichever that is."""
        return current(self.device)

    def capture(self) -> None:
        """Graphs of the buckets that one row per slot can fill, largest first, all in one pool of memory.

        Other shapes get graphs as they come, except where devices share a program: a capture that failed on
        one of them would leave the others waiting in theirs.
        """
        most = self._bucket(captured_rows(self.max_slots, self.max_tokens))
        counts = [bucket for bucket in reversed(self._buckets) if bucket <= most]
        batches = {count: partial(self._launch_batch, count, count, None) for count in counts}
        draws = {
            (count, greedy): partial(self._drawing.launch, 0, count, greedy)
            for count in counts
            for greedy in ((True, False) if self.draws_tokens else ())
        }
        self._batch.fill({})
        self._drawing.fill(Draws.greedy(0))
        with compiled_together():
            for launch in (*batches.values(), *draws.values()):
                launch()
        pool = torch.cuda.graph_pool_handle()
        for count in counts:
            self._batch.fill({"rows": np.arange(count, dtype=np.int32)})
            self._drawing.fill(Draws.greedy(0))
            self._graphs[count] = captured(batches[count], pool, self._shared)
            for greedy in (True, False):
                if draw := draws.get((count, greedy)):
                    self._draw_graphs[count, greedy] = captured(draw, pool, self._shared)
        if not self._shared:
            self._graph_cache = GraphCache.on_device(pool)

    def _launch_batch(
        self, rows: int, wanted: int, blocks: dict[int, Tensor] | None, take: Taken | None = None,
        asked: int | None = None,
    ) -> None:  # fmt: skip
        self._drawing.record(rows)
        self._launcher.run(rows, wanted, blocks, take, asked)

    def check(
        self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray, rows: np.ndarray
    ) -> None:
        """Raises GristmillError for a batch that cannot be run."""
        count = len(tokens)
        if not 1 <= count <= self.max_tokens or len(rows) > self.max_tokens:
            raise GristmillError(
                f"got {count} tokens and {len(rows)} rows, expected 1 to {self.max_tokens} and no more rows"
            )
        if not len(positions) == len(slots) == count:
            raise GristmillError(f"{count} tokens need as many positions and slots")
        limits = {
            "tokens": (tokens, self.vocabulary), "positions": (positions, self.max_len),
            "slots": (slots, self.max_slots), "rows": (rows, count),
        }  # fmt: skip
        for name, (values, limit) in limits.items():
            outside = values[(values < 0) | (values >= limit)]
            if len(outside):
                raise GristmillError(f"{name}: got {outside[0]}, expected 0 to {limit - 1}")
        self._check_slots(positions, slots)

    def _check_slots(self, positions: np.ndarray, slots: np.ndarray) -> None:
        """No position of a slot twice, none so far apart that one overwrites the other in a window's ring."""
        order = np.lexsort((positions, slots))
        at, of = positions[order], slots[order]
        same = of[1:] == of[:-1]
        if (same & (at[1:] == at[:-1])).any():
            raise GristmillError("a slot has one position twice in one forward; give each once")
        firsts = np.flatnonzero(np.concatenate([[True], ~same]))
        lasts = np.concatenate([firsts[1:], [len(at)]]) - 1
        span = int((at[lasts] - at[firsts]).max())
        if span >= self._shortest_ring:
            raise GristmillError(
                f"a slot has positions {span} apart in one forward, at most {self._shortest_ring - 1} are "
                "possible; split the batch"
            )


def _most_blocks(bucket: int, block_rows: int) -> int:
    """Blocks that attention is launched for, unless a batch has more: those of one slot's rows, and as many
    more as slots that share the bucket or the edges of blocks may add."""
    return min(bucket, -(-bucket // block_rows) + SPARE_BLOCKS)
