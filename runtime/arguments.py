"""What callers of a session give, as arrays and numbers that are checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gristmill.runtime.errors import GristmillError


def within(name: str, value: int | None, default: int, limit: int) -> int:
    """`value`, or the default where it is None. Raises GristmillError for no integer from 1 to `limit`."""
    chosen = default if value is None else value
    if type(chosen) is not int or not 1 <= chosen <= limit:
        raise GristmillError(f"{name} is {chosen!r}, expected an integer from 1 to {limit}")
    return chosen


def int32(name: str, values: Any) -> np.ndarray:
    """[n] i32 of a list of integers. Raises GristmillError for anything else."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise GristmillError(f"{name}: expected a list of integers ({error})") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise GristmillError(
            f"{name}: got {array.dtype} of shape {list(array.shape)}, expected one list of integers"
        )
    if array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31):
        raise GristmillError(f"{name}: an entry does not fit 32 bits")
    return np.ascontiguousarray(array, dtype=np.int32)


def batch(
    tokens: Any, positions: Any, slots: Any, rows: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Arrays of a batch; all rows where none are named."""
    named = (("tokens", tokens), ("positions", positions), ("slots", slots))
    t, p, s = (int32(name, values) for name, values in named)
    return t, p, s, np.arange(len(t), dtype=np.int32) if rows is None else int32("rows", rows)


def is_batch(prompt: Any) -> bool:
    """Whether what stands for a prompt is a list of prompts."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and not isinstance(prompt[0], (int, np.integer))
