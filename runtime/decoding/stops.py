"""Stop strings in a stream: text is let through only when it can no longer be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feeds text through; `stopped` is set once a stop string appeared, which is left out."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that may be shown now."""
        if self.stopped:
            return ""
        self._held += piece
        found = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._pending())

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return "" if self.stopped else self._release(len(self._held))

    def _pending(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(self._held))
        sizes = range(longest, 0, -1)
        return next((n for n in sizes if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

    def _release(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out
