"""Adapters in the C++ executor: against the numpy interpreter in every kind of format, and bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interpreter import ACTIVATIONS, Reference, cap, quantize_rows
from programs import Array, Format, Llama, Program, bf16, llama
from test_executor import (
    FLOAT_TOLERANCE,
    INTEGER_TOLERANCE,
    assert_close,
    in_chunks,
    ints,
    make,
    run,
    tokens_for,
)

from gristmill.runtime.cpu import _native
from gristmill.runtime.errors import GristmillError

CASES = {
    "f32": Llama(final_softcap=2.0, bias=True),
    "bf16": Llama(form=Format("bf16"), activation="gelu_tanh"),
    "fp8": Llama(form=Format("fp8", 64), hidden=200),
    "int4": Llama(form=Format("int4", 32), act_group=32, hidden=136, intermediate=264),
    "order": Llama(form=Format("int4", 32, False), act_group=32, hidden=328, order=True, bias=True),
    "float_activations": Llama(form=Format("int8", 64), hidden=136, order=True),
}
SCALE = 1.5
Pairs = list[tuple[int, int, str, Any, Any, float]]


def adapter(program: Program, seed: int, kind: str = "f32", rank: int = 5, share: float = 0.7) -> Pairs:
    """Pairs for about `share` of all segments of linears, of ranks around `rank`."""
    random, pairs = np.random.default_rng(seed), []
    for index, instruction in enumerate(program.json["instructions"]):
        if instruction["op"] != "linear":
            continue
        for number, segment in enumerate(program.json["weights"][instruction["weight"]]):
            r = rank + (number + index) % 3
            a = random.standard_normal((r, segment["k"])) / math.sqrt(segment["k"])
            b = random.standard_normal((segment["n"], r)) / math.sqrt(r)
            if random.random() < share:
                pairs.append((index, number, kind, as_stored(a, kind), as_stored(b, kind), SCALE))
    return pairs


def as_stored(w: Array, kind: str) -> Array:
    return bf16(w) if kind == "bf16" else w.astype({"f32": np.float32, "f16": np.float16}[kind])


def values(w: Array) -> Array:
    return ((w.astype(np.uint32) << 16).view(np.float32) if w.dtype == np.uint16 else w).astype(np.float64)


class WithAdapters(Reference):
    """The interpreter, with an adapter's pairs for every slot that has one."""

    def __init__(self, program: Program, by_slot: dict[int, Pairs]) -> None:
        super().__init__(program)
        self.by_slot = by_slot

    def linear(self, i: dict[str, Any]) -> Array:
        index = self.p.json["instructions"].index(i)
        x = plain = self.view(i["in"])
        x = x[:, self.p.tensors[i["order"]]] if i.get("order") else x
        x = quantize_rows(x, i["act_group"]) if i["act_group"] else x
        y = x @ self.p.matrices[i["weight"]].T + self.added(i, index, plain) + self.vector(i.get("bias"), 0)
        activation, half = ACTIVATIONS[i.get("activation", "none")], y.shape[1] // 2
        out = activation(y[:, :half]) * y[:, half:] if i.get("glu") else activation(y)
        return cap(out * i.get("scale", 1.0), i.get("softcap", 0.0)) + self.residual(i)

    def added(self, i: dict[str, Any], index: int, x: Array) -> Array:
        segments = self.p.json["weights"][i["weight"]]
        out = np.zeros((len(x), sum(s["n"] for s in segments)))
        slots = self.ids["slots"] if len(x) == len(self.ids["slots"]) else self.ids["slots"][self.ids["rows"]]
        for slot, pairs in self.by_slot.items():
            for at, number, _, a, b, scale in pairs:
                if at == index:
                    first = sum(s["n"] for s in segments[:number])
                    mine = slots == slot
                    out[mine, first : first + len(b)] += scale * (x[mine] @ values(a).T) @ values(b).T
        return out


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_interpreter(case: str, kind: str, tmp_path: Path) -> None:
    program = llama(CASES[case])
    executor = make(program, tmp_path)
    pairs = {1: adapter(program, 1, kind), 2: adapter(program, 2, kind, rank=17)}
    numbers = {slot: executor.add_adapter(given) for slot, given in pairs.items()}
    slots = ints([0] * 5 + [1] * 9 + [2] * 9 + [3] * 5)
    adapters = ints([numbers.get(slot, -1) for slot in slots])
    positions = ints([*range(5), *range(9), *range(9), *range(5)])
    tokens = tokens_for(program, len(slots))
    rows = ints([2, 4, 5, 9, 13, 14, 20, 22, 27])
    got = executor.forward(tokens, positions, slots, rows, adapters)
    expected = WithAdapters(program, pairs).forward(tokens, positions, slots, rows)
    assert_close(got, expected, INTEGER_TOLERANCE if CASES[case].act_group else FLOAT_TOLERANCE)
    without = Reference(program).forward(tokens, positions, slots, rows)
    assert np.abs(expected - without)[2:8].max() > 0.1 * np.abs(without).max(), "the adapters matter"


def forward(executor: Any, tokens: Array, start: int, slot: int, number: int | None) -> Array:
    count = len(tokens)
    adapters = None if number is None else np.full(count, number, np.int32)
    positions = np.arange(start, start + count, dtype=np.int32)
    rows = np.arange(count, dtype=np.int32)
    return np.asarray(
        executor.forward(tokens, positions, np.full(count, slot, np.int32), rows, adapters)
    )


