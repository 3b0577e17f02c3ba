"""The instructions of a program as launches of kernels on memory that is there already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gristmill.kernels.triton.append import AS_THEY_ARE, Preparation, Rotary, append, rope_tables
from gristmill.kernels.triton.attention import attend, can_quantize
from gristmill.kernels.triton.attention_tilings import Tiling, tiling
from gristmill.kernels.triton.cache import LayerCache
from gristmill.kernels.triton.embedding import embedding
from gristmill.kernels.triton.gather import gather_rows
from gristmill.kernels.triton.linear import linear
from gristmill.kernels.triton.norms import layer_norm, rms_norm
from gristmill.kernels.triton.pointwise import pointwise
from gristmill.kernels.triton.quantize import Quantized
from gristmill.kernels.triton.splits import Partials, cut_partials, partials_size
from gristmill.runtime.cuda.buffers import Batch, Values
from gristmill.runtime.cuda.products import Products
from gristmill.runtime.cuda.tuning import Tuned
from gristmill.runtime.cuda.weights import Weights
from gristmill.runtime.program import LOGITS, Instruction, Program, View

FEW_ROWS = 64  # up to here, or to as many as there are slots, a tile of attention holds 16 queries
TILE_QUERIES = 16  # that a tensor core takes at least
Taken = Callable[[int, int], None]


class Between(Protocol):
    """What is done to whole values between instructions, where several devices share a program."""

    def values(self, index: int) -> Sequence[int]:
        """The values that are due after the instruction."""

    def run(self, index: int, whole: Sequence[Tensor]) -> None:
        """Does what is due; whole: of those values the rows of the batch, [rows, width] f32."""


class Launcher:
    """Walks the instructions for a bucket of rows.

    A row's bits depend on the buckets alone, not on the other rows: plans and tilings are made for a bucket,
    whether its rows are of one slot or of many. few_rows: up to this bucket rows may be one of each slot, and
    attention is cut for that. tuned: configs for this device, instead of the table's.
    """

    def __init__(
        self, program: Program, weights: Weights, caches: Sequence[LayerCache], values: Values, batch: Batch,
        buckets: Sequence[int], processors: int, few_rows: int = FEW_ROWS, tuned: Tuned | None = None,
        between: Between | None = None,
    ) -> None:  # fmt: skip
        self.program, self.weights, self.caches = program, weights, caches
        self.values, self.batch, self.processors = values, batch, processors
        self._few_rows, self._between = few_rows, between
        device, most = batch.ids("tokens", 1).device, program.limits.max_tokens
        self._angles = [
            torch.zeros(2, most * (rope.dims // 2), device=device) for rope in program.ropes
        ]
        self._tilings: dict[tuple[int, int], Tiling] = {}
        floats, counters, queries = 1, 1, 1
        for index, i in enumerate(program.instructions):
            for rows in buckets if i.op == "attention" else ():
                floats = max(floats, self._tile(index, i, rows))
                cache = caches[i.attribute("cache")]
                counters = max(counters, rows * cache.kv_heads)
                queries = max(queries, rows * i.attribute("heads") * cache.k.dim)
        self.products = Products(
            program, weights, buckets, len(values.logits), tuned, between.values if between else lambda _: (),
            self._attends_int8, device,
        )  # fmt: skip
        self._partials = torch.zeros(floats, device=device)
        self._queries = torch.zeros(queries, device=device)
        self._arrived = torch.zeros(counters, dtype=torch.int32, device=device)
        self.block_rows = {
            rows: {tile.rows for (_, of), tile in self._tilings.items() if of == rows} for rows in buckets
        }

    @property
    def bytes(self) -> int:
        """Bytes of what kernels keep in between."""
        kept = (self._partials, self._arrived, self._queries, *self._angles)
        return self.products.bytes + sum(tensor.nbytes for tensor in kept)

    def _tile(self, index: int, i: Instruction, rows: int) -> int:
        """Tiles an attention; floats of partials."""
        cache, heads = self.caches[i.attribute("cache")], i.attribute("heads")
        if rows <= self._few_rows:
            block_rows = max(1, TILE_QUERIES // (heads // cache.kv_heads))
            tiles = tiling(cache, heads, block_rows, rows, self.processors)
        else:
            block_rows = tiling(cache, heads, rows, 1, self.processors).rows
            tiles = tiling(cache, heads, rows, -(-rows // block_rows), self.processors)
        self._tilings[index, rows] = tiles
        return partials_size(rows, heads, tiles.splits, cache.v.dim)

    def _attends_int8(self, index: int, group: int) -> bool:
        i = self.program.instructions[index]
        return can_quantize(self.caches[i.attribute("cache")], i.attribute("heads"), group)

    def run(
        self, rows: int, wanted: int, blocks: dict[int, Tensor] | None, taken: Taken | None = None,
        asked: int | None = None,
    ) -> None:  # fmt: skip
        """Launches everything for a batch that is on the device.

        rows, wanted: buckets of T and of R, the latter 0 where no logits are asked for; blocks: by rows of a
        block, None: every row is a slot's only one. taken: called with (first, count) whenever Values.logits
        holds those of the rows first to first + count; asked: how many of the wanted rows' it must come to,
        all unless given.
        """
        self.begin(rows, wanted, blocks)
        for index, instruction in enumerate(self.program.instructions):
            if instruction.out.value == LOGITS:
                self._in_pieces(index, instruction, taken, wanted if asked is None else asked)
            else:
                self.launch(index)
                self.exchange(index)

    def begin(self, rows: int, wanted: int, blocks: dict[int, Tensor] | None) -> None:
        """Sets the sizes of what `launch` launches, and launches what all attentions share."""
        self._rows, self._wanted, self._blocks, self._first = rows, wanted, blocks, 0
        for rope, table in zip(self.program.ropes, self._angles):
            cos, sin = (half[: rows * (rope.dims // 2)].view(rows, -1) for half in table)
            inv_freq = self.weights.vectors[rope.inv_freq]
            rope_tables(self.batch.ids("positions", rows), inv_freq, rope.scale, cos, sin)

    def launch(self, index: int) -> None:
        """Launches one instruction; of rows of logits no more than there is room for."""
        instruction = self.program.instructions[index]
        if self._count(instruction.out):
            getattr(self, f"_{instruction.op}")(index, instruction)

    def exchange(self, index: int) -> None:
        """Does what is due between an instruction and the next."""
        if self._between is None:
            return
        values = self._between.values(index)
        views = [View(value, 0, self._width(value)) for value in values]
        if views and all(self._count(view) for view in views):
            self._between.run(index, [self._view(view) for view in views])

    def _width(self, value: int) -> int:
        return self.program.vocabulary if value == LOGITS else self.program.values[value].width

    def _in_pieces(self, index: int, i: Instruction, taken: Taken | None, asked: int) -> None:
        """The logits of ``asked`` rows, of the last ones a whole piece: a piece is a bucket."""
        wanted, size = self._wanted, min(self._wanted, len(self.values.logits))
        for start in range(0, min(asked, wanted), max(size, 1)):
            self._first, self._wanted = min(start, wanted - size), size
            self.launch(index)
            self.exchange(index)
            if taken:
                taken(self._first, size)
        self._first, self._wanted = 0, wanted

    def _count(self, view: View) -> int:
        of_batch = view.value != LOGITS and self.program.values[view.value].rows == "T"
        return self._rows if of_batch else self._wanted

    def _view(self, view: View) -> Tensor:
        if view.value == LOGITS:
            return self.values.view(view, self._wanted)
        of_batch = self.program.values[view.value].rows == "T"
        return self.values.view(view, self._count(view), 0 if of_batch else self._first)

    def _input(self, i: Instruction, name: str) -> Tensor | None:
        view = i.views.get(name)
        return self._view(view) if isinstance(view, View) else None

    def _given(self, i: Instruction, name: str) -> Tensor:
        found = self._input(i, name)
        assert found is not None, f"{i.op} without {name}"
        return found

    def _ids(self, name: str, out: Tensor) -> Tensor:
        return self.batch.ids(name, len(out), self._first if name == "rows" else 0)

    def _vector(self, i: Instruction, name: str) -> Tensor | None:
        return self.weights.vectors[i.vectors[name]] if name in i.vectors else None

    def _embedding(self, index: int, i: Instruction) -> None:
        assert i.weight is not None
        out = self._view(i.out)
        embedding(
            self._ids(i.attribute("ids"), out), self.weights.matrices[i.weight], out,
            residual=self._input(i, "residual"), scale=i.attribute("scale"), offset=i.attribute("offset"),
        )  # fmt: skip

    def _rms_norm(self, index: int, i: Instruction) -> None:
        if (index, self._count(i.out)) in self.products.dissolved:
            return
        rms_norm(
            self._given(i, "in"), self._vector(i, "weight"), self._input(i, "residual"), i.attribute("eps"),
            self._out(index, i), self._int8_beside(index, i),
        )  # fmt: skip

    def _layer_norm(self, index: int, i: Instruction) -> None:
        layer_norm(
            self._given(i, "in"), self._vector(i, "weight"), self._vector(i, "bias"),
            self._input(i, "residual"), i.attribute("eps"), self._out(index, i), self._int8_beside(index, i),
        )  # fmt: skip

    def _out(self, index: int, i: Instruction) -> Tensor:
        """Where an instruction writes its result: as the value, or as the next one's input in 16 bits."""
        rounded = self.products.rounded_input(index + 1, self._count(i.out))
        return self._view(i.out) if rounded is None else rounded

    def _int8_beside(self, index: int, i: Instruction) -> Quantized | None:
        """Where it writes its result as int8 too, for the product that is next."""
        return self.products.int8_input(index + 1, self._count(i.out))

    def _linear(self, index: int, i: Instruction) -> None:
        assert i.weight is not None
        out, products = self._out(index, i), self.products
        rounded = products.rounded_input(index, len(out))
        linear(
            self._given(i, "in") if rounded is None else rounded, self.weights.matrices[i.weight], out,
            p=products.plans[index, len(out)], workspace=products.workspace, bias=self._vector(i, "bias"),
            residual=self._input(i, "residual"), order=self._vector(i, "order"),
            activation=i.attribute("activation"), glu=i.attribute("glu"), scale=i.attribute("scale"),
            softcap=i.attribute("softcap"), given=products.prepared.get((index, len(out))),
            then=products.handovers.get((index, len(out))),
        )  # fmt: skip

    def _attention(self, index: int, i: Instruction) -> None:
        """One kernel, but where rows see each other: those are appended before, and many have their queries
        prepared there."""
        cache, tiles = self.caches[i.attribute("cache")], self._tilings[index, self._rows]
        positions, slots = self.batch.ids("positions", self._rows), self.batch.ids("slots", self._rows)
        q, new = self._given(i, "q"), (self._given(i, "k"), self._given(i, "v"))
        preparation = Preparation(
            self._vector(i, "q_norm"), self._vector(i, "k_norm"), i.attribute("norm_eps"),
            self._rotary(i.attribute("rope")), i.attribute("hadamard"),
        )  # fmt: skip
        blocks = None if self._blocks is None else self._blocks[tiles.rows]
        if blocks is not None and self._rows <= self._few_rows:  # as `attend` appends rows by themselves
            append(*new, positions, slots, cache, preparation, tiles.warps)
        elif blocks is not None and preparation.of_queries:
            queries = self._query_buffer(q, cache)
            append(*new, positions, slots, cache, preparation, q=q, queries=queries)
            q, preparation = queries, AS_THEY_ARE
        elif blocks is not None:
            append(*new, positions, slots, cache, preparation)
        attend(
            q, cache, positions, slots, i.attribute("scale"), tiles, self._out(index, i), preparation,
            i.attribute("softcap"), self._vector(i, "sinks"), new if blocks is None else None, blocks,
            self._parts(i, cache, tiles), self._int8_beside(index, i),
        )  # fmt: skip

    def _query_buffer(self, q: Tensor, cache: LayerCache) -> Tensor:
        """Room for prepared queries in the type that they are multiplied in."""
        dtype = torch.float32 if cache.k.dtype == "f32" else torch.float16
        return self._queries.view(dtype)[: q.numel()].view(q.shape)

    def _parts(self, i: Instruction, cache: LayerCache, tiles: Tiling) -> Partials | None:
        if tiles.splits == 1:
            return None
        sizes = (self._rows, i.attribute("heads"), cache.kv_heads, tiles.splits, cache.v.dim)
        return cut_partials(self._partials, self._arrived, *sizes)

    def _rotary(self, rope: int) -> Rotary | None:
        if rope < 0:
            return None
        spec = self.program.ropes[rope]
        cos, sin = (half[: self._rows * (spec.dims // 2)].view(self._rows, -1) for half in self._angles[rope])
        return Rotary(cos, sin, spec.style == "interleaved")

    def _gather_rows(self, index: int, i: Instruction) -> None:
        out = self._view(i.out)
        gather_rows(self._given(i, "in"), self._ids("rows", out), out)

    def _pointwise(self, index: int, i: Instruction) -> None:
        inputs = i.views["in"]
        assert isinstance(inputs, list), "pointwise takes a list of inputs"
        pointwise([self._view(view) for view in inputs], i.attribute("steps"), self._view(i.out))
