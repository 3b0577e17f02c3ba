"""Beam search: textbook results whatever lies in which slot, and transformers' sequences from real models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beam_compare import Case, compare
from tiny import EOS, fake_session, tiny_artifact

import gristmill
from gristmill.runtime.decoding.beam_scores import best_of, process_of
from gristmill.runtime.decoding.beams import Beam, BeamOptions, beam_search
from gristmill.runtime.decoding.generate_beams import generate_beams
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.slots import Slots

Logits = Callable[[list[int]], np.ndarray]  # of the token after a sequence: [V]


class SlotModel:
    """Logits that depend on every token in a row's slot up to it; watches who copies what."""

    def __init__(self, slots: int, vocabulary: int, max_tokens: int, eos: Sequence[int] = (), seed: int = 0):
        self.slots: list[list[int]] = [[] for _ in range(slots)]
        self.vocabulary, self.max_tokens, self.eos, self.seed = vocabulary, max_tokens, list(eos), seed
        self.copied: list[int] = []  # rows of each copy
        self.most_rows = 0

    def logits(self, sequence: list[int]) -> np.ndarray:
        out = np.random.default_rng([self.seed, *sequence]).normal(0, 2, self.vocabulary).astype(np.float32)
        out[self.eos] += 1.5
        return out

    def run(self, tokens: Any, positions: Any, slots: Any, rows: Any) -> np.ndarray:
        assert 0 < len(tokens) <= self.max_tokens
        self.most_rows = max(self.most_rows, len(tokens))
        for token, position, slot in zip(tokens.tolist(), positions.tolist(), slots.tolist(), strict=True):
            assert position == len(self.slots[slot]), "a gap or a rollback"
            self.slots[slot].append(token)
        out = [self.logits(self.slots[slots[row]]) for row in rows]
        return np.array(out, np.float32).reshape(len(rows), self.vocabulary)

    def copy_slot(self, source: int, target: int, length: int, start: int) -> None:
        a, b = self.slots[source], self.slots[target]
        assert source != target and len(a) == length and start < length
        assert a[:start] == b[:start], "rows before the start differ"
        assert start == len(b) or a[start] != b[start], "an equal row is copied"
        self.slots[target] = list(a)
        self.copied.append(length - start)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    return np.asarray(exact - exact.max() - np.log(np.exp(exact - exact.max()).sum()))


def textbook(
    logits: Logits, prompt: list[int], options: BeamOptions, eos: Sequence[int], limit: int
) -> list[Beam]:
    """Diverse beam search (arXiv 1610.02424, algorithm 1) as it is written, in f64: everything is sorted,
    nothing is cached. One group is plain beam search. Ends where no running beam can improve on the finished
    ones."""
    size = options.num_beams // options.num_beam_groups
    running = [[(0.0, list(prompt))] for _ in range(options.num_beam_groups)]
    finished: list[list[Beam]] = [[] for _ in running]
    for count in range(1, limit + 1):
        spoken: list[int] = []
        for g, beams in enumerate(running):
            if not beams:
                continue
            every = []
            for score, sequence in beams:
                step = log_softmax(logits(sequence))
                for token in range(len(step)):
                    penalty = options.diversity_penalty * spoken.count(token)
                    every.append((score + step[token] - penalty, [*sequence, token]))
            every.sort(key=lambda pair: -pair[0])
            for score, sequence in every[:size]:
                if sequence[-1] in eos or count == limit:
                    reason = "stop" if sequence[-1] in eos else "length"
                    new = sequence[len(prompt) :]
                    finished[g].append(Beam(new, score / count**options.length_penalty, reason))
            finished[g] = sorted(finished[g], key=lambda beam: -beam.score)[:size]
            running[g] = [pair for pair in every if pair[1][-1] not in eos][:size] if count < limit else []
            spoken += [sequence[-1] for _, sequence in running[g]]
            if running[g] and len(finished[g]) == size:
                at = limit if options.early_stopping == "never" and options.length_penalty > 0 else count
                hope = running[g][0][0] / at**options.length_penalty
                if options.early_stopping is True or hope <= finished[g][-1].score:
                    running[g] = []
    merged = sorted((beam for group in finished for beam in group), key=lambda beam: -beam.score)
    return merged[: options.num_return_sequences]


