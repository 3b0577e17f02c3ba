"""One row of logits to one token: each step against transformers, draws against statistics."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from gristmill.runtime.decoding import sampling
from gristmill.runtime.decoding.chooser import Choice, Chooser, most_likely_ids
from gristmill.runtime.decoding.history import NGrams, Tally
from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.decoding.sampling import Workspace, nucleus, typical, uniform
from gristmill.runtime.errors import GristmillError

EOS = (2, 7)
V = 400
TEXT = [5, 9, 5, 9, 11, 5, 9, 12, 5]  # after the prompt's end at 4
PROMPT = 4


def logits_of(seed: int, size: int = V, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def chooser_of(text: Sequence[int] = (), prompt: int = 0, size: int = V, **options: Any) -> Chooser:
    """A chooser that has taken in text[prompt:] after the prompt text[:prompt]."""
    made = Chooser(GenerationOptions.of(**options), text[:prompt], 5, 0, EOS, size)
    for token in text[prompt:]:
        made.accept(token)
    return made


def transformers_of(prompt: int, **options: Any) -> LogitsProcessorList:
    """What transformers.generate puts together for these options, in its order."""
    o = GenerationOptions.of(**options)
    steps: list[Any] = []
    if o.logit_bias:
        steps.append(SequenceBiasLogitsProcessor({(token,): float(bias) for token, bias in o.logit_bias}))
    if o.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(o.repetition_penalty))
    if o.no_repeat_ngram:
        steps.append(NoRepeatNGramLogitsProcessor(o.no_repeat_ngram))
    if o.min_new_tokens:
        steps.append(MinNewTokensLengthLogitsProcessor(prompt, o.min_new_tokens, list(EOS)))
    if o.temperature not in (0, 1):
        steps.append(TemperatureLogitsWarper(o.temperature))
    if o.top_k:
        steps.append(TopKLogitsWarper(o.top_k))
    if o.top_p < 1:
        steps.append(TopPLogitsWarper(o.top_p))
    if o.min_p:
        steps.append(MinPLogitsWarper(o.min_p))
    if o.typical_p < 1:
        steps.append(TypicalLogitsWarper(o.typical_p))
    return LogitsProcessorList(steps)


def expected_of(scores: np.ndarray, text: Sequence[int], prompt: int, **options: Any) -> np.ndarray:
    ids = torch.tensor([list(text)], dtype=torch.long)
    out: torch.Tensor = transformers_of(prompt, **options)(ids, torch.from_numpy(scores.copy())[None])
    return out[0].numpy()


PROCESSORS: list[dict[str, Any]] = [
    {"logit_bias": {3: 2.5, 9: -1.5, 399: 1e3}},
    {"logit_bias": {3: -math.inf, 0: 0.0}},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram": 1},
    {"no_repeat_ngram": 2},
    {"no_repeat_ngram": 3},
    {"no_repeat_ngram": 30},
    {"min_new_tokens": 5},  # five have come
    {"min_new_tokens": 6},
    {"logit_bias": {5: 4.0, 2: 50.0}, "repetition_penalty": 1.4, "no_repeat_ngram": 2, "min_new_tokens": 9},
]


@pytest.mark.parametrize("options", PROCESSORS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_processed_logits_are_those_of_transformers(options: dict[str, Any], seed: int) -> None:
    scores = logits_of(seed)
    before = scores.copy()
    made = chooser_of(TEXT, PROMPT, **options)
    expected = expected_of(scores, TEXT, PROMPT, **options)
    np.testing.assert_array_equal(made.process(scores), expected)
    np.testing.assert_array_equal(scores, before)
    assert made.choose(scores, 8) == Choice(int(expected.argmax()))


WARPERS: list[dict[str, Any]] = [
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "typical_p": 0.3},
    {"temperature": 1.0, "typical_p": 0.95},
    {"temperature": 1.7, "typical_p": 0.999},
    {"temperature": 0.8, "top_k": 60, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.8},
    {"temperature": 2.0, "top_k": 90, "min_p": 0.02, "repetition_penalty": 1.2, "logit_bias": {17: 3.0}},
    {"temperature": 1.5, "top_p": 0.97, "typical_p": 0.9, "no_repeat_ngram": 2, "min_new_tokens": 20},
]


@pytest.mark.parametrize("options", WARPERS, ids=str)
@pytest.mark.parametrize("size", [V, 3000])
def test_distributions_are_those_of_transformers(options: dict[str, Any], size: int) -> None:
    for seed in range(5):
        scores = logits_of(seed, size, 1.0 + seed)
        kept = torch.from_numpy(expected_of(scores, TEXT, PROMPT, **options))
        expected = torch.softmax(kept.double(), 0).numpy()
        ids, probabilities = chooser_of(TEXT, PROMPT, size, **options).distribution(scores, 8)
        assert ids.tolist() == np.flatnonzero(expected > 1e-44).tolist()
        np.testing.assert_allclose(probabilities, expected[ids], rtol=2e-5)


@given(
    st.lists(st.integers(-6, 3), min_size=2, max_size=60),
    st.floats(0.3, 3),
    st.integers(0, 70),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from([1.0, 0.2, 0.9]),
)
def test_few_logits_with_many_ties(
    values: list[int], temperature: float, top_k: int, min_p: float, typical_p: float
) -> None:
    """Where top-p's own choice among equals cannot matter, the sets are the same but for edges in f32."""
    scores = np.array(values, np.float32)
    options = {"temperature": temperature, "top_k": top_k, "min_p": min_p, "typical_p": typical_p}
    made = Chooser(GenerationOptions.of(**options), [], 0, 0, (), scores.size)
    ids, probabilities = made.distribution(scores, 0)
    expected = torch.softmax(torch.from_numpy(expected_of(scores, [], 0, **options)).double(), 0).numpy()
    if ids.tolist() == np.flatnonzero(expected).tolist():
        np.testing.assert_allclose(probabilities, expected[ids], rtol=2e-5)
    else:
        assert typical_p < 1 and _on_the_edge(scores / np.float32(temperature), options)


