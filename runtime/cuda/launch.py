"""The instructions of a program as launches of kernels on memory that is there already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from gristmill.kernels.triton.append import Rotary, append, rope_tables
from gristmill.kernels.triton.attention import (
    Tiling,
    attend,
    can_quantize,
    cut_partials,
    partials_size,
    tiling,
)
from gristmill.kernels.triton.cache import LayerCache
from gristmill.kernels.triton.embedding import embedding
from gristmill.kernels.triton.gather import gather_rows
from gristmill.kernels.triton.handover import Handover, Prepared, is_wanted
from gristmill.kernels.triton.linear import (
    Plan,
    adds_floats,
    can_hand_over,
    counters,
    group_of,
    linear,
    plan,
    prepared_bytes,
    prepared_input,
    takes_prepared,
    workspace_bytes,
)
from gristmill.kernels.triton.norms import layer_norm, rms_norm
from gristmill.kernels.triton.pointwise import pointwise
from gristmill.kernels.triton.quantize import Quantized
from gristmill.runtime.cuda.buffers import Batch, Values
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

    Where a product by cuBLAS is the only reader of a value, the instruction before it writes the value in the
    16 bits that are multiplied, into a buffer that all such products share: an instruction that is a product
    itself writes there only after it has read its own input.
    """

    def __init__(
        self, program: Program, weights: Weights, caches: Sequence[LayerCache], values: Values, batch: Batch,
        buckets: Sequence[int], processors: int, few_rows: int = FEW_ROWS, tuned: Tuned | None = None,
        between: Between | None = None,
    ) -> None:  # fmt: skip
        self.program, self.weights, self.caches = program, weights, caches
        self.values, self.batch, self.processors = values, batch, processors
        self._few_rows, self._tuned, self._between = few_rows, tuned, between
        device, most = batch.ids("tokens", 1).device, program.limits.max_tokens
        self._angles = [
            torch.zeros(2, most * (rope.dims // 2), device=device) for rope in program.ropes
        ]
        self._kept = self._values_kept()
        self._plans: dict[tuple[int, int], Plan] = {}
        self._rounded: set[tuple[int, int]] = set()
        self._tilings: dict[tuple[int, int], Tiling] = {}
        size, floats, queries, inputs, rounded = 1, 1, 1, 1, 1
        for index, i in enumerate(program.instructions):
            for rows in buckets:
                if i.op == "linear":
                    piece = min(rows, len(values.logits)) if i.out.value == LOGITS else rows
                    size = max(size, self._plan(index, i, piece))
                    inputs = max(inputs, self._input_bytes(index, i, piece))
                    if (index, piece) in self._rounded:
                        rounded = max(rounded, piece * self._input_view(i).width)
                elif i.op == "attention":
                    floats = max(floats, self._tile(index, i, rows))
                    queries = max(queries, rows * i.attribute("heads") * caches[i.attribute("cache")].k.dim)
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self._rounded_inputs = torch.zeros(rounded, dtype=torch.bfloat16, device=device)
        # a product writes the next one's input while it reads its own
        self._inputs = torch.zeros(2, inputs, dtype=torch.uint8, device=device)
        self._prepared: dict[tuple[int, int], Prepared] = {}
        self._handovers: dict[tuple[int, int], Handover] = {}
        self._dissolved: set[tuple[int, int]] = set()  # norms that products on both sides have taken over
        self._find_prepared()
        self._partials = torch.zeros(floats, device=device)
        self._queries = torch.zeros(queries, device=device)
        self.block_rows = {
            rows: {tile.rows for (_, of), tile in self._tilings.items() if of == rows} for rows in buckets
        }

    @property
    def bytes(self) -> int:
        """Bytes of what kernels keep in between."""
        kept = (self._workspace, self._inputs, self._counters, self._rounded_inputs, self._partials)
        return sum(t.nbytes for t in (*kept, self._queries, *self._angles))

    def _plan(self, index: int, i: Instruction, rows: int) -> int:
        """Plans a product; bytes of workspace."""
        assert i.weight is not None
        segments = self.weights.matrices[i.weight]
        glu = i.attribute("glu")
        act_group = i.attribute("act_group")
        configs = self._tuned.configs(segments, rows, glu, act_group) if self._tuned else None
        chosen = self._plans[index, rows] = plan(
            segments, rows, glu, configs, act_group=act_group, straight=self._goes_straight(i)
        )
        x_dtype = torch.float32
        if self._is_rounded_before(index, rows):
            self._rounded.add((index, rows))
            x_dtype = chosen.multiply
        return workspace_bytes(segments, chosen, "order" in i.vectors, x_dtype)

    def _goes_straight(self, i: Instruction) -> bool:
        """Whether nothing follows a product but a residual that torch can add to it."""
        if i.attribute("glu") or i.attribute("activation") != "none" or "bias" in i.vectors:
            return False
        if i.attribute("scale") != 1 or i.attribute("softcap"):
            return False
        return "residual" not in i.views or adds_floats(self.values.arena.device)

    def _values_kept(self) -> set[int]:
        """The values that something else reads than one instruction of the program."""
        instructions = self.program.instructions
        reads = Counter(view.value for i in instructions for view in i.reads())
        kept = {value for value, count in reads.items() if count > 1}
        if self.program.hidden is not None:
            kept.add(self.program.hidden.value)
        if self._between is not None:
            kept.update(*(self._between.values(index) for index in range(len(instructions))))
        return kept

    def _is_rounded_before(self, index: int, rows: int) -> bool:
        """Whether the instruction before a product writes its input, for cuBLAS and nobody else."""
        before, i = self.program.instructions[index - 1], self.program.instructions[index]
        if not index or i.views["in"] != before.out or before.out.value in self._kept or "order" in i.vectors:
            return False
        if not all(config.dense for config in self._plans[index, rows].configs):
            return False
        if before.op == "linear":  # which combines what it has multiplied
            return self._plans[index - 1, rows].partial
        return before.op in ("rms_norm", "layer_norm", "attention")

    def _input_view(self, i: Instruction) -> View:
        view = i.views["in"]
        assert isinstance(view, View), "a linear has one input"
        return view

    def _rounded_input(self, index: int, rows: int) -> Tensor | None:
        """Where a product finds its input in 16 bits, [rows, k], if the instruction before it writes that."""
        if (index, rows) not in self._rounded:
            return None
        width = self._input_view(self.program.instructions[index]).width
        return self._rounded_inputs.view(self._plans[index, rows].multiply)[: rows * width].view(rows, width)

    def _out(self, index: int, i: Instruction) -> Tensor:
        """Where an instruction writes its result: as the value, or as the next one's input in 16 bits."""
        rounded = self._rounded_input(index + 1, self._count(i.out))
        return self._view(i.out) if rounded is None else rounded

    def _input_bytes(self, index: int, i: Instruction, rows: int) -> int:
        assert i.weight is not None
        p = self._plans[index, rows]
        return prepared_bytes(self.weights.matrices[i.weight], p, True) if takes_prepared(p) else 0

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
        if (index, self._count(i.out)) in self._dissolved:
            return
        rms_norm(
            self._given(i, "in"), self._vector(i, "weight"), self._input(i, "residual"), i.attribute("eps"),
            self._out(index, i), self._int8_beside(index),
        )  # fmt: skip

    def _layer_norm(self, index: int, i: Instruction) -> None:
        layer_norm(
            self._given(i, "in"), self._vector(i, "weight"), self._vector(i, "bias"),
            self._input(i, "residual"), i.attribute("eps"), self._out(index, i), self._int8_beside(index),
        )  # fmt: skip

    def _int8_beside(self, index: int) -> Quantized | None:
        """Where an instruction writes its result as int8 too, for the product that is next."""
        after = index + 1
        if after == len(self.program.instructions):
            return None
        found = self._prepared.get((after, self._count(self.program.instructions[after].out)))
        return found.quantized if found else None

    def _find_prepared(self) -> None:
        """Which instructions prepare a product's input, by the product and its rows."""
        most = 0
        products = [n for n, i in enumerate(self.program.instructions) if i.op == "linear"]
        for (index, rows), chosen in self._plans.items():
            space = self._inputs[products.index(index) % 2]
            if takes_prepared(chosen) and self._is_alone(index - 1, index):
                most = max(most, self._find_one(index, rows, chosen, space))
        self._counters = torch.zeros(most, dtype=torch.int32, device=self._inputs.device)
        for key, handover in self._handovers.items():
            self._handovers[key] = replace(handover, counters=self._counters)

    def _find_one(self, index: int, rows: int, chosen: Plan, space: Tensor) -> int:
        """Of one product; how many counters that takes."""
        i, before = self.program.instructions[index], self.program.instructions[index - 1]
        assert i.weight is not None
        segments = self.weights.matrices[i.weight]
        norm = before if self._is_dissolved(index - 1, rows, chosen) else None
        if before.op == "linear" and chosen.act_group or norm:
            by = index - 2 if norm else index - 1
            if self._hands_over(by, rows, chosen):
                eps = norm.attribute("eps") if norm else 0.0
                to = prepared_input(segments, chosen, space, norm is not None, eps)
                weight = self._vector(norm, "weight") if norm else None
                self._prepared[index, rows] = to
                self._handovers[by, rows] = Handover(to, group_of(chosen), weight, self._inputs)
                if norm:
                    self._dissolved.add((index - 1, rows))
                return counters(self._plans[by, rows], before.out.width, group_of(chosen))
        if chosen.act_group and self._writes_int8(before, index - 1, rows, chosen.act_group):
            self._prepared[index, rows] = prepared_input(segments, chosen, space)
        return 0

    def _is_alone(self, index: int, after: int) -> bool:
        """Whether the one is all that the other takes in, and nothing happens between them."""
        if index < 0 or (self._between is not None and self._between.values(index)):
            return False
        i, before = self.program.instructions[after], self.program.instructions[index]
        return i.views["in"] == before.out and "order" not in i.vectors and i.out.value != LOGITS

    def _writes_int8(self, i: Instruction, index: int, rows: int, group: int) -> bool:
        if i.op != "attention":
            return i.op in ("rms_norm", "layer_norm")
        cache = self.caches[i.attribute("cache")]
        return can_quantize(cache, i.attribute("heads"), self._tilings[index, rows], group)

    def _is_dissolved(self, index: int, rows: int, chosen: Plan) -> bool:
        """Whether a norm is left to the products on both of its sides."""
        i = self.program.instructions[index]
        if i.op != "rms_norm" or "residual" in i.views or i.out.value in self._kept:
            return False
        return self._is_alone(index - 1, index) and self._hands_over(index - 1, rows, chosen)

    def _hands_over(self, index: int, rows: int, to: Plan) -> bool:
        i = self.program.instructions[index]
        if not is_wanted() or i.op != "linear":
            return False
        return can_hand_over(self._plans[index, rows], i.out.width, i.attribute("glu"), group_of(to))

    def _linear(self, index: int, i: Instruction) -> None:
        assert i.weight is not None
        out = self._out(index, i)
        rounded = self._rounded_input(index, len(out))
        linear(
            self._given(i, "in") if rounded is None else rounded, self.weights.matrices[i.weight], out,
            p=self._plans[index, len(out)], workspace=self._workspace, bias=self._vector(i, "bias"),
            residual=self._input(i, "residual"), order=self._vector(i, "order"),
            activation=i.attribute("activation"), glu=i.attribute("glu"), scale=i.attribute("scale"),
            softcap=i.attribute("softcap"), given=self._prepared.get((index, len(out))),
            then=self._handovers.get((index, len(out))),
        )  # fmt: skip

    def _attention(self, index: int, i: Instruction) -> None:
        cache, heads = self.caches[i.attribute("cache")], i.attribute("heads")
        positions, slots = self.batch.ids("positions", self._rows), self.batch.ids("slots", self._rows)
        q, rope = self._given(i, "q"), self._rotary(i.attribute("rope"))
        q_norm, k_norm = self._vector(i, "q_norm"), self._vector(i, "k_norm")
        hadamard = i.attribute("hadamard")
        prepared = None
        if rope is not None or q_norm is not None or hadamard:
            prepared = self._query_buffer(q, cache)
        append(
            None if prepared is None else q, self._given(i, "k"), self._given(i, "v"), positions, slots,
            cache, prepared, q_norm, k_norm, i.attribute("norm_eps"), rope, hadamard,
        )  # fmt: skip
        tiles, partials = self._tilings[index, self._rows], None
        if tiles.splits > 1:
            partials = cut_partials(self._partials, self._rows, heads, tiles.splits, cache.v.dim)
        attend(
            q if prepared is None else prepared, cache, positions, slots, i.attribute("scale"), tiles,
            self._out(index, i), i.attribute("softcap"), self._vector(i, "sinks"),
            None if self._blocks is None else self._blocks[tiles.rows], partials,
            self._int8_beside(index),
        )  # fmt: skip

    def _query_buffer(self, q: Tensor, cache: LayerCache) -> Tensor:
        """Room for prepared queries in the type that they are multiplied in."""
        dtype = torch.float32 if cache.k.dtype == "f32" else torch.float16
        return self._queries.view(dtype)[: q.numel()].view(q.shape)

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
