"""Prompt lookup: what followed the last few tokens when they stood earlier in the text is what may follow
now.

Lossless speculation without a second model (Saxena, "Prompt Lookup Decoding", 2023; the verification is that
of Leviathan et al., arXiv 2211.17192, with proposals that are certain): the proposed tokens run in one batch
with the last token, and each counts if it is the very token that the model's logits give at its place. Draws
depend on seed, sequence and position alone, so the text is that without speculation, greedy or sampled.
"""

from __future__ import annotations

from gristmill.runtime.decoding.pace import Acceptance

NGRAMS = (3, 2)  # the longest first


class Lookup:
    """Proposals for a growing list of tokens, which the caller owns; it is read anew at each call."""

    def __init__(self, tokens: list[int]):
        self._tokens = tokens
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in NGRAMS]  # where each n-gram last ended
        self._indexed = 0
        self.acceptance = Acceptance()

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may follow."""
        self._index()
        if most < 1:
            return []
        for size, after in zip(NGRAMS, self._after, strict=True):
            found = after.get(tuple(self._tokens[-size:]))
            if found is not None:
                return self._tokens[found : found + most]
        return []

    def _index(self) -> None:
        """Takes in all n-grams but the one at the very end, which has no token after it."""
        tokens = self._tokens
        for end in range(max(self._indexed, 1), len(tokens)):
            for size, after in zip(NGRAMS, self._after, strict=True):
                if end >= size:
                    after[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)
