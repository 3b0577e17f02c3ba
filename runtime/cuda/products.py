"""How a program's products run for each bucket of rows, and what other instructions do for them.

What a product multiplies may be left to it by the instructions ahead, in the type that it multiplies and
nothing else where nobody else reads the value:

    int8           written by a norm or an attention, or handed over by the product ahead, see handover.py
    x * weight     handed over with sums of squares, where a norm of its own is then not run at all
    16-bit floats  written by a norm, an attention, or the product ahead that is combined, for cuBLAS
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gristmill.kernels.triton.handover import Handover, Prepared, is_wanted
from gristmill.kernels.triton.linear import (
    Plan,
    adds_floats,
    can_hand_over,
    counters,
    group_of,
    plan,
    prepared_bytes,
    prepared_input,
    takes_prepared,
    workspace_bytes,
)
from gristmill.kernels.triton.matrix import Matrix
from gristmill.kernels.triton.quantize import Quantized
from gristmill.runtime.cuda.tuning import Tuned
from gristmill.runtime.cuda.weights import Weights
from gristmill.runtime.program import LOGITS, Instruction, Program, View

LEAST_GROUP = 32  # columns of int8 activations that share a scale


class Products:
    """Plans, and room for what products find and keep, by the index of an instruction and its rows.

    logit_rows: of the logits at once. exchanged: values that other devices wait for after an instruction.
    attends_int8: whether an attention can write its result as int8 too, by instruction and group.
    """

    def __init__(
        self, program: Program, weights: Weights, buckets: Sequence[int], logit_rows: int,
        tuned: Tuned | None, exchanged: Callable[[int], Sequence[int]],
        attends_int8: Callable[[int, int], bool], device: torch.device,
    ) -> None:  # fmt: skip
        self._program, self._weights, self._tuned = program, weights, tuned
        self._exchanged, self._attends_int8, self._device = exchanged, attends_int8, device
        self._kept = self._values_kept()
        indices = [n for n, i in enumerate(program.instructions) if i.op == "linear"]
        self.plans: dict[tuple[int, int], Plan] = {}
        for index in indices:
            is_head = program.instructions[index].out.value == LOGITS
            for rows in {min(rows, logit_rows) if is_head else rows for rows in buckets}:
                self.plans[index, rows] = self._plan(index, rows)
        self._rounded = {key for key in self.plans if self._is_rounded_before(*key)}
        keys = [(key, self._segments(key[0]), p) for key, p in self.plans.items()]
        self.workspace = self._room(max((self._workspace_bytes(key) for key in self.plans), default=0))
        width = max((rows * self._width(index) for index, rows in self._rounded), default=0)
        self._rounded_inputs = self._room(2 * width)
        size = max((prepared_bytes(s, p, True) for _, s, p in keys if takes_prepared(p)), default=0)
        # a product writes the next one's input while it reads its own
        self._inputs = [self._room(size), self._room(size)]
        self.prepared: dict[tuple[int, int], Prepared] = {}
        self.handovers: dict[tuple[int, int], Handover] = {}
        self.dissolved: set[tuple[int, int]] = set()  # norms that products on both sides have taken over
        # which handovers share: each leaves them at zero
        widths = {index: self._instruction(index).out.width for index in indices}
        counts = [counters(p, widths[index], LEAST_GROUP) for (index, _), p in self.plans.items()]
        self.counters = torch.zeros(max(counts, default=0), dtype=torch.int32, device=device)
        spaces = {index: self._inputs[n % 2] for n, index in enumerate(indices)}
        for (index, rows), segments, p in keys:
            if takes_prepared(p) and self._is_alone(index - 1, index):
                self._prepare(index, rows, p, segments, spaces[index])

    @property
    def bytes(self) -> int:
        """Bytes of what products keep in between."""
        kept = (self.workspace, self._rounded_inputs, *self._inputs, self.counters)
        return sum(tensor.nbytes for tensor in kept)

    def int8_input(self, index: int, rows: int) -> Quantized | None:
        """Where a product finds its input as int8, if the instruction before it writes that."""
        found = self.prepared.get((index, rows))
        return found.quantized if found else None

    def rounded_input(self, index: int, rows: int) -> Tensor | None:
        """Where a product finds its input in 16 bits, [rows, k], if the instruction before it writes that."""
        if (index, rows) not in self._rounded:
            return None
        width = self._width(index)
        return self._rounded_inputs.view(self.plans[index, rows].multiply)[: rows * width].view(rows, width)

    def _room(self, size: int) -> Tensor:
        """A tensor has a byte at least, of two whole 16-bit floats."""
        return torch.zeros(max(2, size), dtype=torch.uint8, device=self._device)

    def _instruction(self, index: int) -> Instruction:
        return self._program.instructions[index]

    def _segments(self, index: int) -> list[Matrix]:
        weight = self._instruction(index).weight
        assert weight is not None, "a linear has a weight"
        return self._weights.matrices[weight]

    def _width(self, index: int) -> int:
        view = self._instruction(index).views["in"]
        assert isinstance(view, View), "a linear has one input"
        return view.width

    def _plan(self, index: int, rows: int) -> Plan:
        i, segments = self._instruction(index), self._segments(index)
        glu, act_group = i.attribute("glu"), i.attribute("act_group")
        configs = self._tuned.configs(segments, rows, glu, act_group) if self._tuned else None
        return plan(segments, rows, glu, configs, act_group=act_group, straight=self._goes_straight(i))

    def _goes_straight(self, i: Instruction) -> bool:
        """Whether nothing follows a product but a residual that torch can add to it."""
        if i.attribute("glu") or i.attribute("activation") != "none" or "bias" in i.vectors:
            return False
        if i.attribute("scale") != 1 or i.attribute("softcap"):
            return False
        return "residual" not in i.views or adds_floats(self._device)

    def _workspace_bytes(self, key: tuple[int, int]) -> int:
        p, order = self.plans[key], "order" in self._instruction(key[0]).vectors
        x_dtype = p.multiply if key in self._rounded else torch.float32
        return workspace_bytes(self._segments(key[0]), p, order, x_dtype)

    def _values_kept(self) -> set[int]:
        """The values that something else reads than one instruction of the program."""
        instructions = self._program.instructions
        reads = Counter(view.value for i in instructions for view in i.reads())
        kept = {value for value, count in reads.items() if count > 1}
        if self._program.hidden is not None:
            kept.add(self._program.hidden.value)
        return kept.union(*(self._exchanged(index) for index in range(len(instructions))))

    def _is_alone(self, index: int, after: int) -> bool:
        """Whether the one is all that the other takes in as it is, and nothing happens between them."""
        if index < 0 or self._exchanged(index):
            return False
        return self._instruction(after).views["in"] == self._instruction(index).out and (
            "order" not in self._instruction(after).vectors
        )

    def _is_rounded_before(self, index: int, rows: int) -> bool:
        """Whether the instruction before a product writes its input, for cuBLAS and nobody else."""
        if not self._is_alone(index - 1, index) or self._instruction(index - 1).out.value in self._kept:
            return False
        if self._instruction(index).out.value == LOGITS:  # computed in pieces
            return False
        if not all(config.dense for config in self.plans[index, rows].configs):
            return False
        before = self._instruction(index - 1)
        if before.op == "linear":  # which combines what it has multiplied
            return self.plans[index - 1, rows].partial
        return before.op in ("rms_norm", "layer_norm", "attention")

    def _prepare(self, index: int, rows: int, p: Plan, segments: list[Matrix], space: Tensor) -> None:
        """Finds who prepares a product's input, if anybody does."""
        before = self._instruction(index - 1)
        if self._instruction(index).out.value == LOGITS:  # computed in pieces
            return
        if self._is_dissolved(index - 1, rows, p):
            weight = self._weights.vectors[before.vectors["weight"]] if "weight" in before.vectors else None
            to = prepared_input(segments, p, space, True, before.attribute("eps"))
            self.dissolved.add((index - 1, rows))
            self.handovers[index - 2, rows] = Handover(to, group_of(p), weight, self.counters)
        elif p.act_group and self._hands_over(index - 1, rows, p):
            to = prepared_input(segments, p, space)
            self.handovers[index - 1, rows] = Handover(to, group_of(p), None, self.counters)
        elif p.act_group and self._writes_int8(index - 1, p.act_group):
            to = prepared_input(segments, p, space)
        else:
            return
        self.prepared[index, rows] = to

    def _is_dissolved(self, index: int, rows: int, to: Plan) -> bool:
        """Whether a norm is left to the products on both of its sides."""
        i = self._instruction(index)
        if i.op != "rms_norm" or "residual" in i.views or i.out.value in self._kept:
            return False
        return self._is_alone(index - 1, index) and self._hands_over(index - 1, rows, to)

    def _hands_over(self, index: int, rows: int, to: Plan) -> bool:
        i = self._instruction(index)
        if not is_wanted() or i.op != "linear":
            return False
        return can_hand_over(self.plans[index, rows], i.out.width, i.attribute("glu"), group_of(to))

    def _writes_int8(self, index: int, group: int) -> bool:
        op = self._instruction(index).op
        return op in ("rms_norm", "layer_norm") or (
            op == "attention" and self._attends_int8(index, group)
        )