def same(got: Sequence[Beam], want: Sequence[Beam]) -> None:
    assert [(b.token_ids, b.finish_reason) for b in got] == [(b.token_ids, b.finish_reason) for b in want]
    np.testing.assert_allclose([b.score for b in got], [b.score for b in want], rtol=2e-6, atol=2e-6)


OPTIONS: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 2, "num_return_sequences": 2},
    {"num_beams": 3, "length_penalty": 0.0, "num_return_sequences": 3},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 4, "length_penalty": -1.0, "early_stopping": "never", "num_return_sequences": 4},
    {"num_beams": 8, "early_stopping": True, "num_return_sequences": 8},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7, "num_return_sequences": 4},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.5, "length_penalty": 0.0,
     "num_return_sequences": 5},
    {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 0.3, "early_stopping": True,
     "num_return_sequences": 4},
]  # fmt: skip


@pytest.mark.parametrize("given", OPTIONS, ids=str)
@pytest.mark.parametrize(("eos", "limit"), [((), 6), ((3,), 12), ((3, 11), 9)])
def test_equals_the_textbook(given: dict[str, Any], eos: tuple[int, ...], limit: int) -> None:
    options = BeamOptions.of(**given)
    for seed in range(4):
        model = SlotModel(options.num_beams, 23, 5, eos, seed)
        prompt = [5, 1, 7, 2, 9, 4, 8][: 1 + 2 * seed]
        slots = list(reversed(range(options.num_beams)))
        got = beam_search(
            model.run, model.copy_slot, slots, prompt, options, eos, limit, model.vocabulary, model.max_tokens
        )
        same(got, textbook(model.logits, prompt, options, eos, limit))


def test_reorders_copy_little() -> None:
    """Only where a beam has several children, and only rows behind the point where the two texts part."""
    options = BeamOptions.of(num_beams=6)
    model = SlotModel(6, 50, 64)
    prompt = list(range(40))
    beam_search(model.run, model.copy_slot, range(6), prompt, options, (), 30, 50, 64)
    assert model.copied[:5] == [40] * 5, "the prompt, once for every other beam"
    assert 0 < len(model.copied) < 29 * 5, "a beam with one child stays where it is"
    assert max(model.copied[5:]) < 30, "no reorder copies the prompt again"
    assert model.most_rows == 40, "the prompt goes in once"


def test_fewer_tokens_than_beams_and_nothing_left() -> None:
    options = BeamOptions.of(num_beams=4, num_return_sequences=4)
    model = SlotModel(4, 3, 8, (0,))
    got = beam_search(model.run, model.copy_slot, range(4), [1], options, (0,), 4, 3, 8)
    same(got, textbook(model.logits, [1], options, (0,), 4))
    model = SlotModel(4, 3, 8)
    once = process_of(no_repeat_ngram=1)
    assert beam_search(model.run, model.copy_slot, range(4), [0, 1, 2], options, (), 4, 3, 8, once) == []


def test_damaged_logits_are_named() -> None:
    model = SlotModel(2, 8, 8)

    def run(*batch: Any) -> np.ndarray:
        return np.where(np.arange(8) == 5, np.float32(np.nan), model.run(*batch))

    with pytest.raises(GristmillError, match="gave nan as a logit"):
        beam_search(run, model.copy_slot, range(2), [1], BeamOptions.of(num_beams=2), (), 4, 8, 8)


