"""Tokens drawn by the CUDA executor against the CPU's choices from the same logits, and sessions over it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from interpreter import Reference
from programs import Array, llama

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from chosen import choose
from cuda_cases import CASES, a_small_gpu, ints, make, run, tokens_for  # noqa: F401

from gristmill.runtime.cuda import device as cuda_device
from gristmill.runtime.cuda import drawing as cuda_drawing
from gristmill.runtime.cuda import executor as cuda_executor
from gristmill.runtime.decoding import next_tokens
from gristmill.runtime.decoding.draws import Draws
from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program
from gristmill.runtime.session import Session

SEED = 5
GREEDY = GenerationOptions()
MIXED = [
    GenerationOptions(temperature=0.9, top_k=7, top_p=0.8),
    GREEDY,
    GenerationOptions(repetition_penalty=3.0),
    GenerationOptions(temperature=2.0, repetition_penalty=0.2),
]


def draws(options: list[GenerationOptions], positions: list[int]) -> Draws:
    return Draws.of(options, [SEED + n for n in range(len(options))], positions)


def chosen(
    logits: Array, options: list[GenerationOptions], seen: list[list[int]], positions: list[int]
) -> list[int]:
    """What the CPU takes from the same logits."""
    return [
        choose(row, o, np.unique(np.array(tokens)), SEED + n, 0, at)
        for n, (row, o, tokens, at) in enumerate(zip(logits, options, seen, positions, strict=True))
    ]


def test_tokens_are_those_that_the_cpu_takes_from_the_logits(tmp_path: Path) -> None:
    """One row of each slot, in a slot that was rolled back, in a copied one: with greedy rows alone and all
    ways mixed."""
    program = llama(CASES["f32"])
    executor, texts = make(program, tmp_path, max_slots=4), [[3, 1, 4, 1], [5, 9, 2], [6, 5], [3, 1, 4, 1]]
    run(executor, ints([*texts[0], 11, 12]), slot=0)  # 11 and 12 are rolled back
    run(executor, ints(texts[1]), slot=1)
    run(executor, ints(texts[2]), slot=2)
    executor.copy_slot(0, 3, 4)
    news, at = [7, 8, 9, 7], [len(text) for text in texts]
    batch = (ints(news), ints(at), ints([0, 1, 2, 3]), ints([0, 1, 2, 3]))
    logits = executor.forward(*batch)
    seen = [[*text, new] for text, new in zip(texts, news)]
    for options in ([GREEDY] * 4, MIXED, MIXED[::-1]):
        got = executor.sample(*batch, draws(options, at))
        assert got.dtype == np.int32 and got.tolist() == chosen(logits, options, seen, at)
    some = executor.sample(*batch[:3], ints([2, 0]), draws(MIXED[:2], [at[2], at[0]]))
    assert some.tolist() == chosen(logits[[2, 0]], MIXED[:2], [seen[2], seen[0]], [at[2], at[0]])
    with pytest.raises(GristmillError, match="4 rows need as many draws, got 1"):
        executor.sample(*batch, draws([GREEDY], [0]))


def test_rows_of_one_slot_see_what_is_before_them_in_pieces_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "LOGIT_ROWS", 2)
    program = llama(CASES["f32"])
    executor, tokens = make(program, tmp_path, max_slots=1), tokens_for(program, 5)
    logits = run(executor, tokens)
    at = list(range(5))
    options = [GenerationOptions(temperature=n % 2, repetition_penalty=4.0) for n in at]
    got = executor.sample(tokens, ints(at), ints([0] * 5), ints(at), draws(options, at))
    seen = [tokens[: n + 1].tolist() for n in at]
    assert got.tolist() == chosen(logits, options, seen, at)
    assert executor.sample(tokens, ints(at), ints([0] * 5), ints([]), draws([], [])).shape == (0,)


def test_one_sequence_that_asks_for_more_brings_all_logits_to_the_host() -> None:
    class Recorder:
        executor = SimpleNamespace(draws_tokens=True)

        def _run(self, *batch: Any) -> str:
            return "logits"

        def _draw(self, *batch: Any) -> Any:
            return batch[-1]

    def sequence(**options: Any) -> Any:
        chosen, drawable = GenerationOptions.of(**options), "min_p" not in options
        result = SimpleNamespace(seed=7)
        return SimpleNamespace(options=chosen, result=result, tokens=[1, 2], number=4, drawable=drawable)

    session: Any = Recorder()
    batch = (ints([1]),) * 4
    plain, more = sequence(temperature=0.5), sequence(min_p=0.1)
    given: Any = next_tokens.run(session, *batch, [(plain, 2)])
    assert given.position.tolist() == [1, 2] and given.sequence.tolist() == [4, 4]
    assert given.seed.tolist() == [7, 7] and given.temperature.tolist() == [0.5, 0.5]
    for rows, wanted in ((ints([0, 1]), [(plain, 1), (more, 1)]), (ints([]), [(plain, 0)])):
        logits: Any = next_tokens.run(session, *batch[:3], rows, wanted)
        assert logits == "logits"


class OnTheHost:
    """The same executor, without its draws."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def __getattr__(self, name: str) -> Any:
        if name in ("draws_tokens", "sample"):
            raise AttributeError(name)
        return getattr(self._executor, name)


