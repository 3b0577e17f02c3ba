"""How attention is cut up into programs, tiles and splits: what is chosen, and what may be faster."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton

from .attention_warps import by_warps
from .cache import LayerCache
from .splits import SPLIT

REGISTERS = 65536  # of a processor of an sm_90
# columns, warps, resident programs and tiles ahead where warps go by themselves, by whether all is bytes
WARP_SHAPES = {
    True: ((128, 8, 2, 0), (64, 4, 3, 1), (64, 4, 4, 0), (64, 4, 3, 0), (128, 4, 2, 0)),
    False: ((64, 4, 3, 0), (64, 4, 3, 1), (128, 8, 1, 0), (128, 4, 2, 0)),
}


@dataclass(frozen=True)
class Tiling:
    """How an attention is cut up; what it computes depends on it in rounding alone.

    rows: most query rows of a block, a power of two; columns: positions of a tile, a power of two up to 256;
    splits: most splits of the context, 1 or a power of two (at least 4 with a window); warps: of a program;
    stages: tiles that are under way; parts: 0, or as many as there are warps where these go through the tiles
    by themselves (attention_warps.py); resident: programs of up to 8 queries that a processor then holds;
    ahead: tiles that are then asked for in the L2 cache before they are loaded.
    """

    rows: int
    columns: int
    splits: int
    warps: int
    stages: int
    parts: int = 0
    resident: int = 0
    ahead: int = 0

    def registers(self, queries: int) -> int | None:
        """Of a thread at most, so that a processor holds as many programs as it should; None as ptxas likes.

        Of warps that share tiles, two programs of 8; with the 80 registers that would do for three of f16,
        norms and groups of 16 heads are spilled.
        """
        if self.parts and queries == 8:  # more queries take what they need
            return min(255, REGISTERS // (32 * self.warps * self.resident) // 8 * 8)
        return 128 if not self.parts and queries == 16 and self.warps == 8 else None


def tiling(cache: LayerCache, heads: int, rows: int, blocks: int, processors: int = 132) -> Tiling:
    """The first of `tilings`."""
    return tilings(cache, heads, rows, blocks, processors)[0]


def tilings(
    cache: LayerCache, heads: int, rows: int, blocks: int, processors: int = 132
) -> list[Tiling]:
    """Those that are worth a measurement, the one first that should be fastest.

    They are for launches of up to ``blocks`` blocks that should hold up to ``rows`` rows each. A block gets
    as many rows as fit into a tile of 16 queries, which tensor cores take at least, or where more rows are
    asked for, of 128.
    """
    group = heads // cache.kv_heads
    wide = max(cache.k.dim, cache.v.dim) > 128
    floats = "f32" in (cache.k.dtype, cache.v.dtype)  # multiplied without tensor cores
    most = 16 if rows * group <= 16 or floats else 64 if wide else 128
    block_rows = 1
    while 2 * block_rows * group <= most and block_rows < rows:
        block_rows *= 2
    queries = max(16, triton.next_power_of_2(block_rows * group))
    shared = _shared_tiling(cache, block_rows, queries, blocks * cache.kv_heads, wide, floats, processors)
    if queries > 16 or not all(by_warps(part.dtype, part.dim) for part in (cache.k, cache.v)):
        return [shared]
    return [*_tilings_by_warps(cache, block_rows, blocks, processors), shared]


def _shared_tiling(
    cache: LayerCache, block_rows: int, queries: int, programs: int, wide: bool, floats: bool,
    processors: int,
) -> Tiling:  # fmt: skip
    """For warps that share tiles. Splits give each processor four programs if there are not enough blocks."""
    splits = 1
    while splits < _most_splits(cache) and programs * splits < 4 * processors:
        splits *= 2
    splits = _with_ends(cache, splits)
    # smaller tiles where a thread's registers would not hold the scores and what scales them
    columns = 16 if floats else 32 if wide or (queries > 64 and cache.k.scales is not None) else 64
    if queries == 16 and not wide and not floats:
        return Tiling(block_rows, columns, splits, 8, 3)
    warps = 8 if queries > 64 or (wide and queries > 16) or floats else 4
    return Tiling(block_rows, columns, splits, warps, 2)


def _tilings_by_warps(
    cache: LayerCache, block_rows: int, blocks: int, processors: int
) -> list[Tiling]:  # fmt: skip
    """For warps that go through tiles by themselves: WARP_SHAPES with splits that fill the device.

    That is as blocks of one row each, and as few blocks of many rows, which take up a processor each.
    """
    bytes_only = "f16" not in (cache.k.dtype, cache.v.dtype)
    most, few = blocks * cache.kv_heads, -(-blocks // block_rows) * cache.kv_heads
    found = []
    for columns, warps, resident, ahead in WARP_SHAPES[bytes_only]:
        loads = (most / (resident * processors), few / processors)
        splits = _with_ends(cache, _balanced(loads, _most_splits(cache)))
        found.append(Tiling(block_rows, columns, splits, warps, 1, warps, resident, ahead))
    return found


def _most_splits(cache: LayerCache) -> int:
    """Of a ring of which the shortest splits hold SPLIT positions."""
    return min(64, triton.next_power_of_2(-(-cache.ring // SPLIT.value)))


def _with_ends(cache: LayerCache, splits: int) -> int:
    return 4 if cache.window and splits == 2 else splits


def _balanced(loads: tuple[float, ...], most: int) -> int:
    """The fewest splits, up to ``most``, with which about as much of the device is busy as with any.

    loads: rounds of programs that the device would do, for one split.
    """

    def busy(splits: int) -> float:
        return min(load * splits / math.ceil(load * splits) for load in loads)

    choices = [1 << i for i in range(most.bit_length())]
    enough = 0.95 * max(map(busy, choices))
    return next(splits for splits in choices if busy(splits) >= enough)
