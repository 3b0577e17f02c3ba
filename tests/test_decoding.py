"""Sampling, penalties, stop strings: against transformers, and against statistics where they draw."""

from typing import Any

import numpy as np
import pytest
import torch
from chosen import choose
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_tokenizer
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gristmill.runtime.decoding.greedy import most_likely
from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.decoding.sampling import (
    Workspace,
    candidates,
    draw,
    kth_largest,
    nucleus,
    uniform,
)
from gristmill.runtime.decoding.stops import StopStrings
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.tokenizer import StreamDecoder, Tokenizer

NONE_SEEN = np.empty(0, np.int64)


def logits_of(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def test_a_workspace_changes_nothing() -> None:
    """Used again and again, also for fewer entries than it has room for."""
    random = np.random.default_rng(3)
    workspace = Workspace(3000)
    for options in ({}, {"top_k": 700}, {"top_p": 0.9}, {"top_k": 600, "top_p": 0.99}, {"temperature": 3.0}):
        chosen = GenerationOptions.of(**{"temperature": 0.8, **options})
        for position in range(20):
            scores = random.standard_normal(3000).astype(np.float32) * 2
            plain = choose(scores, chosen, NONE_SEEN, 5, 0, position)
            assert choose(scores, chosen, NONE_SEEN, 5, 0, position, workspace) == plain


@pytest.mark.parametrize("size", [2, 50, 3000])
@pytest.mark.parametrize(
    "top_k, top_p", [(0, 1.0), (5, 1.0), (1, 1.0), (0, 0.9), (0, 0.2), (40, 0.7), (10**6, 0.999)]
)
def test_candidates_are_those_of_transformers(size: int, top_k: int, top_p: float) -> None:
    scores = logits_of(size, size)
    expected = torch.from_numpy(scores)[None]
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ids, kept = candidates(scores, top_k, top_p)
    assert ids.tolist() == torch.isfinite(expected[0]).nonzero()[:, 0].tolist()
    np.testing.assert_array_equal(kept, scores[ids])


def test_ties_of_the_kth_stay() -> None:
    ids, _ = candidates(np.array([1, 3, 2, 2, 2, 0], np.float32), 2, 1.0)
    assert ids.tolist() == [1, 2, 3, 4]


def test_the_whole_chain_is_that_of_transformers() -> None:
    """The processed distribution: penalty, temperature, top-k, top-p in this order."""
    scores, seen = logits_of(2, 500), np.arange(40)
    out = RepetitionPenaltyLogitsProcessor(1.2)(torch.from_numpy(seen)[None], torch.from_numpy(scores)[None])
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(30), TopPLogitsWarper(0.8)):
        out = warper(None, out)
    expected = torch.softmax(out[0], 0).numpy()
    options = GenerationOptions.of(temperature=0.7, top_k=30, top_p=0.8, repetition_penalty=1.2)
    draws = [choose(scores, options, seen, seed=5, sequence=0, position=i) for i in range(20000)]
    assert chi_square(np.bincount(draws, minlength=500), expected) < 4


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How many standard deviations the statistic lies above its mean; what cannot come must not have come."""
    assert counts[probabilities == 0].sum() == 0
    possible = probabilities * counts.sum() >= 5
    observed = np.append(counts[possible], counts[~possible].sum())
    expected = np.append(probabilities[possible], probabilities[~possible].sum()) * counts.sum()
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


def test_draws_follow_the_softmax() -> None:
    scores = logits_of(3, 60)
    probabilities = np.exp(scores.astype(np.float64) - scores.max())
    probabilities /= probabilities.sum()
    draws = [draw(scores, uniform(11, 0, i)) for i in range(100_000)]
    assert chi_square(np.bincount(draws, minlength=60), probabilities) < 4


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1500])
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(size: int) -> None:
    scores = logits_of(size, size)
    ends = np.cumsum(np.exp(scores - scores.max()), dtype=np.float64)
    for point in (0.0, 0.1, 0.5, 0.999, 1 - 2**-53):
        expected = min(int(np.searchsorted(ends, point * ends[-1], side="right")), size - 1)
        assert draw(scores, point) == expected


def test_a_draw_skips_what_has_no_weight() -> None:
    scores = np.full(1300, -np.inf, np.float32)
    scores[[600, 1200]] = 0
    assert [draw(scores, point) for point in (0.0, 0.49, 0.51, 1 - 2**-53)] == [600, 600, 1200, 1200]


@pytest.mark.parametrize("size, k", [(10, 3), (800, 1), (803, 100), (5000, 50), (4000, 1000), (100, 99)])
def test_kth_largest(size: int, k: int) -> None:
    scores = np.round(logits_of(k, size), 1)  # with ties
    assert kth_largest(scores, k) == np.sort(scores)[-k]


def test_draws_depend_on_seed_sequence_and_position_only() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    points = {uniform(s, q, p) for s in (0, 1, 2**64 - 1) for q in (0, 1) for p in (0, 1, 4095)}
    assert len(points) == 18 and all(0 <= p < 1 for p in points)


def test_large_nucleus_is_beyond_the_first_candidates() -> None:
    """A flat distribution keeps more than the first candidates looked at."""
    scores = logits_of(4, 20000) * np.float32(0.01)
    kept = nucleus(scores, 0.5)
    expected = TopPLogitsWarper(0.5)(None, torch.from_numpy(scores)[None])[0]
    assert abs(len(kept) - int(torch.isfinite(expected).sum())) <= 2  # f32 against f64 sums of 20000 terms


def test_extreme_logits() -> None:
    scores = np.array([-np.inf, 1e30, 0, -1e30], np.float32)
    for temperature in (1e-6, 1.0, 1e30):
        options = GenerationOptions.of(temperature=temperature, top_p=0.9)
        assert choose(scores, options, NONE_SEEN, 0, 0, 0) in (1, 2, 3)
    assert choose(scores, GenerationOptions.of(temperature=1.0), NONE_SEEN, 0, 0, 0) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers(bad: float) -> None:
    with pytest.raises(GristmillError, match="logit"):
        most_likely(np.array([1, bad, 3], np.float32))
    with pytest.raises(GristmillError, match="logit"):
        most_likely(np.full(3, -np.inf, np.float32))


def test_greedy_takes_the_first_of_equals() -> None:
    assert most_likely(np.array([1, 7, 7, 3], np.float32)) == 1


@pytest.mark.parametrize(
    "given, message",
    [
        ({"temprature": 1}, "did you mean temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": "0.9"}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"stop": 3}, "stop"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        GenerationOptions.of(**given)


def test_stop_strings_are_never_shown_in_part() -> None:
    stops = StopStrings(["END", "<|user|>"])
    assert [stops.push(piece) for piece in ("abE", "N", "x<|us", "e", "Er")] == [
        "ab",
        "",
        "ENx",
        "",
        "<|useEr",
    ]
    assert [stops.push(piece) for piece in ("1E", "ND2", "3")] == ["1", "", ""]
    assert stops.stopped and stops.flush() == ""


@given(st.text("ab"), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_at_the_first_occurrence(
    text: str, given_stops: list[str], data: st.DataObject
) -> None:
    stops, shown, at = StopStrings(given_stops), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, 3))
        shown += stops.push(text[at : at + size])
        at += size
    shown += stops.flush()
    ends = [text.find(stop) for stop in given_stops if stop in text]
    if not ends:
        assert shown == text and not stops.stopped
    else:
        assert stops.stopped and text.startswith(shown) and len(shown) >= min(ends)
        assert not any(stop in shown for stop in given_stops)


BYTES = Tokenizer(byte_tokenizer().to_str().encode())


@given(st.text())
def test_pieces_join_to_the_text_and_split_no_character(text: str) -> None:
    ids = BYTES.encode(text, add_special_tokens=False)
    decoder = StreamDecoder(BYTES)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 257), max_size=40), st.lists(st.integers(0, 257), max_size=10))
def test_pieces_of_any_ids_join_to_their_text(ids: list[int], prompt: list[int]) -> None:
    """Bytes that are no UTF-8 included; a character begun in the prompt ends in the answer."""
    decoder = StreamDecoder(BYTES, prompt)
    pieces = "".join(decoder.push(i) for i in ids) + decoder.flush()
    assert prompt or pieces == BYTES.decode(ids)
