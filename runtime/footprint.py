"""What a program will take of this machine's memory, known before anything is mapped or allocated."""

from __future__ import annotations

from dataclasses import asdict

from gristmill.runtime import machine
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import CACHE_TILE, CACHE_TYPES, CacheSpec, Program

_SANE = 2**31  # the executor's own limits are tighter; this keeps the arithmetic here honest


def refuse_malformed(program: Program) -> None:
    """Raises GristmillError where limits or caches are no counts; the executor checks the rest."""
    numbers = {f"limits.{key}": value for key, value in asdict(program.limits).items()}
    for index, cache in enumerate(program.caches):
        sizes = ("kv_heads", "k_dim", "v_dim", "window")
        numbers |= {f"caches[{index}].{key}": getattr(cache, key) for key in sizes}
        for name in ("k_dtype", "v_dtype"):
            dtype = getattr(cache, name)
            if dtype not in CACHE_TYPES:
                raise GristmillError(
                    f"program.json: caches[{index}].{name} is {dtype!r}; compile the model again"
                )
    for name, value in numbers.items():
        least = 0 if name.endswith("window") else 1
        if type(value) is not int or not least <= value < _SANE:
            raise GristmillError(
                f"program.json: {name} is {value!r}, expected a count; compile the model again"
            )


def kv_rows(cache: CacheSpec, max_len: int, max_tokens: int) -> int:
    """Positions that one slot of `cache` holds: all, or a sliding window's ring."""
    return min(max_len, cache.window + max_tokens) if cache.window else max_len


def kv_bytes(program: Program, max_len: int, max_slots: int) -> int:
    """Bytes of all caches for `max_slots` slots of `max_len` positions, in whole tiles of rows."""
    rows = [-(-kv_rows(c, max_len, program.limits.max_tokens) // CACHE_TILE) for c in program.caches]
    tiles = zip(program.caches, rows, strict=True)
    return max_slots * sum(cache.row_bytes() * CACHE_TILE * count for cache, count in tiles)


def smallest_ring(program: Program, max_len: int) -> int:
    """The fewest rows a windowed cache keeps of a slot, or 0 where every cache keeps all."""
    rows = [kv_rows(cache, max_len, program.limits.max_tokens) for cache in program.caches]
    return min((n for n in rows if n < max_len), default=0)


def refuse_too_large(
    program: Program, max_len: int, max_slots: int, copied: int = 0, ranks: int = 1
) -> None:
    """Raises GristmillError where caches, the buffers of each rank and ``copied`` bytes of weights do not fit
    into the memory that is free."""
    needed = kv_bytes(program, max_len, max_slots) + ranks * program.arena_bytes
    available = machine.available_memory_bytes()
    if available is not None and needed <= available < needed + copied:
        what, option = ("in huge pages", "hugepages") if ranks == 1 else ("cut for ranks", "tensor_parallel")
        raise GristmillError(
            f"a copy of the weights {what} needs {(needed + copied) >> 20} MiB with the caches, "
            f"{available >> 20} are free; load without {option}"
        )
    if available is not None and needed > available:
        raise GristmillError(
            f"{max_slots} slots of {max_len} positions need {needed >> 20} MiB, {available >> 20} are free; "
            "load with a smaller max_len or max_slots"
        )
