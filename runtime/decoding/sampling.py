"""Sampling over one row of logits, as transformers defines it: penalty, temperature, top-k, top-p, then one
draw.

The draw is counter-based: Philox keyed by (seed, sequence) with the position as counter. A token therefore
depends on its own sequence alone, and the same seed gives the same text for every batch, chunking and number
of threads.
"""

from __future__ import annotations

import numpy as np

FIRST_CANDIDATES = 1024  # top-p and typical-p look at this many tokens before they look at all
BINS = 4096  # of the histogram that tells how many tokens reach a probability
BLOCK = 512  # entries whose weights are summed together when one is drawn


class Workspace:
    """Buffers for a vocabulary: fresh ones of this size would be mapped, and faulted in, for every token."""

    def __init__(self, size: int):
        self.scores = np.empty(size, np.float32)
        self.weights = np.zeros(-(-size // BLOCK) * BLOCK, np.float32)


def penalize(scores: np.ndarray, penalty: float) -> np.ndarray:
    """CTRL's penalty (arXiv 1909.05858): positive logits of seen tokens divided, negative multiplied."""
    return np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))


def candidates(
    scores: np.ndarray, top_k: int, top_p: float, buffer: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ids that may be drawn and their scores; equals of the k-th best stay in, as in transformers."""
    if 0 < top_k < scores.size:
        ids = np.flatnonzero(scores >= kth_largest(scores, top_k))
        ids = ids[nucleus(scores[ids], top_p)] if top_p < 1.0 else ids
    else:
        ids = nucleus(scores, top_p, buffer) if top_p < 1.0 else np.arange(scores.size)
    return ids, scores[ids]


def kth_largest(scores: np.ndarray, k: int) -> np.float32:
    """The value that exactly k entries reach, ties apart; k < scores.size.

    The k-th largest of the maxima of disjoint groups is a lower bound that few entries reach: only those are
    sorted.
    """
    groups = 4 * k
    if scores.size >= 2 * groups:
        whole = scores.size // groups * groups
        maxima = scores[:whole].reshape(-1, groups).max(axis=0)
        scores = scores[scores >= np.partition(maxima, groups - k)[groups - k]]
    return np.partition(scores, scores.size - k)[scores.size - k]


def nucleus(scores: np.ndarray, top_p: float, buffer: np.ndarray | None = None) -> np.ndarray:
    """Ascending indices of the fewest most likely entries that reach `top_p`; one at least."""
    weights = _weights(scores, buffer)
    target = top_p * float(weights.sum())  # pairwise: 1e-6 off at most, and ten times as fast as in f64
    sure, edge, mass = cut(scores, weights, target)
    edge = edge[np.lexsort((edge, -scores[edge]))]
    before = mass + np.cumsum(weights[edge], dtype=np.float64) - weights[edge]  # of all that are more likely
    keep = max(int(np.count_nonzero(before < target)), 0 if sure.size else 1)
    return np.sort(np.concatenate((sure, edge[:keep])))


def typical(scores: np.ndarray, mass: float) -> np.ndarray:
    """Ascending indices of what is locally typical (arXiv 2202.00666): the entries whose surprise is nearest
    to the entropy, until they reach `mass`; equals of the last one stay in, as in transformers.

    surprise - entropy = (log total - shifted) - (log total - mean): the logarithm cancels, and with it the
    rounding that it would bring.
    """
    weights = _weights(scores, None)
    total = float(weights.sum())
    shifted = np.maximum(scores - scores.max(), np.float32(-1000))  # no weight there: 0 times a number
    mean = float(np.dot(weights, shifted)) / total
    nearness = -np.abs(shifted - np.float32(mean))
    nearness[weights == 0] = -np.inf
    _, edge, before = cut(nearness, weights, mass * total)
    edge = edge[np.argsort(-nearness[edge], kind="stable")]
    reached = before + np.cumsum(weights[edge], dtype=np.float64) >= mass * total
    last = edge[int(np.argmax(reached)) if reached[-1] else -1]
    return np.flatnonzero(nearness >= nearness[last])


def cut(keys: np.ndarray, weights: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Where entries, the largest of `keys` first, reach a total weight of `target`: the indices that come
    before in any case, those among which it happens, and the weight of the former.

    Only the second ones need sorting. The few largest keys are looked at first; where they fall short, a
    histogram of all tells.
    """
    if keys.size <= FIRST_CANDIDATES:
        return np.empty(0, np.int64), np.arange(keys.size), 0.0
    largest = np.flatnonzero(keys >= kth_largest(keys, FIRST_CANDIDATES))
    if weights[largest].sum(dtype=np.float64) >= target:
        return np.empty(0, np.int64), largest, 0.0
    high, low = keys.max(), np.min(keys, where=weights > 0, initial=keys.max())
    with np.errstate(over="ignore"):  # what is far below goes into the last bin
        depth = (high - keys) * np.float32(BINS / max(float(high - low), 1e-30))
    bins = np.minimum(depth, np.float32(BINS)).astype(np.int64)  # rounded alike: larger keys never come later
    ends = np.cumsum(np.bincount(bins, weights, BINS + 1))
    at = int(np.searchsorted(ends, min(target, ends[-1])))  # a bin with weight, rounding or not
    before = float(ends[at - 1]) if at else 0.0
    return np.flatnonzero(bins < at), np.flatnonzero(bins == at), before


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities [n] f64 from scores [n] f32, by the weights that `draw` uses."""
    weights = _weights(scores, None).astype(np.float64)
    return weights / weights.sum()


def draw(scores: np.ndarray, point: float, buffer: np.ndarray | None = None) -> int:
    """The index at `point` (0 to 1) of the cumulative softmax of `scores`: its block, then its place."""
    size = -(-scores.size // BLOCK) * BLOCK
    blocks = np.zeros(size, np.float32) if buffer is None or buffer.size != size else buffer
    weights = _weights(scores, blocks)
    sums = np.cumsum(blocks.reshape(-1, BLOCK).sum(axis=1), dtype=np.float64)
    target = point * sums[-1]
    block = first_above(sums, target)
    ends = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    return block * BLOCK + first_above(ends, target - (sums[block - 1] if block else 0.0))


def _weights(scores: np.ndarray, buffer: np.ndarray | None) -> np.ndarray:
    """exp(scores - max), at the beginning of the buffer where there is one."""
    out = None if buffer is None else buffer[: scores.size]
    weights = np.subtract(scores, scores.max(), out=out)
    return np.exp(weights, out=weights)


def first_above(ends: np.ndarray, target: float) -> int:
    """The first index whose cumulative weight exceeds `target`: an entry that has weight, rounding or not."""
    return int(np.searchsorted(ends, min(target, np.nextafter(ends[-1], 0.0)), side="right"))


def uniform(seed: int, sequence: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its three arguments."""
    key = np.array([seed, sequence], dtype=np.uint64)
    bits = int(np.random.Philox(key=key, counter=position).random_raw())
    return (bits >> 11) * 2.0**-53