@pytest.mark.parametrize("levels", [2, 40, 10**9])
def test_the_best_are_those_of_a_whole_sort(levels: int) -> None:
    """With many ties, few and none; the lower index first among equals; never what is banned."""
    random = np.random.default_rng(levels)
    for beams, vocabulary, count in [(1, 5, 8), (2, 300, 4), (8, 1000, 16), (3, 4099, 7)]:
        scores = (random.integers(0, levels, (beams, vocabulary)) / 7).astype(np.float32)
        scores[random.random(scores.shape) < 0.3] = -np.inf
        order = np.argsort(-scores.reshape(-1), kind="stable")[:count]
        want = order[np.isfinite(scores.reshape(-1)[order])]
        assert best_of(scores, count).tolist() == want.tolist()
    assert best_of(np.full((2, 9), -np.inf, np.float32), 4).tolist() == []


def test_penalties_are_those_of_transformers() -> None:
    from transformers import (
        LogitsProcessorList,
        MinNewTokensLengthLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
    )

    random = np.random.default_rng(0)
    for length, ngram in [(1, 3), (2, 3), (12, 1), (12, 2), (40, 3), (40, 4)]:
        sequences = random.integers(0, 4, (5, length)).astype(np.int32)
        scores = -np.abs(random.normal(0, 3, (5, 11))).astype(np.float32)
        wanted = LogitsProcessorList([
            RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(ngram),
            MinNewTokensLengthLogitsProcessor(1, 12, [2, 9]),
        ])(torch.from_numpy(sequences).long(), torch.from_numpy(scores.copy()))  # fmt: skip
        process = process_of(1.3, ngram, 12, [2, 9], 1)
        assert process is not None
        np.testing.assert_array_equal(process(scores, sequences), wanted.numpy())
    assert process_of() is None


WINDOW, REACH = 20, 8  # a ring of 28 positions, and so of 32 rows


@pytest.mark.parametrize("window", [0, WINDOW])
def test_beams_in_real_slots_are_those_of_whole_sequences(window: int, tmp_path: Path) -> None:
    """The texts are longer than the window's ring; a cache row in the wrong place changes every score."""
    artifact = tiny_artifact(tmp_path / "a", max_tokens=REACH, max_slots=6, max_len=96, window=window)
    session, other = (gristmill.load(artifact, threads=1) for _ in range(2))
    prompt = np.random.default_rng(1).integers(2, 250, 19).tolist()

    def logits(sequence: list[int]) -> np.ndarray:
        other.reset(0)
        for at in range(0, len(sequence), REACH):
            part = sequence[at : at + REACH]
            out = other.forward(part, list(range(at, at + len(part))), [0] * len(part))
        return np.asarray(out[-1])

    given: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4}
    got = generate_beams(session, prompt, max_new_tokens=50, ignore_eos=True, **given)
    same(got, textbook(logits, prompt, BeamOptions.of(**given), (), 50))
    assert got[0].text == session.tokenizer.decode(got[0].token_ids)
    assert sorted(session._slots.take_many(6)) == list(range(6)), "all slots are free again"


def test_what_does_not_fit_is_refused() -> None:
    session = fake_session(max_slots=3)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"num_beams": 0}, "num_beams is 0, expected an integer from 1"),
        ({"num_beams": 2, "num_return_sequences": 3}, "is 3, expected an integer from 1 to 2"),
        ({"num_beams": 3, "num_beam_groups": 2, "diversity_penalty": 1.0}, "multiple of num_beam_groups"),
        ({"num_beams": 2, "num_beam_groups": 2}, "expected more than 1 and more than 0"),
        ({"num_beams": 2, "diversity_penalty": 1.0}, "expected more than 1 and more than 0"),
        ({"length_penalty": float("nan")}, "length_penalty is nan, expected a number from -5 to 5"),
        ({"early_stopping": "always"}, "expected False, True or 'never'"),
        ({"beams": 2}, "did you mean num_beams"),
        ({"num_beams": 4}, "4 slots are needed at once, 3 of 3 are free"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "is 3, expected at most max_new_tokens, 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
        ({"temperature": 1.0}, "beam search has no option 'temperature'"),
    ]  # fmt: skip
    for given, message in refused:
        with pytest.raises(GristmillError, match=message):
            generate_beams(session, [1, 2], **given)
    with pytest.raises(GristmillError, match="the prompt has 41 tokens"):
        generate_beams(session, [2] * 41, num_beams=2)
    assert [b.finish_reason for b in generate_beams(session, [2] * 40, num_beams=2)] == ["length"]


