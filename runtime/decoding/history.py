"""What penalties need to know of a sequence, kept up to date at O(1) per token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class Tally:
    """The distinct ids of a sequence and how often each came, in arrays ready to index logits with."""

    def __init__(self, ids: Sequence[int] = ()):
        distinct, counts = np.unique(np.asarray(ids, np.int64), return_counts=True)
        self._size = distinct.size
        self._ids, self._counts = distinct, counts.astype(np.float32)
        self._places = {token: place for place, token in enumerate(distinct.tolist())}

    @property
    def ids(self) -> np.ndarray:
        """[n] i64, each id once."""
        return self._ids[: self._size]

    @property
    def counts(self) -> np.ndarray:
        """[n] f32, in the order of `ids`."""
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        """Counts one more `token`."""
        place = self._places.setdefault(token, self._size)
        if place == self._size:
            self._append(token)
        self._counts[place] += 1

    def _append(self, token: int) -> None:
        if self._size == self._ids.size:
            more = max(64, self._size)
            self._ids = np.concatenate((self._ids, np.zeros(more, np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(more, np.float32)))
        self._ids[self._size] = token
        self._size += 1


class NGrams:
    """Which tokens have followed the last `size` - 1 tokens before: any of them would make an n-gram come
    twice."""

    def __init__(self, size: int, ids: Iterable[int] = ()):
        self._size = size
        self._tail: tuple[int, ...] = ()  # the last size - 1 tokens, fewer at the beginning
        self._followers: dict[tuple[int, ...], list[int]] = {}
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Takes in the next token."""
        if len(self._tail) == self._size - 1:
            self._followers.setdefault(self._tail, []).append(token)
        if self._size > 1:
            self._tail = (*self._tail, token)[1 - self._size :]

    def banned(self) -> list[int]:
        """The ids that may not come next; one can stand here more than once."""
        return self._followers.get(self._tail, [])
