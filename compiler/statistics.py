"""Two models' logits on the same tokens, and how sure the figures from a few hundred tokens are.

Only their difference per token counts (paired): what makes one token harder than another drops out, and a
small difference shows on little text. Neighbouring tokens resemble each other, so whole blocks of them are
resampled, not single tokens: a block is the unit that is taken as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.runtime.errors import GristmillError

BLOCK_TOKENS = 32
RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST_BLOCKS = 8  # with fewer, resampling cannot show how far the next text may lie

LARGEST_NLL = 700.0  # exp overflows soon after; a model this wrong needs no finer figure
# Columns of token_scores. BEST: nll that a model gives its own first choice; CHOICE: that token's id.
REFERENCE_NLL, NLL, KL, TOP1, TOP5, REFERENCE_BEST, BEST, REFERENCE_CHOICE, CHOICE = range(9)
COLUMNS = 9
FEW = 5  # of TOP5
F64_BYTES = 16 << 20  # the most that one f64 copy of some rows of logits may take

Array = NDArray[Any]


def perplexity(nll: float) -> float:
    """exp(nll), of nats per token."""
    return math.exp(min(nll, LARGEST_NLL))


def token_scores(expected: Array, logits: Array, targets: Array) -> Array:
    """Compare logits [R, V] f32 of the float model and the artifact on targets [R], in f64: [R, COLUMNS].

    The columns: nll of the float model, nll of the artifact, KL(float || artifact), whether the top tokens
    agree, whether the float model's top token is among the artifact's five (fewer than five have a larger
    logit), the nll that either model gives its own top token, and those tokens' ids.
    """
    step = max(1, F64_BYTES // (8 * expected.shape[1]))
    parts = [
        _score_block(expected[at : at + step], logits[at : at + step], targets[at : at + step])
        for at in range(0, len(targets), step)
    ]
    return np.concatenate(parts) if parts else np.empty((0, COLUMNS))


def _score_block(expected: Array, logits: Array, targets: Array) -> Array:
    """KL = sum p (log p - log q); as log p = a - log_a, that is sum p (a - b) - log_a + log_b."""
    rows = np.arange(len(targets))
    a, b = _shifted(expected, "the float model"), _shifted(logits, "the artifact")
    weight = np.exp(a)
    total = weight.sum(1)
    log_a, log_b = np.log(total), np.log(np.exp(b).sum(1))
    nll_a, nll_b = log_a - a[rows, targets], log_b - b[rows, targets]
    a -= b
    kl = np.einsum("rv,rv->r", weight, a) / total - log_a + log_b
    top_a, top_b = expected.argmax(1), logits.argmax(1)
    among = (logits > logits[rows, top_a][:, None]).sum(1) < FEW
    columns = [nll_a, nll_b, np.maximum(kl, 0), top_a == top_b, among, log_a, log_b, top_a, top_b]
    return np.stack(columns, axis=1).astype(np.float64)


def _shifted(logits: Array, whose: str) -> Array:
    """Logits in f64 with their row's largest at 0."""
    if not np.isfinite(logits).all():
        raise GristmillError(
            f"{whose} gave a logit that is NaN or infinite: the weights are damaged or out of range"
        )
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return wide


@dataclass(frozen=True)
class Interval:
    """An estimate with the percentile bootstrap interval around it."""

    estimate: float
    low: float
    high: float

    def relative_growth(self) -> Interval:
        """exp(x) - 1 of all three: a mean difference of nll as the relative increase of perplexity."""
        grown = (math.expm1(min(x, LARGEST_NLL)) for x in (self.estimate, self.low, self.high))
        return Interval(*grown)


@dataclass(frozen=True)
class Blocks:
    """Sums and counts of a value per token over blocks; their ratio is the mean."""

    sums: Array  # [B] f64
    counts: Array  # [B] i64

    @staticmethod
    def of(windows: Sequence[Array], tokens: int = BLOCK_TOKENS) -> Blocks:
        """Cut each window's values into blocks of `tokens`; the last block of a window may be short."""
        pieces = [w[start : start + tokens] for w in windows for start in range(0, len(w), tokens)]
        return Blocks(
            np.array([p.sum() for p in pieces], np.float64), np.array([len(p) for p in pieces], np.int64)
        )


def bootstrap_mean(
    blocks: Blocks, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE
) -> Interval:
    """The mean per token and its interval; the same blocks and seed give the same interval."""
    draw = np.random.Generator(np.random.Philox(seed))
    count = len(blocks.sums)
    means = np.empty(resamples)
    for i in range(resamples):
        picked = draw.integers(count, size=count)
        means[i] = blocks.sums[picked].sum() / blocks.counts[picked].sum()
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    estimate = float(blocks.sums.sum() / blocks.counts.sum())
    return Interval(estimate, min(float(low), estimate), max(float(high), estimate))


@dataclass(frozen=True)
class Comparison:
    """What `token_scores` say of a text. nll and kl in nats per token, ppl_increase relative, agreements
    shares of the tokens."""

    tokens: int
    blocks: int
    reference_nll: float
    nll: float
    ppl_increase: Interval
    kl: Interval
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top5_agreement: float

    @staticmethod
    def of(windows: Sequence[Array]) -> Comparison:
        """windows: the scores [tokens, COLUMNS] of each."""
        scores = np.concatenate(windows)
        increase = Blocks.of([window[:, NLL] - window[:, REFERENCE_NLL] for window in windows])
        return Comparison(
            tokens=len(scores),
            blocks=len(increase.sums),
            reference_nll=float(scores[:, REFERENCE_NLL].mean()),
            nll=float(scores[:, NLL].mean()),
            ppl_increase=bootstrap_mean(increase).relative_growth(),
            kl=bootstrap_mean(Blocks.of([window[:, KL] for window in windows])),
            kl_p99=float(np.quantile(scores[:, KL], 0.99)),
            kl_max=float(scores[:, KL].max()),
            top1_agreement=float(scores[:, TOP1].mean()),
            top5_agreement=float(scores[:, TOP5].mean()),
        )

    @property
    def reference_ppl(self) -> float:
        return perplexity(self.reference_nll)

    @property
    def ppl(self) -> float:
        return perplexity(self.nll)


def are_enough(tokens: int) -> bool:
    """Whether an interval over so many tokens shows how far the next text may lie."""
    return math.ceil(tokens / BLOCK_TOKENS) >= FEWEST_BLOCKS


def tokens_to_decide(interval: Interval, limit: float, tokens: int) -> int | None:
    """About how many tokens would bring the upper bound below the limit, or None where the estimate is not.

    The distance from estimate to bound shrinks with the square root of the number of tokens.
    """
    room = limit - interval.estimate
    if room <= 0:
        return None
    return math.ceil(tokens * max(1.0, (interval.high - interval.estimate) / room) ** 2)
