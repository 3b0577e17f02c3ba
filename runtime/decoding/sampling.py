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


def choose(
    logits: np.ndarray, options: GenerationOptions, seen: np.ndarray, seed: int, sequence: int, position: int
) -> int:
    """The token after `position`: logits [V] f32; seen [n] ids that the penalty is for."""
    if options.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, options.repetition_penalty)
    best = most_likely(logits)
    if options.temperature == 0.0:
        return best
    scaled = (logits - logits[best]) / np.float32(
        options.temperature
    )  # shifted first: no temperature overflows
    ids, scores = candidates(scaled, options.top_k, options.top_p)
    return draw(ids, scores, uniform(seed, sequence, position))


def penalize_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """CTRL's penalty (arXiv 1909.05858): positive logits of seen tokens divided, negative multiplied."""
    scores = logits[seen]
    out = logits.copy()
    out[seen] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return out


def candidates(scores: np.ndarray, top_k: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The ids that may be drawn and their scores; equals of the k-th best stay in, as in transformers."""
    ids = np.arange(scores.size)
    if 0 < top_k < scores.size:
        ids = np.flatnonzero(scores >= np.partition(scores, scores.size - top_k)[scores.size - top_k])
    scores = scores[ids]
    if top_p < 1.0:
        kept = nucleus(scores, top_p)
        ids, scores = ids[kept], scores[kept]
    return ids, scores


def nucleus(scores: np.ndarray, top_p: float) -> np.ndarray:
    """Ascending indices of the fewest most likely entries that reach `top_p`; one at least."""
    weights = np.exp(scores - scores.max())
    total = weights.sum(dtype=np.float64)
    for count in (min(FIRST_CANDIDATES, scores.size), scores.size):
        top = np.argpartition(-weights, count - 1)[:count] if count < scores.size else np.arange(count)
        top = top[np.lexsort((top, -weights[top]))]
        before = np.cumsum(weights[top], dtype=np.float64) - weights[top]  # mass of all that are more likely
        keep = int(np.count_nonzero(before < top_p * total))
        if keep < count:
            break
    return np.sort(top[: max(keep, 1)])


def draw(ids: np.ndarray, scores: np.ndarray, point: float) -> int:
    """The id at `point` (0 to 1) of the cumulative softmax of `scores`."""
    cumulative = np.cumsum(np.exp(scores - scores.max()), dtype=np.float64)
    index = int(np.searchsorted(cumulative, point * cumulative[-1], side="right"))
    return int(ids[min(index, len(ids) - 1)])


def uniform(seed: int, sequence: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its three arguments."""
    key = np.array([seed, sequence], dtype=np.uint64)
    bits = int(np.random.Philox(key=key, counter=position).random_raw())
    return (bits >> 11) * 2.0**-53