def test_a_session_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of more prompts than slots, streams, one closed early; logits come to the host for none."""
    program = llama(CASES["f32"])
    executor = make(program, tmp_path, max_slots=2)
    made = Program.from_json(program.json)
    prompts: list[list[int]] = [[3, 1, 4], [1, 5], [9, 2, 6, 5]]
    how = {"max_new_tokens": 2, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 4}
    plain = Session(None, made, OnTheHost(executor))
    sampled = [one.token_ids for one in plain.generate(prompts, **how)]

    monkeypatch.setattr(executor, "forward", None)
    session = Session(None, made, executor)
    ids = list(prompts[0])
    for _ in range(2):
        ids.append(int(run(Reference(program), ints(ids))[-1].argmax()))
    assert session.generate(prompts[0], max_new_tokens=2).token_ids == ids[3:]
    assert [one.token_ids for one in session.generate(prompts, **how)] == sampled
    stream = session.stream(prompts[1], **how)
    for _ in stream:
        pass
    assert stream.result.token_ids == sampled[1]
    with session.stream(prompts[2], max_new_tokens=30) as left:
        assert not left.result.token_ids
    assert not session._slots._holders


def test_a_vocabulary_too_large_to_count_is_drawn_from_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cuda_drawing, cuda_executor):
        monkeypatch.setattr(module, "MAX_VOCABULARY", 8)
    program = llama(CASES["f32"])
    executor = make(program, tmp_path)
    assert not executor.draws_tokens
    with pytest.raises(GristmillError, match="is drawn from on the host, up to 8 here; use forward"):
        executor.sample(ints([1]), ints([0]), ints([0]), ints([0]), draws([GREEDY], [0]))
    session = Session(None, Program.from_json(program.json), executor)
    expected = int(run(Reference(program), ints([3, 1]))[-1].argmax())
    assert session.generate([3, 1], max_new_tokens=1).token_ids == [expected]


def test_a_session_refuses_logits_that_are_not_finite(tmp_path: Path) -> None:
    program = llama(CASES["f32"])
    program.tensors["head.0.weight"][7] = np.nan
    executor = make(program, tmp_path)
    alone = (ints([1]), ints([0]), ints([0]), ints([0]))
    assert executor.sample(*alone, draws([GREEDY], [0])).tolist() == [-1]
    session = Session(None, Program.from_json(program.json), executor)
    how: dict[str, Any]
    for how in ({}, {"temperature": 1.0, "seed": 1}):
        with pytest.raises(GristmillError, match="not finite as a logit: damaged weights"):
            session.generate([1, 2], max_new_tokens=2, **how)
    assert not session._slots._holders, "its slot is free again"


def test_speculated_rows_are_drawn_as_one_by_one(tmp_path: Path) -> None:
    """Tokens that are looked up are judged by draws of several rows of a slot at once; a penalty is for those
    before each."""
    program = llama(CASES["f32"])
    session = Session(None, Program.from_json(program.json), make(program, tmp_path))
    prompt = [3, 1, 4, 1, 5] * 2 + [3, 1]
    how = {"max_new_tokens": 3, "temperature": 0.01, "repetition_penalty": 0.05, "seed": 1}
    plain = session.generate(prompt, lookup=False, **how).token_ids
    before = session.statistics.drafted
    assert session.generate(prompt, lookup=True, **how).token_ids == plain
    assert session.statistics.drafted > before