@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_batch_chunks_threads_or_instruction_set(case: str, tmp_path: Path) -> None:
    program = llama(CASES[case])
    one, other = adapter(program, 1, "bf16", rank=8), adapter(program, 2, rank=3)
    first, second = tokens_for(program, 31, 1), tokens_for(program, 31, 2)
    found: list[Array] = []
    for isa in _native.isas():
        executor = make(program, tmp_path, isa=isa, threads=1)
        numbers = [executor.add_adapter(pairs) for pairs in (one, other)]
        found.append(forward(executor, first, 0, 0, numbers[0]))
        chunks = [forward(executor, first[a:b], a, 1, numbers[0]) for a, b in ((0, 1), (1, 8), (8, 31))]
        found.append(np.concatenate(chunks))
    threaded = make(program, tmp_path, threads=3)
    number, own = threaded.add_adapter(other), threaded.add_adapter(one)
    mixed = []
    for t in range(31):  # decode, the two adapters and a row of none in one batch
        tokens = ints([first[t], second[t], first[t], second[t]])
        adapters = ints([own, number, -1, own])
        each = ints(range(4))
        mixed.append(threaded.forward(tokens, ints([t] * 4), each, each, adapters))
    found.append(np.stack([step[0] for step in mixed]))
    for other_way in found[1:]:
        np.testing.assert_array_equal(found[0], other_way)
    alone = make(program, tmp_path, threads=2)
    np.testing.assert_array_equal(run(alone, first), np.stack([step[2] for step in mixed]))
    np.testing.assert_array_equal(in_chunks(alone, first, [9, 22], 1), np.stack([step[2] for step in mixed]))
    assert not np.array_equal(found[0], np.stack([step[2] for step in mixed]))


def test_a_large_batch_of_alternating_adapters(tmp_path: Path) -> None:
    """Runs of one row, of many, and across the multiples of 32 and 128 at which they are cut."""
    program = llama(Llama(max_tokens=300, form=Format("int4", 32), act_group=32, hidden=136))
    executor = make(program, tmp_path, max_len=300, max_slots=4)
    numbers = [executor.add_adapter(adapter(program, seed, rank=40)) for seed in (1, 2)]
    tokens = [tokens_for(program, 75, seed) for seed in range(4)]
    chosen = [numbers[0], -1, numbers[1], numbers[0]]
    alone = [forward(executor, tokens[slot], 0, slot, chosen[slot]) for slot in range(4)]
    for order in (np.arange(300), np.arange(300).reshape(4, 75).T.reshape(-1)):
        slot, at = order // 75, order % 75
        given = ints([tokens[s][t] for s, t in zip(slot, at, strict=True)])
        adapters = ints([chosen[s] for s in slot])
        got = executor.forward(given, ints(at), ints(slot), ints(range(300)), adapters)
        for s in range(4):
            np.testing.assert_array_equal(np.asarray(got)[slot == s], alone[s])


def test_hidden_states_have_the_adapter_too(tmp_path: Path) -> None:
    program = llama(Llama())
    executor = make(program, tmp_path)
    pairs = adapter(program, 1, share=1.0)
    number = executor.add_adapter(pairs)
    tokens, count = tokens_for(program, 6), ints(range(6))
    logits, hidden = executor.forward_hidden(tokens, count, ints([1] * 6), count, ints([number] * 6))
    expected, states = WithAdapters(program, {1: pairs}).forward_hidden(tokens, count, ints([1] * 6), count)
    assert_close(logits, expected, FLOAT_TOLERANCE)
    assert_close(hidden, states, FLOAT_TOLERANCE)


def test_removed_and_unknown_adapters_are_refused(tmp_path: Path) -> None:
    program = llama(Llama())
    executor = make(program, tmp_path)
    assert executor.adapter_bytes == 0
    first, second = (executor.add_adapter(adapter(program, seed)) for seed in (1, 2))
    held = executor.adapter_bytes
    tokens = tokens_for(program, 3)
    kept = forward(executor, tokens, 0, 0, second)
    executor.remove_adapter(first)
    assert 0 < executor.adapter_bytes < held
    np.testing.assert_array_equal(forward(executor, tokens, 0, 0, second), kept)
    for number in (first, 7, -2):
        with pytest.raises(GristmillError, match=r"adapters\[0\] is"):
            forward(executor, tokens, 0, 0, number)
    with pytest.raises(GristmillError, match="there is no adapter"):
        executor.remove_adapter(first)
    with pytest.raises(GristmillError, match="3 tokens and 2 adapters"):
        executor.forward(tokens, ints(range(3)), ints([0] * 3), ints([2]), ints([second] * 2))
    assert executor.add_adapter(adapter(program, 3)) not in (first, second)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({0: 99}, "instruction 99, expected 0 to"),
        ({0: 1}, "is no linear"),
        ({1: 3}, "has 3 segments, got 3"),
        ({2: "int8"}, "expected f32, f16 or bf16"),
        ({3: np.ones((4, 71), np.float32)}, "A and B have"),
        ({4: np.ones((73, 4), np.float32)}, "A and B have"),
        ({3: np.ones((73, 72), np.float32)}, "rank 73, expected 1 to 72"),
        ({3: np.ones((72, 4), np.float32).T}, "contiguous"),
        ({4: 5}, "contiguous numpy matrices"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(change: dict[int, Any], says: str, tmp_path: Path) -> None:
    program = llama(Llama())
    executor = make(program, tmp_path)
    pair: list[Any] = [2, 0, "f32", np.ones((4, 72), np.float32), np.ones((72, 4), np.float32), 1.0]
    executor.add_adapter([tuple(pair)])
    for place, value in change.items():
        pair[place] = value
    with pytest.raises(GristmillError, match=says):
        executor.add_adapter([tuple(pair)])