def _on_the_edge(scores: np.ndarray, options: dict[str, Any]) -> bool:
    """Whether typical-p's mass, or two distances from the entropy, are equal to within f32."""
    untypical = {**options, "typical_p": 1.0}
    made = Chooser(GenerationOptions.of(**{**untypical, "temperature": 1.0}), [], 0, 0, (), scores.size)
    _, p = made.distribution(scores.astype(np.float32), 0)
    distance = np.abs(-np.log(p) + (p * np.log(p)).sum())
    order = np.argsort(distance, kind="stable")
    mass_is_close = np.abs(np.cumsum(p[order]) - options["typical_p"]).min() < 1e-5
    gaps = np.diff(distance[order])
    return bool(mass_is_close or ((gaps < 1e-5) & (np.diff(p[order]) != 0)).any())


def test_typical_beyond_the_first_candidates() -> None:
    """A flat row keeps more than are looked at first; a steep one is decided by those. transformers' warper
    runs in f64 here: in f32 its entropy is off by enough to move several ids over the edge of a flat row."""
    for scale in (0.01, 1.0, 3.0):
        scores = logits_of(1, 20000, scale)
        for mass in (0.2, 0.9):
            left = TypicalLogitsWarper(mass)(None, torch.from_numpy(scores).double()[None])[0]
            assert typical(scores, mass).tolist() == torch.isfinite(left).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.01, 1.0, 5.0])
