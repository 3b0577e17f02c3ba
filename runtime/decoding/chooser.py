"""One row of logits to one token, for one sequence, in the order of transformers.generate.

Processors first: logit bias, repetition penalty, frequency and presence penalty, no-repeat n-grams, no
ending before min_new_tokens, the mask of a constraint. Then the most likely token, or temperature, top-k,
top-p, min-p, typical-p and one draw that depends on (seed, sequence, position) alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from gristmill.runtime.decoding.greedy import most_likely
from gristmill.runtime.decoding.history import NGrams, Tally
from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.decoding.sampling import (
    Workspace,
    candidates,
    draw,
    kth_largest,
    penalize,
    softmax,
    typical,
    uniform,
)
from gristmill.runtime.errors import GristmillError

HIGHEST = np.array([-np.inf, np.inf], np.float32)  # of a masked logit; looked up, it costs no branch


class Choice(NamedTuple):
    """A token, its log-probability, and the most likely ids with theirs, the likeliest first.

    Log-probabilities are those of the model: of its logits as they came, before bias, penalties, mask and
    temperature. They are None and () unless `logprobs` was asked for; top is then as long as was asked for,
    whether `token` is among it or not.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """The choices of one sequence. `choose` changes nothing; `accept` says which token was taken.

    eos_ids: what ends a text besides options.stop_ids, unless options.ignore_eos. vocabulary: length of a row
    of logits. workspace: buffers that several choosers of one thread may share. Raises GristmillError for
    token ids in the options that the vocabulary does not have.
    """

    def __init__(
        self,
        options: GenerationOptions,
        prompt_ids: Sequence[int],
        seed: int,
        sequence: int,
        eos_ids: Iterable[int],
        vocabulary: int,
        workspace: Workspace | None = None,
    ):
        _refuse_unknown_ids(options, vocabulary)
        self.options, self.vocabulary = options, vocabulary
        self.ends = frozenset(options.stop_ids) | (frozenset() if options.ignore_eos else frozenset(eos_ids))
        self._seed, self._sequence = seed, sequence
        self._workspace = workspace
        self._accepted = 0
        self._bias_ids = np.array([token for token, _ in options.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in options.logit_bias], np.float32)
        self._end_ids = np.array(sorted(token for token in self.ends if token < vocabulary), np.int64)
        ids = [token for token in prompt_ids if token < vocabulary]  # an embedding may have more rows
        self._seen = Tally(ids) if options.repetition_penalty != 1.0 else None
        counted = options.presence_penalty != 0.0 or options.frequency_penalty != 0.0
        self._generated = Tally() if counted else None
        self._ngrams = NGrams(options.no_repeat_ngram, prompt_ids) if options.no_repeat_ngram else None
        self._always = bool(self._bias.size or self._seen or self._generated or self._ngrams)

    def choose(self, logits: np.ndarray, position: int, mask: np.ndarray | None = None) -> Choice:
        """The token after `position`. logits [V] f32; mask [V] bool, True where a token may come.

        Raises GristmillError where a logit is NaN or infinite, and where nothing is left to choose.
        """
        best = most_likely(logits)  # of the row as it came: a mask does not hide that a model is broken
        token = self._pick(logits, best, position, mask)
        if self.options.logprobs is None:
            return Choice(token)
        total = float(logits[best]) + math.log(float(self._exp(logits, best).sum()))
        top = most_likely_ids(logits, self.options.logprobs)
        return Choice(token, float(logits[token]) - total, tuple((i, float(logits[i]) - total) for i in top))

    def token(self, logits: np.ndarray, position: int) -> int:
        """What `choose` takes without a mask, and no log-probabilities."""
        return self._pick(logits, most_likely(logits), position, None)

    def accept(self, token: int) -> None:
        """Notes that `token` was taken, whoever chose it."""
        self._accepted += 1
        for history in (self._seen, self._generated, self._ngrams):
            if history is not None:
                history.add(token)

    def distribution(
        self, logits: np.ndarray, position: int, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `choose` draws from: ids [n] i64 ascending, those that can come; their probabilities [n] f64.

        It does not depend on `position`, which is taken so that it can stand for `choose`. Greedy gives one
        id.
        """
        best = most_likely(logits)
        scores, best = self._processed(logits, best, mask)
        if self.options.temperature == 0.0:
            return np.array([best]), np.ones(1)
        ids, scores = self._support(scores, best)
        probabilities = softmax(scores)
        possible = np.flatnonzero(probabilities)
        return possible if ids is None else ids[possible], probabilities[possible]

    def process(self, logits: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """The logits [V] f32 that the processors leave, -inf for what may not come: those given, or a buffer
        that lasts until the next call."""
        return self._processed(logits, most_likely(logits), mask)[0]

    def _pick(self, logits: np.ndarray, best: int, position: int, mask: np.ndarray | None) -> int:
        scores, best = self._processed(logits, best, mask)
        if self.options.temperature == 0.0:
            return best
        ids, scores = self._support(scores, best)
        point = uniform(self._seed, self._sequence, position)
        if ids is None:
            return draw(scores, point, self._buffers.weights)
        return int(ids[draw(scores, point)])

    def _processed(self, logits: np.ndarray, best: int, mask: np.ndarray | None) -> tuple[np.ndarray, int]:
        """The processed logits and the best id of them; `best` is that of `logits`."""
        assert logits.size == self.vocabulary, f"{logits.size} logits, a vocabulary of {self.vocabulary}"
        too_short = self._accepted < self.options.min_new_tokens
        if mask is None and not self._always and not too_short:
            return logits, best
        scores = self._buffers.scores
        np.copyto(scores, logits)
        with np.errstate(over="ignore", invalid="ignore"):  # refused below, in words
            self._penalize(scores)
        if self._ngrams is not None:
            scores[[token for token in self._ngrams.banned() if token < self.vocabulary]] = -np.inf
        if too_short:
            scores[self._end_ids] = -np.inf
        if mask is not None:
            assert mask.shape == logits.shape, f"a mask of {mask.shape} for logits of {logits.shape}"
            np.minimum(scores, HIGHEST.take(mask.view(np.uint8)), out=scores)
        best = int(np.argmax(scores))
        if not np.isfinite(scores[best]):
            self._refuse(float(scores[best]))
        return scores, best

    def _penalize(self, scores: np.ndarray) -> None:
        if self._bias.size:
            scores[self._bias_ids] += self._bias
        if self._seen is not None:
            ids = self._seen.ids
            scores[ids] = penalize(scores[ids], self.options.repetition_penalty)
        if self._generated is not None:
            ids, frequency = self._generated.ids, np.float32(self.options.frequency_penalty)
            scores[ids] -= frequency * self._generated.counts
            scores[ids] -= np.float32(self.options.presence_penalty)

    def _support(self, scores: np.ndarray, best: int) -> tuple[np.ndarray | None, np.ndarray]:
        """The ids that may be drawn, None for all, and their scores over the temperature, the best one 0."""
        options, buffers = self.options, self._buffers
        scores = np.subtract(scores, scores[best], out=buffers.scores)  # shifted first: none overflows
        scores /= np.float32(options.temperature)
        ids = None
        if options.top_k or options.top_p < 1.0:
            ids, scores = candidates(scores, options.top_k, options.top_p, buffers.weights)
        if options.min_p > 0.0:
            kept = np.flatnonzero(scores >= np.float32(math.log(options.min_p)))
            ids, scores = kept if ids is None else ids[kept], scores[kept]
        if options.typical_p < 1.0:
            kept = typical(scores, options.typical_p)
            ids, scores = kept if ids is None else ids[kept], scores[kept]
        return ids, scores

    def _exp(self, logits: np.ndarray, best: int) -> np.ndarray:
        weights = np.subtract(logits, logits[best], out=self._buffers.weights[: logits.size])
        return np.exp(weights, out=weights)

    @property
    def _buffers(self) -> Workspace:
        if self._workspace is None:
            self._workspace = Workspace(self.vocabulary)
        return self._workspace

    def _refuse(self, best: float) -> None:
        if best != -math.inf:
            raise GristmillError(
                f"bias and penalties made {best} of a logit; expected smaller ones, see logit_bias and "
                "repetition_penalty"
            )
        raise GristmillError(
            "no token is left to choose: what the constraint, logit_bias, no_repeat_ngram and min_new_tokens "
            "allow excludes each other; allow more"
        )


def most_likely_ids(logits: np.ndarray, count: int) -> list[int]:
    """The `count` ids with the largest of `logits` [V] f32, the largest first, of equals the lowest id."""
    if count == 0:
        return []
    whole = count >= logits.size
    ids = np.arange(logits.size) if whole else np.flatnonzero(logits >= kth_largest(logits, count))
    order = np.lexsort((ids, -logits[ids]))
    return ids[order[:count]].tolist()


def _refuse_unknown_ids(options: GenerationOptions, vocabulary: int) -> None:
    biased = [token for token, _ in options.logit_bias]
    for name, ids in (("stop_ids", options.stop_ids), ("logit_bias", biased)):
        for token in ids:
            if token >= vocabulary:
                raise GristmillError(
                    f"{name} names token {token}, expected an id of this model, from 0 to {vocabulary - 1}"
                )
