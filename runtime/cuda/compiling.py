"""Kernels compiled in several threads at once, where a launch would compile one after the other.

A first load of a model needs some fifty kernels, half a minute by one processor. What is compiled is kept by
Triton in its cache directory, for later processes too.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton import knobs


@contextmanager
def compiled_together() -> Iterator[None]:
    """Launches in the block run only where their kernels have been compiled; at its end the others are, and
    are there for the next launch. In Triton's interpreter nothing is compiled and all of them run."""
    wanted: dict[tuple[Any, str], str] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], is_manual_warmup: bool, **rest: Any) -> bool:
        if not is_manual_warmup:
            wanted[fn.jit_function, key] = compile["specialization_data"]
        return not is_manual_warmup  # whether Triton leaves it alone

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        yield
        with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
            for (function, _), specialization in wanted.items():
                function.preload(specialization)
    finally:
        knobs.runtime.jit_cache_hook = before
