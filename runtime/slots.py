"""Which sequence is where: the executor keeps keys and values at (slot, position) and nothing else, so the
lengths live here.

A row may append at the end of its slot or roll it back by naming an earlier position. Gaps, duplicates and
positions past the end are refused, so no sequence ever reads another's rows. A slot given back may say what
tokens its rows are of: a sequence that begins with the same ones, and has the same adapter, can then start
behind them.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

import numpy as np

from gristmill.runtime.errors import GristmillError

NO_ADAPTER = -1


class Slots:
    """Lengths of `max_slots` slots and who holds them. adapters: [max_slots] i32, the number of the adapter
    that a slot's rows are computed with, -1: none.

    ring: 0, or the fewest rows a cache keeps of each slot (a sliding window's holds window + max_tokens).
    reach: max_tokens, how far back a slot can roll once that ring has begun to overwrite itself.
    """

    def __init__(self, max_slots: int, max_len: int, ring: int = 0, reach: int = 0):
        self.max_slots, self.max_len = max_slots, max_len
        self.lengths = np.zeros(max_slots, np.int64)
        self.adapters = np.full(max_slots, NO_ADAPTER, np.int32)
        self._highest = np.zeros(max_slots, np.int64)  # the longest each was since it began at position 0
        self._ring, self._reach = ring, reach
        self._holders: dict[int, int] = {}  # slot -> thread that took it
        self._forwarded: set[int] = set()  # Session.forward may use or has used them
        self._kept: dict[int, Sequence[int]] = {}  # free slot -> the tokens of its rows, latest last
        self._freed = threading.Condition()

    def take(
        self,
        wait: bool = True,
        lend: bool = False,
        owner: int | None = None,
        spare: int = -1,
        adapter: int = NO_ADAPTER,
    ) -> int | None:
        """An empty slot, to be given back with `give_back`; waits for one, or returns None if not to wait.

        lend: `Session.forward` may use it. owner: the thread it is for, default this one. spare: the last
        slot to be taken for what it keeps. Raises GristmillError where waiting cannot end: no thread but this
        one holds a slot.
        """
        me = threading.get_ident()
        with self._freed:
            while (slot := self._free_slot(spare)) is None:
                if not wait:
                    return None
                self._refuse_deadlock({me})
                self._freed.wait(timeout=0.2)
            self._holders[slot] = me if owner is None else owner
            self._forget(slot, adapter)
            if lend:
                self._forwarded.add(slot)
            return slot

    def pause(self, stuck: Collection[int]) -> None:
        """Waits a moment for a slot to be freed. Raises GristmillError where no thread but this one and those
        that are `stuck` holds one."""
        with self._freed:
            if not self.free():
                self._refuse_deadlock({threading.get_ident(), *stuck})
                self._freed.wait(timeout=0.2)

    def give_back(self, slot: int, tokens: Sequence[int] = ()) -> None:
        """Frees a slot that `take` gave; its sequence is forgotten but for `tokens`, those of its first
        rows."""
        with self._freed:
            del self._holders[slot]
            self._forwarded.discard(slot)
            highest, adapter = self._highest[slot], self.adapters[slot]
            self._forget(slot)
            if len(tokens):
                self._kept[slot], self._highest[slot], self.adapters[slot] = tokens, highest, adapter
            self._freed.notify_all()

    def longest_kept(self, tokens: Sequence[int], adapter: int = NO_ADAPTER) -> tuple[int, int]:
        """The free slot that shares the most first rows with `tokens` of this adapter, and how many; -1 and 0
        where none does."""
        best = (-1, 0)
        with self._freed:
            for slot, kept in self._kept.items():
                if self.adapters[slot] != adapter:
                    continue
                length = self.reachable(slot, common_prefix(kept, tokens))
                best = (slot, length) if length > best[1] else best
        return best

    def reachable(self, slot: int, length: int) -> int:
        """`length`, or 0 where a slot's ring lacks rows that a sequence of that length attends to."""
        return length if length >= self._highest[slot] - self._reach or not self._overwritten(slot) else 0

    def take_kept(self, slot: int, length: int, owner: int) -> bool:
        """Takes a free slot with its first `length` rows; False where another took it meanwhile."""
        with self._freed:
            if self._kept.pop(slot, None) is None:
                return False
            self._holders[slot], self.lengths[slot] = owner, length
            return True

    def kept(self, slot: int) -> Sequence[int]:
        """The tokens whose rows a free slot keeps."""
        return self._kept.get(slot, ())

    def forget_adapter(self, adapter: int) -> bool:
        """Forgets what free slots keep of an adapter; False where a slot in use has it."""
        with self._freed:
            slots = np.flatnonzero(self.adapters == adapter).tolist()
            if any(slot in self._holders or slot in self._forwarded for slot in slots):
                return False
            for slot in slots:
                self._forget(slot)
            return True

    def free(self) -> int:
        """How many slots are free."""
        return self.max_slots - len(self._holders.keys() | self._forwarded)

    def rows(self) -> tuple[int, int]:
        """Rows of the cache that slots in use hold, and those that free ones keep for other prompts."""
        with self._freed:
            return int(self.lengths.sum()), sum(len(tokens) for tokens in self._kept.values())

    def copied(self, source: int, target: int, length: int) -> None:
        """Notes that `target`, just taken, got the first `length` rows of `source`."""
        self.lengths[target] = length
        self._highest[target] = self._highest[source] if self._overwritten(source) else length

    def after_fork(self) -> None:
        """In a child process: threads that held slots or the lock are not here; what they held is free."""
        self._freed = threading.Condition()
        me = threading.get_ident()
        for slot in [slot for slot, holder in self._holders.items() if holder != me]:
            self.give_back(slot)

    def reset(self, slot: int, adapter: int = NO_ADAPTER) -> None:
        """Forgets the sequence that `Session.forward` put into `slot`; the next one there has `adapter`."""
        _refuse_outside("slot", np.array([slot]), self.max_slots, "load with a larger max_slots")
        with self._freed:
            self._refuse_held(np.array([slot]))
            if slot not in self._holders:  # else it is lent, and stays so
                self._forwarded.discard(slot)
            self._forget(slot, adapter)
            if adapter != NO_ADAPTER:
                self._forwarded.add(slot)  # nobody else takes it before the first forward
            self._freed.notify_all()

    def check(
        self, positions: np.ndarray, slots: np.ndarray, held: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The slots of a batch, their first positions and lengths after it; refuses gaps and duplicates.

        positions, slots: [T] i32. `held`: the rows belong to slots that the caller took; otherwise those are
        refused.
        """
        _refuse_outside("slot", slots, self.max_slots, "load with a larger max_slots")
        _refuse_outside(
            "position", positions, self.max_len, "load with a larger max_len or start the slot anew"
        )
        ids, first, ends = (slots, positions, positions + 1) if len(slots) == 1 else _ranges(positions, slots)
        self._refuse_unreachable(ids, first)
        if not held:
            with self._freed:
                self._refuse_held(ids)
                self._forwarded.update(ids.tolist())
                for slot in self._kept.keys() & set(ids.tolist()):
                    self._forget(slot)
        return ids, first, ends

    def begin(self, ids: np.ndarray, first: np.ndarray, ends: np.ndarray) -> None:
        """Notes what a batch that fails leaves: the rows before it, and rings that it may have written."""
        self.lengths[ids] = first
        self._highest[ids] = np.maximum(self._highest[ids], ends)

    def advance(self, ids: np.ndarray, first: np.ndarray, ends: np.ndarray) -> None:
        """Notes the lengths that `check` returned."""
        self.lengths[ids] = ends
        self._highest[ids] = np.where(first == 0, ends, np.maximum(self._highest[ids], ends))

    def _refuse_unreachable(self, ids: np.ndarray, first: np.ndarray) -> None:
        for slot, position in zip(ids.tolist(), first.tolist(), strict=True):
            if position > self.lengths[slot]:
                raise GristmillError(
                    f"slot {slot} holds {self.lengths[slot]} positions, got position {position}: a gap; "
                    f"continue at {self.lengths[slot]} or before"
                )
            if self._overwritten(slot) and 0 < position < self._highest[slot] - self._reach:
                raise GristmillError(
                    f"slot {slot} cannot roll back from {self._highest[slot]} to {position}: "
                    "its sliding window has moved on; start it again at position 0"
                )

    def _overwritten(self, slot: int) -> bool:
        return bool(self._ring and self._highest[slot] > self._ring)

    def _forget(self, slot: int, adapter: int = NO_ADAPTER) -> None:
        self._kept.pop(slot, None)
        self.adapters[slot] = adapter
        self.lengths[slot] = self._highest[slot] = 0

    def _free_slot(self, spare: int) -> int | None:
        """The highest free slot, since callers of `forward` tend to count from 0; one that keeps nothing,
        else the one that has kept it longest."""
        for slot in reversed(range(self.max_slots)):
            if slot not in self._holders and slot not in self._forwarded and slot not in self._kept:
                return slot
        return next((slot for slot in self._kept if slot != spare), spare if spare in self._kept else None)

    def _refuse_deadlock(self, waiting: Collection[int]) -> None:
        if all(holder in waiting for holder in self._holders.values()):
            raise GristmillError(
                f"all {self.max_slots} slots are in use; end open streams, leave session.slot(), reset slots "
                "used by forward, or load with a larger max_slots"
            )

    def _refuse_held(self, slots: np.ndarray) -> None:
        taken = set(slots.tolist()) & self._holders.keys() - self._forwarded
        if taken:
            raise GristmillError(f"slot {min(taken)} is generating now; use another one, or session.slot()")

    def take_many(self, count: int, adapter: int = NO_ADAPTER) -> list[int]:
        """`count` empty slots at once, to be given back with `give_back_many`; waits until so many are free.

        Who waits holds none of them, so two that need several never wait for each other. Raises
        GristmillError where waiting cannot end: too few slots are free or held by other threads.
        """
        me = threading.get_ident()
        with self._freed:
            while len(free := self._free_slots()) < count:
                others = sum(holder != me for holder in self._holders.values())
                if len(free) + others < count:
                    raise GristmillError(
                        f"{count} slots are needed at once, {len(free)} of {self.max_slots} are free and "
                        f"other threads hold {others}; ask for fewer beams, end open streams, reset slots "
                        "used by forward, or load with a larger max_slots"
                    )
                self._freed.wait(timeout=1.0)
            taken = free[:count]
            self._holders.update(dict.fromkeys(taken, me))
            for slot in taken:
                self._forget(slot, adapter)
            return taken

    def give_back_many(self, slots: list[int]) -> None:
        """Frees the slots that `take_many` gave."""
        for slot in slots:
            self.give_back(slot)

    def _free_slots(self) -> list[int]:
        """Those that keep nothing first, the highest of them, then those that have kept something longest."""
        used = self._holders.keys() | self._forwarded | self._kept.keys()
        return [*(slot for slot in reversed(range(self.max_slots)) if slot not in used), *self._kept]


def _ranges(positions: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The slots of a batch, their first positions, and the ones after their last; refuses gaps and
    duplicates."""
    order = np.lexsort((positions, slots))
    p, s = positions[order], slots[order]
    begins = np.concatenate(([True], s[1:] != s[:-1]))
    steps = np.where(begins[1:], 1, p[1:] - p[:-1])
    if (steps != 1).any():
        at = int(np.argmax(steps != 1))
        problem = "comes twice" if steps[at] == 0 else f"is followed by {p[at + 1]}: a gap"
        raise GristmillError(f"position {p[at]} of slot {s[at]} {problem}; each row needs the next position")
    ids, first = s[begins], p[begins]
    ends = np.concatenate((p[:-1][begins[1:]], p[-1:])) + 1
    return ids, first, ends


def common_prefix(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """The number of first entries that are equal, of lists or of arrays."""
    most = min(len(a), len(b))
    if isinstance(a, list) and a[:most] == b[:most]:  # mostly equal, and quicker than making arrays of them
        return most
    differing = np.asarray(a[:most]) != np.asarray(b[:most])
    return int(differing.argmax()) if differing.any() else most


def _refuse_outside(name: str, values: np.ndarray, limit: int, remedy: str) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= limit:
        raise GristmillError(f"{name} {low if low < 0 else high} is outside 0 to {limit - 1}; {remedy}")
