"""Kernels compiled in several threads at once, where a launch would compile one after the other.

A first load of a model needs some fifty kernels, half a minute by one processor. What is compiled is kept by
Triton in its cache directory, for later processes too.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import triton
from triton import knobs


@contextmanager
def compiled_together() -> Iterator[None]:
    """Launches of this thread in the block run only where their kernels have been compiled; at its end the
    others are, and are there for the next launch. In Triton's interpreter nothing is compiled and all run.

    A kernel that does not compile is left to its launch, which says why.
    """
    wanted: dict[tuple[Any, str], str] = {}
    thread = threading.get_ident()

    def note(*, key: str, fn: Any, compile: dict[str, Any], is_manual_warmup: bool, **rest: Any) -> bool:
        if is_manual_warmup or threading.get_ident() != thread:
            return False
        wanted[fn.jit_function, key] = _specialization(compile)
        return True  # Triton leaves it alone

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        yield
        with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for (function, _), specialization in wanted.items():
                function.preload(specialization)
    finally:
        knobs.runtime.jit_cache_hook = before


def _specialization(compile: dict[str, Any]) -> str:
    """What Triton compiles the kernel for, as `preload` reads it, which takes a string "int8" for a type."""
    about = json.loads(compile["specialization_data"])
    about["constant_vals"] = [
        {"constexpr": value} if isinstance(value, str) else stored
        for value, stored in zip(compile["constants"].values(), about["constant_vals"], strict=True)
    ]
    return json.dumps(about)
