"""Which columns of a value each rank holds, and how heads and units of columns are shared out."""

from __future__ import annotations

from dataclasses import dataclass

from gristmill.runtime.program import View

Span = tuple[int, int]  # columns [start, stop)


@dataclass(frozen=True)
class Parts:
    """owned: of each rank the columns of the whole value that it holds, ascending; a rank's own value has
    them one after the other."""

    owned: tuple[tuple[Span, ...], ...]

    def width(self, rank: int) -> int:
        return sum(stop - start for start, stop in self.owned[rank])

    def within(self, rank: int, view: View) -> list[Span]:
        """The columns of ``view`` that the rank holds, counted from the view's first."""
        cut = [(max(a, view.column), min(b, view.column + view.width)) for a, b in self.owned[rank]]
        return [(a - view.column, b - view.column) for a, b in cut if a < b]

    def local(self, rank: int, view: View) -> View:
        """Where those lie in the rank's own value."""
        before = sum(min(b, view.column) - a for a, b in self.owned[rank] if a < view.column)
        return View(view.value, before, sum(b - a for a, b in self.within(rank, view)))


def even(width: int, world: int, unit: int = 1, first: int = 0) -> tuple[tuple[Span, ...], ...] | None:
    """``width`` columns from ``first`` on, shared out in whole units (the last may be short); None where a
    rank would have none."""
    units = -(-width // unit)
    if units < world:
        return None
    borders = [first + min(width, units * rank // world * unit) for rank in range(world + 1)]
    return tuple(((a, b),) for a, b in zip(borders, borders[1:], strict=False))


@dataclass(frozen=True)
class Heads:
    """A rank's query heads, and the heads of keys and values that they read."""

    queries: Span
    keys: Span

    @staticmethod
    def fit(heads: int, kv_heads: int, world: int) -> bool:
        """Whether every rank gets as many query heads, with whole heads of keys and values: these are shared
        out, or where they are fewer than the ranks each is held by as many ranks as any other."""
        return heads % world == 0 and (kv_heads % world == 0 or world % kv_heads == 0)

    @staticmethod
    def of(heads: int, kv_heads: int, rank: int, world: int) -> Heads:
        queries = (heads * rank // world, heads * (rank + 1) // world)
        first = kv_heads * rank // world
        return Heads(queries, (first, first + max(1, kv_heads // world)))