@pytest.mark.parametrize("holes", [False, True])
def test_the_histogram_changes_nothing(scale: float, holes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-p and typical-p keep what they keep when all is sorted; ties, -inf and extremes included."""
    masses = (1e-9, 0.3, 0.9, 0.9999, 1 - 1e-9)
    for seed in range(4):
        scores = np.round(logits_of(seed, 5000, scale), 2 + 4 * (seed % 2))
        if holes:
            scores[::3], scores[1::3] = -np.inf, -1e38
            scores[1], scores[4] = 0, -80
        quick = [(nucleus(scores, mass).tolist(), typical(scores, mass).tolist()) for mass in masses]
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "FIRST_CANDIDATES", scores.size)
            sorted_all = [(nucleus(scores, mass).tolist(), typical(scores, mass).tolist()) for mass in masses]
        weights = np.exp(scores - scores.max())
        for (top, near), (top_sorted, near_sorted) in zip(quick, sorted_all):
            for one, other in ((top, top_sorted), (near, near_sorted)):
                assert weights[list({*one} ^ {*other})].sum() <= 1e-6 * weights.sum()
                assert one


def test_presence_and_frequency_are_of_new_tokens_alone() -> None:
    scores = logits_of(1)
    made = chooser_of(TEXT, PROMPT, presence_penalty=0.5, frequency_penalty=-0.25, temperature=1.0)
    expected = scores.astype(np.float64)
    for token in set(TEXT[PROMPT:]):
        expected[token] -= 0.5 - 0.25 * TEXT[PROMPT:].count(token)
    np.testing.assert_allclose(made.process(scores), expected, atol=2e-6)
    untouched = [token for token in range(V) if token not in TEXT[PROMPT:]]
    np.testing.assert_array_equal(made.process(scores)[untouched], scores[untouched])


def test_bias_comes_before_the_repetition_penalty_and_that_before_the_others() -> None:
    """As in transformers and in vLLM: ((2 + 4) / 2 - 1.5) - 0.5."""
    scores = np.array([2, 0], np.float32)
    options = GenerationOptions.of(
        logit_bias={0: 4}, repetition_penalty=2.0, frequency_penalty=1.5, presence_penalty=0.5
    )
    made = Chooser(options, [], 0, 0, (), 2)
    made.accept(0)
    assert made.process(scores).tolist() == [1.0, 0.0]


@given(st.integers(1, 4), st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40))
def test_ngrams_are_those_found_by_looking_at_all(size: int, text: list[int], prompt: int) -> None:
    grown = NGrams(size, text[:prompt])
    for end in range(min(prompt, len(text)), len(text) + 1):
        now = text[:end]
        expected = {
            now[i + size - 1]
            for i in range(end - size + 1)
            if end >= size - 1 and now[i : i + size - 1] == now[end - size + 1 :]
        }
        assert set(grown.banned()) == expected
        if end < len(text):
            grown.add(text[end])


@given(st.lists(st.integers(0, 300)), st.lists(st.integers(0, 300), max_size=200))
def test_tally_counts(first: list[int], then: list[int]) -> None:
    tally = Tally(first)
    for token in then:
        tally.add(token)
    counted = dict(zip(tally.ids.tolist(), tally.counts.tolist()))
    assert counted == {token: (first + then).count(token) for token in {*first, *then}}
    assert len(tally.ids) == len(counted)


DRAWN: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.5},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.85},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 1.0, "typical_p": 0.7},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
    {
        "temperature": 1.2,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "no_repeat_ngram": 2,
        "logit_bias": {4: 2.0},
    },
]
DRAWS = 100_000


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    """The numbers in [0, 1) that draws at positions 0 to 99,999 of the choosers here take."""
    return np.array([uniform(5, 0, position) for position in range(DRAWS)])


@pytest.mark.parametrize("options", DRAWN, ids=str)
def test_draws_follow_the_processed_softmax(options: dict[str, Any], points: np.ndarray) -> None:
    """100,000 draws against the softmax of what transformers' processors leave. They are taken at once, as
    the inverse of the cumulative distribution; that `choose` takes the same is looked at for 200 of them."""
    scores = logits_of(9, 60, 2.0)
    made = chooser_of(TEXT, PROMPT, 60, **options)
    ids, probabilities = made.distribution(scores, 8)
    draws = ids[np.searchsorted(np.cumsum(probabilities)[:-1], points, side="right")]
    for position in range(0, DRAWS, DRAWS // 200):
        assert made.choose(scores, position).token == draws[position]
    expected = torch.softmax(torch.from_numpy(expected_of(scores, TEXT, PROMPT, **options)).double(), 0)
    assert deviation(np.bincount(draws, minlength=60), expected.numpy()) < 4


def deviation(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How many standard deviations chi-square lies above its mean; what cannot come must not have come."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    rare = (expected < 5) & (expected > 0)
    observed = np.append(counts[expected >= 5], counts[rare].sum() if rare.any() else [])
    expected = np.append(expected[expected >= 5], expected[rare].sum() if rare.any() else [])
    freedom = len(expected) - 1
    assert freedom > 2
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_a_wrong_distribution_is_noticed() -> None:
    """The statistic is worth something: probabilities that are 3 % off, up and down, give themselves away."""
    right = np.full(20, 0.05)
    wrong = right * np.tile([1.03, 0.97], 10)
    for seed in range(5):
        random = np.random.default_rng(seed)
        assert deviation(random.multinomial(DRAWS, wrong), right) > 4
        assert deviation(random.multinomial(DRAWS, right), right) < 4


@pytest.mark.parametrize("options", DRAWN, ids=str)
def test_a_choice_is_the_inverse_of_its_distribution(options: dict[str, Any]) -> None:
    made = chooser_of(TEXT, PROMPT, 3000, **options)
    workspace = Workspace(3000)
    shared = Chooser(made.options, TEXT[:PROMPT], 5, 0, EOS, 3000, workspace)
    for token in TEXT[PROMPT:]:
        shared.accept(token)
    for position in range(40):
        scores = logits_of(position, 3000, 2.0)
        ids, probabilities = made.distribution(scores, position)
        token = made.choose(scores, position).token
        ends = np.cumsum(probabilities)
        point = uniform(5, 0, position)
        place = int(np.searchsorted(ids, token))
        assert ids[place] == token
        assert (ends[place - 1] if place else 0.0) - 1e-6 <= point <= ends[place] + 1e-6
        assert shared.choose(scores, position).token == token
        shared.choose(-scores, position)  # leaves nothing behind in the buffers


def test_a_mask_leaves_what_it_allows() -> None:
    scores = logits_of(1)
    mask = np.zeros(V, bool)
    mask[[3, 50, 51]] = True
    allowed = np.array([3, 50, 51])
    assert chooser_of().choose(scores, 0, mask).token == allowed[scores[allowed].argmax()]
    ids, probabilities = chooser_of(temperature=2.0).distribution(scores, 0, mask)
    assert ids.tolist() == allowed.tolist()
    expected = torch.softmax(torch.from_numpy(scores[allowed]) / 2, 0).numpy()
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    for options in ({"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.9}, {"typical_p": 0.1}, {}):
        made = chooser_of(temperature=5.0, **options)
        assert {made.choose(scores, i, mask).token for i in range(50)} <= set(allowed.tolist())


def test_nothing_left_is_refused() -> None:
    scores = logits_of(1)
    with pytest.raises(GristmillError, match="no token is left"):
        chooser_of().choose(scores, 0, np.zeros(V, bool))
    with pytest.raises(GristmillError, match="no token is left"):
        chooser_of(logit_bias=dict.fromkeys(range(V), -math.inf)).choose(scores, 0)
    only_eos = np.isin(np.arange(V), EOS)
    with pytest.raises(GristmillError, match="min_new_tokens"):
        chooser_of(min_new_tokens=1, temperature=1.0).distribution(scores, 0, only_eos)
    assert chooser_of([1], 0, min_new_tokens=1).choose(scores, 0, only_eos).token in EOS
    with pytest.raises(GristmillError, match="repetition_penalty"):
        chooser_of(range(V), V, repetition_penalty=1e-40).choose(scores, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "top_k": 3}, {"logit_bias": {1: -math.inf}}], ids=str
)
def test_a_broken_model_is_named_whatever_hides_it(bad: float, options: dict[str, Any]) -> None:
    scores, mask = logits_of(1), np.zeros(V, bool)
    scores[1], mask[5] = bad, True
    for call in (chooser_of(**options).choose, chooser_of(**options).distribution):
        with pytest.raises(GristmillError, match="damaged weights"):
            call(scores, 0, mask)
    with pytest.raises(GristmillError, match="damaged weights"):
        chooser_of(**options).choose(np.full(V, -np.inf, np.float32), 0)


def test_ends_wait_for_min_new_tokens() -> None:
    scores = np.zeros(V, np.float32)
    scores[[2, 7, 30]] = 9, 8, 7
    made = chooser_of(min_new_tokens=2, stop_ids=[30])
    assert made.ends == {2, 7, 30}
    for expected in (0, 0, 2):
        assert made.choose(scores, 0).token == expected
        made.accept(expected)
    assert chooser_of(min_new_tokens=2, stop_ids=30, ignore_eos=True).ends == {30}
    assert chooser_of(min_new_tokens=2, ignore_eos=True).choose(scores, 0).token == 2


@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("size", [10, V, 5000])
def test_logprobs_are_of_the_logits_as_they_came(count: int, size: int) -> None:
    scores = logits_of(count, size)
    expected = torch.log_softmax(torch.from_numpy(scores), 0)
    options: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 9,
        "repetition_penalty": 1.5,
        "logit_bias": {4: 3.0},
    }
    made = chooser_of([4, 4, 1], 1, size, logprobs=count, **options)
    plain = chooser_of([4, 4, 1], 1, size, **options)
    for position in range(20):
        choice = made.choose(scores, position)
        assert choice.token == plain.choose(scores, position).token
        assert choice.logprob == pytest.approx(float(expected[choice.token]), abs=2e-5)
        best = expected.topk(min(count, size))
        assert [token for token, _ in choice.top] == best.indices.tolist()
        assert [value for _, value in choice.top] == pytest.approx(best.values.tolist(), abs=2e-5)


def test_the_most_likely_ids_of_equals_are_the_lowest() -> None:
    assert most_likely_ids(np.array([1, 3, 2, 3, 3, 0], np.float32), 2) == [1, 3]
    assert most_likely_ids(np.zeros(4, np.float32), 9) == [0, 1, 2, 3]


def test_greedy_gives_one_id() -> None:
    ids, probabilities = chooser_of(logit_bias={8: 1000}).distribution(logits_of(1), 0)
    assert ids.tolist() == [8] and probabilities.tolist() == [1.0]


def test_rows_chosen_ahead_equal_rows_chosen_one_by_one() -> None:
    """Speculation chooses on a row before it knows that the next counts: choosing leaves no trace."""
    options: dict[str, Any] = {
        "temperature": 1.0,
        "no_repeat_ngram": 2,
        "frequency_penalty": 1.0,
        "repetition_penalty": 1.1,
    }
    one, ahead = chooser_of(TEXT, PROMPT, **options), chooser_of(TEXT, PROMPT, **options)
    for position in range(30):
        scores = logits_of(position)
        for other in range(3):
            ahead.choose(logits_of(100 + other), position + other)
        token = one.choose(scores, position).token
        assert ahead.choose(scores, position).token == token
        for made in (one, ahead):
            made.accept(token)


@pytest.mark.parametrize("name", ["stop_ids", "logit_bias"])
def test_ids_that_the_model_lacks(name: str) -> None:
    with pytest.raises(GristmillError, match=f"{name} names token {V}, expected .* from 0 to {V - 1}"):
        Chooser(
            GenerationOptions.of(**{name: {V: 1.0} if name == "logit_bias" else [3, V]}), [], 0, 0, EOS, V
        )


def test_prompt_ids_beyond_the_logits_are_no_mistake() -> None:
    """As in transformers: an embedding may have more rows than the head."""
    made = chooser_of([V + 3, 1, V + 3], 3, repetition_penalty=1.2, no_repeat_ngram=1)
    assert made.choose(logits_of(1), 2).token < V


@pytest.mark.parametrize(
    "given, message",
    [
        ({"min_p": 1.5}, "min_p"),
        ({"typical_p": 0}, "typical_p"),
        ({"typical_p": "1"}, "typical_p"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5, expected a number from -2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram"),
        ({"logit_bias": [1]}, "logit_bias is list, expected a mapping"),
        ({"logit_bias": {"a": 1}}, "token id in logit_bias is 'a'"),
        ({"logit_bias": {-1: 1}}, "token id in logit_bias"),
        ({"logit_bias": {1: math.inf}}, "logit_bias of token 1"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1"),
        ({"logit_bias": {1: "x", "b": 2}}, "logit_bias"),
        ({"logit_bias": (1, 2)}, "logit_bias"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "at most max_new_tokens, 8"),
        ({"stop_ids": [1, -2]}, "stop_ids"),
        ({"stop_ids": "x"}, "stop_ids"),
        ({"logprobs": 21}, "logprobs is 21, expected an integer from 0 to 20"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 0}, "n is 0"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        GenerationOptions.of(**given)


def test_options_are_hashable() -> None:
    made = GenerationOptions.of(logit_bias={9: 1.0, 3: -math.inf}, stop_ids=4, stop="x")
    assert made.logit_bias == ((3, -math.inf), (9, 1.0)) and made.stop_ids == (4,)
    assert hash(made) == hash(GenerationOptions.of(logit_bias=made.logit_bias, stop_ids=[4], stop=["x"]))