def test_slots_come_back_after_a_failure_and_a_process_sees_whole_sequences() -> None:
    session = fake_session(max_slots=4)
    seen: list[list[list[int]]] = []

    def process(scores: np.ndarray, sequences: np.ndarray) -> np.ndarray:
        seen.append(sequences.tolist())
        if len(seen) == 3:
            raise KeyboardInterrupt
        scores[:, 7] = 0.0  # certain
        return scores

    with pytest.raises(KeyboardInterrupt):
        generate_beams(session, [5, 6], process=process, num_beams=2)
    assert seen[0] == [[5, 6]] and seen[1][0] == [5, 6, 7] and len(seen[2]) == 2
    assert len(session._slots.take_many(4)) == 4


def test_no_ending_before_the_least_number_of_tokens() -> None:
    session = fake_session()
    session.eos_ids = frozenset([EOS])

    def want_to_end(scores: np.ndarray, sequences: np.ndarray) -> np.ndarray:
        scores[:, EOS] = np.where(np.isfinite(scores[:, EOS]), 0.0, -np.inf)
        return scores

    for least in (0, 4):
        got = generate_beams(
            session,
            [9],
            want_to_end,
            max_new_tokens=20,
            min_new_tokens=least,
            num_beams=2,
            length_penalty=0.0,
        )
        assert len(got[0].token_ids) == least + 1 and got[0].finish_reason == "stop"
        assert "</s>" not in got[0].text


def test_many_slots_are_taken_at_once_or_waited_for() -> None:
    slots = Slots(4, 10)
    one = slots.take()
    with pytest.raises(GristmillError, match="4 slots are needed at once, 3 of 4 are free"):
        slots.take_many(4)
    assert one is not None
    results: list[list[int]] = []

    def search() -> None:
        for _ in range(50):
            taken = slots.take_many(3)
            results.append(taken)
            slots.give_back_many(taken)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 150 and all(sorted(taken) == [0, 1, 2] for taken in results)
    waiting = threading.Thread(target=lambda: results.append(slots.take_many(4)))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive(), "one slot is held here"
    slots.give_back(one)
    waiting.join(5)
    assert sorted(results[-1]) == [0, 1, 2, 3]


def test_slots_that_keep_a_prefix_are_taken_last_and_empty() -> None:
    slots = Slots(3, 10)
    held = slots.take_many(3)
    for slot in held:
        slots.lengths[slot] = 2
    slots.give_back(held[1], [5, 6])
    slots.give_back(held[0], [7])
    slots.give_back_many(held[2:])
    assert slots.take_many(2) == [held[2], held[1]], "the empty one, then the one that has kept longest"
    assert slots.longest_kept([5, 6]) == (-1, 0) and slots.longest_kept([7]) == (held[0], 1)
    assert slots.lengths[held[1]] == 0


CASES = [
    Case(2),
    Case(4, length_penalty=0.0, num_return_sequences=3),
    Case(4, length_penalty=2.0, early_stopping="never", num_return_sequences=4),
    Case(8, early_stopping=True, num_return_sequences=2),
    Case(4, repetition_penalty=1.3, no_repeat_ngram=3),
    Case(2, length_penalty=-1.0, min_new_tokens=12, num_return_sequences=2),
]


def same_as_transformers(model: Path, artifact: Path, prompts: list[str]) -> None:
    for found in compare(model, gristmill.load(artifact), prompts, CASES, max_new_tokens=24):
        assert found.equal, found
        assert found.score_error < 5e-6, found


def test_sequences_of_transformers_on_code(py7m: Path, py7m_f32: Path) -> None:
    same_as_transformers(py7m, py7m_f32, ["import os\n\nfor name in"])


def test_sequences_of_transformers_on_stories(stories260k: Path, stories_f32: Path) -> None:
    same_as_transformers(stories260k, stories_f32, ["Once upon a time", "Lily had a red ball. One day"])
