"""Token scores against their definitions, and intervals that cover what they promise."""

import math

import numpy as np
import pytest
import torch

from gristmill.compiler import statistics
from gristmill.compiler.statistics import Blocks, Interval, bootstrap_mean, token_scores, tokens_to_decide
from gristmill.runtime.errors import GristmillError


def logits(rows: int, vocabulary: int, seed: int, size: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocabulary)) * size).astype(np.float32)


def test_token_scores_equal_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "F64_BYTES", 5 * 8 * 40)  # blocks of 5 rows
    a, b, targets = logits(13, 40, 1), logits(13, 40, 2), np.arange(13)
    log_p = torch.log_softmax(torch.from_numpy(a).double(), 1)
    log_q = torch.log_softmax(torch.from_numpy(b).double(), 1)
    scores = token_scores(a, b, targets)
    np.testing.assert_allclose(scores[:, 0], -log_p.numpy()[targets, targets], rtol=1e-12)
    np.testing.assert_allclose(scores[:, 1], -log_q.numpy()[targets, targets], rtol=1e-12)
    np.testing.assert_allclose(scores[:, 2], (log_p.exp() * (log_p - log_q)).sum(1).numpy(), rtol=1e-12)
    np.testing.assert_array_equal(scores[:, statistics.TOP1], a.argmax(1) == b.argmax(1))
    five = np.argsort(-b, axis=1)[:, : statistics.FEW]
    np.testing.assert_array_equal(scores[:, statistics.TOP5], (five == a.argmax(1)[:, None]).any(1))
    assert 0 < scores[:, statistics.TOP5].sum() < len(scores)
    np.testing.assert_array_equal(scores[:, [statistics.REFERENCE_CHOICE, statistics.CHOICE]].T,
                                  [a.argmax(1), b.argmax(1)])  # fmt: skip
    np.testing.assert_allclose(scores[:, statistics.REFERENCE_BEST], -log_p.numpy().max(1), rtol=1e-12)
    np.testing.assert_allclose(scores[:, statistics.BEST], -log_q.numpy().max(1), rtol=1e-12)


def test_equal_logits_have_no_divergence_and_huge_ones_no_overflow() -> None:
    a = logits(4, 9, 1, size=1e4)
    scores = token_scores(a, a + np.float32(8), np.zeros(4, int))  # a constant changes no distribution
    assert (scores[:, 2] < 1e-3).all()
    assert (token_scores(a, a, np.zeros(4, int))[:, 2] == 0).all()
    assert np.isfinite(token_scores(a, -a, np.zeros(4, int))).all()


def test_a_tiny_divergence_is_seen() -> None:
    """KL of logits moved by a small d is half of d's variance under p: far below f32's resolution of nll."""
    a = logits(1, 50, 1).astype(np.float64)
    d = np.random.default_rng(2).standard_normal((1, 50)) * 1e-4
    p = np.exp(a) / np.exp(a).sum()
    expected = ((p * d**2).sum() - (p * d).sum() ** 2) / 2
    assert token_scores(a, a + d, np.array([0]))[0, 2] == pytest.approx(expected, rel=1e-3)
    assert expected < 1e-8


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_refused(bad: float) -> None:
    a, b = logits(2, 5, 1), logits(2, 5, 2)
    b[1, 3] = bad
    with pytest.raises(GristmillError, match="the artifact gave a logit"):
        token_scores(a, b, np.zeros(2, int))
    with pytest.raises(GristmillError, match="the float model gave a logit"):
        token_scores(b, a, np.zeros(2, int))


def test_blocks_stay_within_their_window() -> None:
    blocks = Blocks.of([np.ones(70), np.full(32, 2.0), np.full(1, 3.0)])
    np.testing.assert_array_equal(blocks.counts, [32, 32, 6, 32, 1])
    np.testing.assert_array_equal(blocks.sums, [32, 32, 6, 64, 3])


def test_the_interval_is_repeatable_and_holds_its_estimate() -> None:
    blocks = Blocks.of([np.random.default_rng(1).exponential(size=500)])
    found = bootstrap_mean(blocks, seed=3)
    assert found == bootstrap_mean(blocks, seed=3)
    assert found.low < found.estimate < found.high
    assert found.estimate == pytest.approx(blocks.sums.sum() / 500)


def test_equal_values_have_a_point_for_an_interval() -> None:
    found = bootstrap_mean(Blocks.of([np.full(100, 0.25)]))
    assert found == Interval(0.25, 0.25, 0.25)


def test_intervals_cover_the_true_mean() -> None:
    """Tokens correlated within a block: 95 % intervals hold the true mean 0 about as often as promised."""
    draw = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        tokens = np.repeat(draw.standard_normal(32), 32) + draw.standard_normal(1024)
        found = bootstrap_mean(Blocks.of([tokens]), seed=seed, resamples=300)
        held += found.low <= 0 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_relative_growth_is_the_ratio_of_perplexities() -> None:
    found = Interval(0.01, -0.02, 0.05).relative_growth()
    assert found.estimate == pytest.approx(math.exp(2.01) / math.exp(2) - 1)
    assert (found.low, found.high) == pytest.approx((math.exp(-0.02) - 1, math.exp(0.05) - 1))
    assert math.isfinite(Interval(1e4, 0, 1e4).relative_growth().high)


def test_tokens_to_decide() -> None:
    wide = Interval(0.01, -0.01, 0.03)
    assert tokens_to_decide(wide, 0.02, 1000) == 4000  # half the distance needs four times the tokens
    assert tokens_to_decide(wide, 0.05, 1000) == 1000
    assert tokens_to_decide(wide, 0.01, 1000) is None
