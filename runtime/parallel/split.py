"""A Program split over ranks: each rank's own Program, the slices of the weights that it multiplies, and
where the ranks exchange values.

A linear whose input every rank holds is cut by columns of its output: q, k, v by heads, gate and up by
columns that are shared out evenly. What reads the cut value next, attention or the linear behind it, works on
the rank's own columns; that linear (o, down) is cut by rows, each rank's product is a part of the sum, and
the sum is taken where something needs it: one all-reduce for o and one for down, and one for both where a
block adds them in parallel. Residual and bias are added by rank 0 alone, unless the residual is such a part
itself.

Quantized weights and activations are cut at the borders of their groups only, so that a rank multiplies the
integers that one process would. Where borders do not allow that, and where something needs a whole cut value
(a norm over all heads, the logits), the ranks gather it: every column as one process computes it. A linear
that neither feeds attention nor a linear is cut and gathered where that spares a rank more time on weights
than the gather takes, else every rank computes all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gristmill.runtime.errors import GristmillError
from gristmill.runtime.parallel.layout import Heads, Parts, Span, even
from gristmill.runtime.program import (
    LOGITS,
    Instruction,
    Program,
    Segment,
    Value,
    View,
    segment_row_bytes,
)

PACKED = 64  # columns that int4, int3 and int2 store as one block
GATHER_PAYS = 1 << 20  # bytes of weights that a rank must be spared: a gather takes as long as reading some
KINDS = ("all_reduce", "all_gather")  # of exchanges: sums, and columns that are given
EVEN_UNITS = (64, 16, 1)  # columns that are shared out together, where there are enough


@dataclass(frozen=True)
class MatrixSlice:
    """Rows and columns of a stored matrix; ``made``: what the rank's program calls it."""

    source: Segment
    rows: Span
    columns: Span
    made: Segment


@dataclass(frozen=True)
class VectorSlice:
    """Elements of a stored vector, one span after the other."""

    source: str
    spans: tuple[Span, ...]
    made: str


@dataclass(frozen=True)
class Exchange:
    """What ranks do before instruction ``before`` of their programs (the number of all: at the end): they sum
    their values of ``view`` where ``owned`` is None, else give each other the columns of it that they own."""

    before: int
    view: View
    owned: tuple[Span, ...] | None = None

    @property
    def kind(self) -> str:
        return KINDS[self.owned is not None]


@dataclass
class RankProgram:
    """exchanges: ascending by ``before``. Instruction i does the rank's share of the whole program's i."""

    program: Program
    rank: int
    world: int
    matrices: list[MatrixSlice]
    vectors: list[VectorSlice]
    exchanges: list[Exchange]


def split(program: Program, rank: int, world: int, gather_pays: int = GATHER_PAYS) -> RankProgram:
    """The share of ``rank``. gather_pays: bytes of weights; 0: every linear is cut.

    Raises GristmillError for programs that cannot be split so, with the reason.
    """
    refuse_unsplittable(program, world)
    return _Splitter(program, rank, world, gather_pays).run()


def refuse_unsplittable(program: Program, world: int) -> None:
    """Raises GristmillError where heads do not come out even, or an instruction is not known here."""
    known = {"embedding", "rms_norm", "layer_norm", "linear", "attention", "gather_rows", "pointwise"}
    other = next((i.op for i in program.instructions if i.op not in known), None)
    if other is not None:
        raise GristmillError(
            f"tensor_parallel cannot split the instruction {other!r} of this model, dense decoders alone; "
            "load it without"
        )
    pairs = {
        (i.attribute("heads"), program.caches[i.attribute("cache")].kv_heads)
        for i in program.instructions
        if i.op == "attention"
    }
    most = min((heads for heads, _ in pairs), default=world)
    if not all(Heads.fit(heads, kv_heads, world) for heads, kv_heads in pairs):
        fitting = [w for w in range(2, most + 1) if all(Heads.fit(h, kv, w) for h, kv in pairs)]
        texts = [f"{h} heads over {kv} of keys and values" for h, kv in sorted(pairs)]
        instead = f"; it can be {', '.join(map(str, fitting))}" if fitting else "; load it without"
        raise GristmillError(
            f"tensor_parallel is {world}, and this model's attention has {' and '.join(texts)}, which cannot "
            f"be shared out evenly{instead}"
        )


