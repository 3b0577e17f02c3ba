"""The numbers of a beam search: log-probabilities of what may follow each beam, and the best of them all.

A vocabulary times the beams is a million scores: each is passed over a few times in buffers that stay, and
none but the best is sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from gristmill.runtime.decoding.greedy import refuse_not_finite
from gristmill.runtime.decoding.sampling import kth_largest, penalize

# (log-probabilities [n, V] f32, which it may change, sequences [n, length] i32 with the prompt) -> [n, V] f32
Process = Callable[[np.ndarray, np.ndarray], np.ndarray]


class ScoreBuffers:
    """Room for `beams` rows of a vocabulary, twice: fresh pages would be faulted in at every step."""

    def __init__(self, beams: int, vocabulary: int):
        self.scores = np.empty((beams, vocabulary), np.float32)
        self.weights = np.empty((beams, vocabulary), np.float32)


def log_softmax(logits: np.ndarray, buffers: ScoreBuffers) -> np.ndarray:
    """log(softmax) of each row of `logits` [n, V] f32, in buffers.scores. Raises GristmillError for NaN."""
    count = len(logits)
    scores, weights = buffers.scores[:count], buffers.weights[:count]
    largest = logits.max(axis=1, keepdims=True)  # NaN if there is one
    if not np.isfinite(largest).all():
        refuse_not_finite(largest[~np.isfinite(largest)][0])
    np.subtract(logits, largest, out=scores)
    np.exp(scores, out=weights)
    scores -= np.log(weights.sum(axis=1, keepdims=True))
    return scores


def best_of(scores: np.ndarray, count: int) -> np.ndarray:
    """Flat indices of the `count` largest of `scores`, best first, the lower index among equals.

    Fewer where fewer are above -inf: what is banned is no candidate.
    """
    flat = scores.reshape(-1)
    least = kth_largest(flat, count) if count < flat.size else np.float32(-np.inf)
    found = np.flatnonzero(flat >= least) if np.isfinite(least) else np.flatnonzero(flat > -np.inf)
    values = flat[found]
    above = values > least
    ties = found[~above][: max(count - int(above.sum()), 0)]  # few mostly, all of a vocabulary at worst
    found = np.concatenate([found[above], ties])
    return found[np.lexsort((found, -flat[found]))][:count]


def process_of(
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    min_new_tokens: int = 0,
    eos_ids: Iterable[int] = (),
    prompt_tokens: int = 0,
) -> Process | None:
    """What changes the log-probabilities, in transformers' order; None where nothing does."""
    steps: list[Process] = []
    if repetition_penalty != 1.0:
        steps.append(lambda scores, sequences: penalize_repetition(scores, sequences, repetition_penalty))
    if no_repeat_ngram > 0:
        steps.append(lambda scores, sequences: ban_repeated(scores, sequences, no_repeat_ngram))
    if min_new_tokens > 0:
        ending, shortest = list(eos_ids), prompt_tokens + min_new_tokens
        steps.append(lambda scores, sequences: ban_ending(scores, sequences, ending, shortest))
    return _all_of(steps) if steps else None


def _all_of(steps: list[Process]) -> Process:
    def process(scores: np.ndarray, sequences: np.ndarray) -> np.ndarray:
        for step in steps:
            scores = step(scores, sequences)
        return scores

    return process


def penalize_repetition(scores: np.ndarray, sequences: np.ndarray, penalty: float) -> np.ndarray:
    """CTRL's penalty (arXiv 1909.05858) on log-probabilities, which are negative: multiplied where seen."""
    rows = np.arange(len(scores))[:, None]
    seen = scores[rows, sequences]
    scores[rows, sequences] = penalize(seen, penalty)
    return scores


def ban_repeated(scores: np.ndarray, sequences: np.ndarray, size: int) -> np.ndarray:
    """-inf for what would complete, for the second time in its sequence, the same `size` tokens in a row."""
    length = sequences.shape[1]
    if length < size:
        return scores
    grams = np.lib.stride_tricks.sliding_window_view(sequences, size, axis=1)  # [n, length - size + 1, size]
    last = sequences[:, None, length - size + 1 :]
    rows, places = np.nonzero((grams[:, :, :-1] == last).all(axis=2))
    scores[rows, grams[rows, places, -1]] = -np.inf
    return scores


def ban_ending(scores: np.ndarray, sequences: np.ndarray, eos_ids: list[int], shortest: int) -> np.ndarray:
    """-inf for the ids that end a text while a sequence is shorter than `shortest`."""
    if sequences.shape[1] < shortest:
        scores[:, [i for i in eos_ids if i < scores.shape[1]]] = -np.inf
    return scores
