"""Sampling over one row of logits, as transformers defines it: penalty, temperature, top-k, top-p, then one
draw.

The draw is counter-based: Philox keyed by (seed, sequence) with the position as counter. A token therefore
depends on its own sequence alone, and the same seed gives the same text for every batch, chunking and number
of threads.
"""

from __future__ import annotations

import numpy as np

from gristmill.runtime.decoding.greedy import most_likely
from gristmill.runtime.decoding.options import GenerationOptions

FIRST_CANDIDATES = 1024  # top-p looks at this many of the most likely tokens before it sorts them all
BLOCK = 512  # entries whose weights are summed together when one is drawn


class Workspace:
    """Buffers for a vocabulary: fresh ones of this size would be mapped, and faulted in, for every token."""

    def __init__(self, size: int):
        self.scores = np.empty(size, np.float32)
        self.weights = np.zeros(-(-size // BLOCK) * BLOCK, np.float32)


def choose(
    logits: np.ndarray,
    options: GenerationOptions,
    seen: np.ndarray,
    seed: int,
    sequence: int,
    position: int,
    workspace: Workspace | None = None,
) -> int:
    """The token after `position`: logits [V] f32; seen [n] ids that the penalty is for."""
    if options.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, options.repetition_penalty)
    best = most_likely(logits)
    if options.temperature == 0.0:
        return best
    buffers = workspace or Workspace(logits.size)
    scaled = np.subtract(logits, logits[best], out=buffers.scores)  # shifted first: no temperature overflows
    scaled /= np.float32(options.temperature)
    point = uniform(seed, sequence, position)
    if options.top_k == 0 and options.top_p == 1.0:
        return draw(scaled, point, buffers.weights)
    ids, scores = candidates(scaled, options.top_k, options.top_p, buffers.weights)
    return int(ids[draw(scores, point)])


def penalize_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """A copy of `logits` with CTRL's penalty on the ids `seen`."""
    out = logits.copy()
    out[seen] = penalize(logits[seen], penalty)
    return out


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
    total = float(weights.sum())  # pairwise: 1e-6 off at most, and ten times as fast as in f64
    top = None
    if scores.size > FIRST_CANDIDATES:
        likely = np.flatnonzero(scores >= kth_largest(scores, FIRST_CANDIDATES))
        if weights[likely].sum(dtype=np.float64) >= top_p * total:
            top = likely
    if top is None:
        top = np.arange(scores.size)
    top = top[np.lexsort((top, -weights[top]))]
    before = np.cumsum(weights[top], dtype=np.float64) - weights[top]  # mass of all that are more likely
    keep = int(np.count_nonzero(before < top_p * total))
    return np.sort(top[: max(keep, 1)])


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
    near = None
    if scores.size > FIRST_CANDIDATES:
        near = np.flatnonzero(nearness >= kth_largest(nearness, FIRST_CANDIDATES))
        if weights[near].sum(dtype=np.float64) < mass * total:
            near = None
    if near is None:
        near = np.flatnonzero(weights)
    order = near[np.argsort(-nearness[near], kind="stable")]
    reached = np.cumsum(weights[order], dtype=np.float64) >= mass * total
    last = order[int(np.argmax(reached)) if reached[-1] else -1]
    return np.flatnonzero(nearness >= nearness[last])


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
