"""Proposals by a draft: a smaller or lower-bit artifact with the same tokens, run a few tokens ahead.

The draft chooses by the same rule and the same draw as the model itself at that place (one number of Philox
per seed, sequence and position), and a proposal counts if the model then chooses the same: the text is the
model's own, greedy or sampled, token for token, where rejection sampling (Leviathan et al., arXiv 2211.17192)
would keep its distribution only.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from gristmill.runtime.decoding.sequence import Sequence
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.slots import common_prefix

if TYPE_CHECKING:
    from gristmill.runtime.session import Session

WEIGHT = 0.2  # of a new time in the running mean


class Draft:
    """Runs `session` beside the one whose sequences it proposes for; it has the same slots to itself."""

    def __init__(self, session: Session, target: Session):
        self._session = session
        self._rows: dict[int, list[int]] = {}  # the tokens whose rows each slot holds
        self.seconds = 0.0  # of one token for every sequence, a running mean
        refuse_unfit(session, target)

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        """As many tokens as asked for after each sequence, in one forward for each place."""
        drafted: list[list[int]] = [[] for _ in asked]
        behind = [self._behind(sequence) for sequence, _ in asked]
        for place in range(max((count for _, count in asked), default=0)):
            began = time.perf_counter()
            going = [n for n, (_, count) in enumerate(asked) if count > place]
            logits = self._forward([(asked[n][0], behind[n]) for n in going])
            for n, row in zip(going, logits, strict=True):
                token = asked[n][0].guess(row, place)
                drafted[n].append(token)
                behind[n] = [token]
            if place:
                self._time(time.perf_counter() - began)
        return drafted

    def _behind(self, sequence: Sequence) -> list[int]:
        """The tokens that the draft's slot lacks; one at least, whose logits are wanted."""
        held = self._rows.get(sequence.slot, [])
        shared = common_prefix(held, sequence.tokens[:-1])
        shared = self._session._slots.reachable(sequence.slot, shared)
        self._rows[sequence.slot] = sequence.tokens[:shared]
        missing = sequence.tokens[shared:]
        chunk = self._session.max_tokens
        while len(missing) > chunk:
            self._run([(sequence.slot, missing[:chunk])], [])
            missing = missing[chunk:]
        return missing

    def _forward(self, rows: list[tuple[Sequence, list[int]]]) -> np.ndarray:
        """Logits of the last token of each, in as few forwards as hold them all."""
        out, batch, count = [], list[tuple[int, list[int]]](), 0
        for sequence, tokens in rows:
            if count + len(tokens) > self._session.max_tokens:
                out.append(self._run(batch, batch))
                batch, count = [], 0
            batch.append((sequence.slot, tokens))
            count += len(tokens)
        return np.concatenate([*out, self._run(batch, batch)])

    def _run(self, batch: list[tuple[int, list[int]]], wanted: list[tuple[int, list[int]]]) -> np.ndarray:
        counts = [len(tokens) for _, tokens in batch]
        starts = [np.arange(len(some), dtype=np.int32) + len(self._rows[slot]) for slot, some in batch]
        last = self._session.vocabulary - 1  # an id that the draft does not know spoils a guess, no more
        tokens = np.array([min(token, last) for _, some in batch for token in some], np.int32)
        slots = np.repeat(np.array([slot for slot, _ in batch], np.int32), counts)
        rows = np.cumsum(counts) - 1 if wanted else np.zeros(0)
        logits = self._session._run(tokens, np.concatenate(starts), slots, rows.astype(np.int32))
        for slot, some in batch:
            self._rows[slot] += some
        return logits

    def _time(self, seconds: float) -> None:
        self.seconds = self.seconds + WEIGHT * (seconds - self.seconds) if self.seconds else seconds


def refuse_unfit(draft: Session, target: Session) -> None:
    """Raises GristmillError where the ids of the two would not mean the same, or the slots hold less."""
    if draft.max_len < target.max_len or draft.max_slots < target.max_slots:
        raise GristmillError(
            f"the draft has max_len {draft.max_len} and {draft.max_slots} slots, "
            f"expected {target.max_len} and {target.max_slots} as the model; load both alike"
        )
    if draft.has_tokenizer and target.has_tokenizer:
        same = (
            draft.tokenizer.vocabulary() == target.tokenizer.vocabulary()
        )  # logits may be padded differently
    else:
        same = draft.vocabulary == target.vocabulary
    if not same:
        raise GristmillError(
            f"the draft's {draft.vocabulary} tokens are not the model's {target.vocabulary}; a draft must be "
            "compiled from a model with the same tokenizer"
        )