class _Splitter:
    """Goes through the instructions once; ``parts`` has the values that are cut, ``sums`` those of which
    every rank has a part of the sum so far, all others are whole on every rank."""

    def __init__(self, program: Program, rank: int, world: int, gather_pays: int) -> None:
        self.whole, self.rank, self.world, self.gather_pays = program, rank, world, gather_pays
        self.parts: dict[int, Parts] = {}
        self.sums: dict[int, View] = {}
        self.made = RankProgram(
            Program(
                program.vocabulary, program.limits, [replace(v) for v in program.values],
                list(program.caches), program.ropes, {}, [], program.arena_bytes, program.name,
            ),
            rank, world, [], [], [],
        )  # fmt: skip
        self.stored: dict[tuple[str, Span, Span], Segment] = {}
        self.readers: dict[int, list[tuple[Instruction, str, View]]] = {}
        for instruction in program.instructions:
            for name, view in _named_views(instruction):
                self.readers.setdefault(view.value, []).append((instruction, name, view))

    def run(self) -> RankProgram:
        for instruction in self.whole.instructions:
            if instruction.op == "attention":
                self._attention(instruction)
            elif instruction.op == "linear":
                self._linear(instruction)
            else:
                self._everywhere(instruction)
        for view in list(self.sums.values()):
            self._exchange(view)
        for number, parts in self.parts.items():
            value = self.made.program.values[number]
            self.made.program.values[number] = Value(value.rows, parts.width(self.rank), value.offset)
        return self.made

    # ---- instructions

    def _everywhere(self, whole: Instruction) -> None:
        """The same on every rank."""
        for view in whole.reads():
            self._need_whole(view)
        self._emit(replace(whole), self._unsliced(whole))

    def _attention(self, whole: Instruction) -> None:
        cache_index = whole.attribute("cache")
        cache = self.whole.caches[cache_index]
        mine = self._heads(whole, self.rank)
        views: dict[str, View | list[View]] = {}
        for name, (heads, dim) in self._regions(whole, mine).items():
            view = _one(whole.views[name])
            if view.value in self.parts:
                views[name] = self.parts[view.value].local(self.rank, view)
            else:
                self._need_whole(view)
                views[name] = View(view.value, view.column + heads[0] * dim, (heads[1] - heads[0]) * dim)
        self.made.program.caches[cache_index] = replace(cache, kv_heads=mine.keys[1] - mine.keys[0])
        vectors = dict(whole.vectors)
        if "sinks" in vectors:
            vectors["sinks"] = self._vector(vectors["sinks"], (mine.queries,))
        attributes = {**whole.attributes, "heads": mine.queries[1] - mine.queries[0]}
        spans = [self._heads(whole, rank).queries for rank in range(self.world)]
        first, dim = whole.out.column, cache.v_dim
        owned = tuple(((first + a * dim, first + b * dim),) for a, b in spans)
        out = self._cut_output(whole.out, owned)
        self._emit(Instruction(whole.op, out, views, vectors, attributes), None)
        self._gather_unless_cut(whole.out, owned)

    def _linear(self, whole: Instruction) -> None:
        given = _one(whole.views["in"])
        if given.value in self.parts:
            self._linear_by_rows(whole, given)
            return
        self._need_whole(given)
        owned = self._output_spans(whole)
        if owned is None:
            self._everywhere(whole)
            return
        out = self._cut_output(whole.out, owned)
        mine = Parts(owned).within(self.rank, whole.out)
        half = whole.out.width
        rows = [*mine, *((half + a, half + b) for a, b in mine if whole.attribute("glu"))]
        views, vectors = dict(whole.views), dict(whole.vectors)
        if "residual" in views:
            residual = _one(views["residual"])
            self._need_whole(residual)
            first, width = mine[0][0], sum(b - a for a, b in mine)
            assert len(mine) == 1, "a linear with a residual is cut in one piece"
            views["residual"] = View(residual.value, residual.column + first, width)
        if "bias" in vectors:
            vectors["bias"] = self._vector(vectors["bias"], tuple(rows))
        segments = [s for span in rows for s in self._rows_of(whole, span)]
        self._emit(Instruction(whole.op, out, views, vectors, dict(whole.attributes)), segments)
        self._gather_unless_cut(whole.out, owned)

    def _linear_by_rows(self, whole: Instruction, given: View) -> None:
        """A part of the sum; the residual is in it once."""
        [columns] = self.parts[given.value].within(self.rank, given)
        views: dict[str, View | list[View]] = {"in": self.parts[given.value].local(self.rank, given)}
        vectors = dict(whole.vectors)
        if "residual" in whole.views:
            residual = _one(whole.views["residual"])
            if self.sums.get(residual.value) == residual:
                views["residual"] = residual
                del self.sums[residual.value]
            else:
                self._need_whole(residual)
                if self.rank == 0:
                    views["residual"] = residual
        if self.rank:
            vectors.pop("bias", None)
        assert whole.weight is not None
        segments = [self._matrix(s, (0, s.n), columns) for s in self.whole.weights[whole.weight]]
        self._emit(Instruction(whole.op, whole.out, views, vectors, dict(whole.attributes)), segments)
        self.sums[whole.out.value] = whole.out

    # ---- decisions

    def _heads(self, attention: Instruction, rank: int) -> Heads:
        kv_heads = self.whole.caches[attention.attribute("cache")].kv_heads
        return Heads.of(attention.attribute("heads"), kv_heads, rank, self.world)

    def _regions(self, attention: Instruction, heads: Heads) -> dict[str, tuple[Span, int]]:
        """Of q, k and v the heads, and the columns of one."""
        cache = self.whole.caches[attention.attribute("cache")]
        k_dim, v_dim = cache.k_dim, cache.v_dim
        return {"q": (heads.queries, k_dim), "k": (heads.keys, k_dim), "v": (heads.keys, v_dim)}

    def _output_spans(self, whole: Instruction) -> tuple[tuple[Span, ...], ...] | None:
        """Which columns each rank computes of what a linear writes; None: all of them."""
        out = whole.out
        if out.value in self.parts:
            return self.parts[out.value].owned
        readers = self.readers.get(out.value, [])
        cut = self._spans_of_heads(out.value, readers) or self._spans_for_linears(out, readers)
        if cut is not None and "residual" not in whole.views:
            self.parts[out.value] = Parts(cut)
            return cut
        assert whole.weight is not None
        stored = sum(s.n * segment_row_bytes(s) for s in self.whole.weights[whole.weight])
        pays = stored - stored // self.world >= self.gather_pays
        return even(out.width, self.world, first=out.column) if pays else None

    def _spans_of_heads(
        self, value: int, readers: list[tuple[Instruction, str, View]]
    ) -> tuple[tuple[Span, ...], ...] | None:
        """Where attention alone reads the value, each region of it for one purpose."""
        if not readers or any(i.op != "attention" for i, _, _ in readers):
            return None
        views = {view for _, _, view in readers}
        if any(a != b and _overlap(a, b) for a in views for b in views):
            return None
        owned = []
        for rank in range(self.world):
            spans = set()
            for attention, name, view in readers:
                heads, dim = self._regions(attention, self._heads(attention, rank))[name]
                spans.add((view.column + heads[0] * dim, view.column + heads[1] * dim))
            owned.append(tuple(sorted(spans)))
        return tuple(owned)

    def _spans_for_linears(
        self, out: View, readers: list[tuple[Instruction, str, View]]
    ) -> tuple[tuple[Span, ...], ...] | None:
        """Where linears that can be cut by rows alone read the value."""
        if out.value == LOGITS or out.width != self.whole.values[out.value].width:
            return None
        if not readers or any(name != "in" or not self._can_cut_rows(i, out) for i, name, _ in readers):
            return None
        border = math.lcm(*(self._border(i) for i, _, _ in readers))
        units = (border,) if border > 1 else EVEN_UNITS
        return next((cut for unit in units if (cut := even(out.width, self.world, unit)) is not None), None)

    def _can_cut_rows(self, reader: Instruction, out: View) -> bool:
        """Whether its product is a sum over the columns of ``out``, whatever these are."""
        whole_rows = reader.op == "linear" and reader.views.get("in") == out and "order" not in reader.vectors
        if not whole_rows or reader.out.value == LOGITS:
            return False
        if reader.out.width != self.whole.values[reader.out.value].width:
            return False
        return (reader.attribute("activation"), reader.attribute("glu"), reader.attribute("softcap")) == (
            "none", False, 0.0,
        )  # fmt: skip

    def _border(self, linear: Instruction) -> int:
        """Columns of its input that stay together: whole groups and whole packed blocks."""
        assert linear.weight is not None
        segments = self.whole.weights[linear.weight]
        packed = [PACKED for s in segments if s.format in ("int4", "int3", "int2")]
        groups = [s.group or 1 for s in segments]
        return math.lcm(linear.attribute("act_group") or 1, *groups, *packed)

    def _cut_output(self, out: View, owned: tuple[tuple[Span, ...], ...]) -> View:
        """Where a rank writes its columns of ``out``: into a value of its own columns where every reader can
        do with these, else to their place in the whole value."""
        if out.value not in self.parts and self._all_can_do_with(out, owned):
            self.parts[out.value] = Parts(owned)
        if out.value in self.parts:
            return self.parts[out.value].local(self.rank, out)
        [(start, stop)] = owned[self.rank]
        return View(out.value, start, stop - start)

    def _all_can_do_with(self, out: View, owned: tuple[tuple[Span, ...], ...]) -> bool:
        if out.value == LOGITS or out.width != self.whole.values[out.value].width:
            return False
        readers = self.readers.get(out.value, [])
        return bool(readers) and all(
            name == "in"
            and self._can_cut_rows(i, out)
            and all(len(spans) == 1 and spans[0][0] % self._border(i) == 0 for spans in owned)
            for i, name, _ in readers
        )

    # ---- what is made

    def _need_whole(self, view: View) -> None:
        """Sums the value that ``view`` is of, where it is a sum that was not taken yet."""
        assert view.value not in self.parts, f"value {view.value} is cut, and something reads all of it"
        if view.value in self.sums:
            self._exchange(self.sums.pop(view.value))

    def _gather_unless_cut(self, out: View, owned: tuple[tuple[Span, ...], ...]) -> None:
        if out.value not in self.parts:
            self._exchange(out, tuple(span for [span] in owned))

    def _exchange(self, view: View, owned: tuple[Span, ...] | None = None) -> None:
        self.made.exchanges.append(Exchange(len(self.made.program.instructions), view, owned))

    def _emit(self, instruction: Instruction, segments: list[Segment] | None) -> None:
        program = self.made.program
        if segments is not None:
            instruction.weight = f"{len(program.instructions)}"
            program.weights[instruction.weight] = segments
        program.instructions.append(instruction)

    def _unsliced(self, whole: Instruction) -> list[Segment] | None:
        return None if whole.weight is None else self.whole.weights[whole.weight]

    def _rows_of(self, whole: Instruction, span: Span) -> Iterator[Segment]:
        """Rows of the segments of a weight, counted through all of them."""
        assert whole.weight is not None
        first = 0
        for segment in self.whole.weights[whole.weight]:
            a, b = max(span[0] - first, 0), min(span[1] - first, segment.n)
            if a < b:
                yield self._matrix(segment, (a, b), (0, segment.k))
            first += segment.n

    def _matrix(self, source: Segment, rows: Span, columns: Span) -> Segment:
        if (rows, columns) == ((0, source.n), (0, source.k)):
            return source
        key = (source.name, rows, columns)
        if key not in self.stored:
            k = columns[1] - columns[0]
            name = f"{source.name}[{rows[0]}:{rows[1]},{columns[0]}:{columns[1]}]"
            group = source.group if source.group < k else 0
            made = Segment(name, source.format, rows[1] - rows[0], k, group, source.symmetric)
            self.stored[key] = made
            self.made.matrices.append(MatrixSlice(source, rows, columns, made))
        return self.stored[key]

    def _vector(self, source: str, spans: tuple[Span, ...]) -> str:
        made = f"{source}[{','.join(f'{a}:{b}' for a, b in spans)}]"
        if all(v.made != made for v in self.made.vectors):
            self.made.vectors.append(VectorSlice(source, spans, made))
        return made


def bytes_of_all(parts: list[Program]) -> int:
    """Bytes of the matrices that the ranks have, each once where they share it."""
    shared = {s.name: s for part in parts for segments in part.weights.values() for s in segments}
    return sum(s.n * segment_row_bytes(s) for s in shared.values())


def _overlap(a: View, b: View) -> bool:
    return a.column < b.column + b.width and b.column < a.column + a.width


def _named_views(instruction: Instruction) -> Iterator[tuple[str, View]]:
    for name, view in instruction.views.items():
        for one in view if isinstance(view, list) else [view]:
            yield name, one


def _one(view: View | list[View]) -> View:
    assert isinstance(view, View), "a list of views where one is expected"
    return view
