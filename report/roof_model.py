"""The model of time that plans and explanations share.

    seconds = max(bytes / bandwidth, operations / peak) + overhead

Bytes and operations are those of `gristmill.runtime.profile.work`: weights and cache rows, read once, and
two operations for each multiply-add. Everything here is arithmetic on numbers; where they come from (a data
sheet, a probe, a profile) is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable


def memory_seconds(read_bytes: float, bandwidth: float) -> float:
    """Seconds to read so many bytes at ``bandwidth`` bytes per second."""
    return read_bytes / bandwidth


def compute_seconds(operations: float, peak: float) -> float:
    """Seconds for so many operations at ``peak`` operations per second."""
    return operations / peak


def ridge(bandwidth: float, peak: float) -> float:
    """Operations per byte from which on computing takes longer than reading.

    >>> ridge(bandwidth=100, peak=20000)
    200.0
    """
    return peak / bandwidth


def break_even(memory: Callable[[int], float], compute: Callable[[int], float], most: int) -> int | None:
    """The least count from 1 to ``most`` with compute(count) >= memory(count), None where there is none.

    The difference must grow with the count: both are seconds of a batch, of which computing grows faster.

    >>> break_even(lambda batch: 100, lambda batch: 7 * batch, 1000)
    15
    """
    if compute(most) < memory(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if compute(middle) >= memory(middle) else (middle + 1, high)
    return low
