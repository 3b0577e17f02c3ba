"""Times of products of known shapes -> what a row, a weight and a launch take of them.

As many unknowns as times; noise may ask for what cannot be (a row that takes less than nothing), so every
fit has bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_REACHED = 1.25  # of the stream: it has a kernel of its own, which others may outdo a little


def fit_rows(
    sizes: Sequence[int], rows: Sequence[int], times: Sequence[float], stream: float
) -> tuple[float, float]:
    """The share of a stream and the seconds for each row that explain two times: t = bytes / (share * stream)
    + rows * row, with a share of at most MOST_REACHED and no row below 0.

    >>> fit_rows((1000, 1000), (10, 2), (30.0, 14.0), stream=100.0)
    (1.0, 2.0)
    """
    determinant = sizes[0] * rows[1] - sizes[1] * rows[0]
    per_byte = (times[0] * rows[1] - times[1] * rows[0]) / determinant
    row = (sizes[0] * times[1] - sizes[1] * times[0]) / determinant
    if row < 0:
        per_byte, row = sum(times) / sum(sizes), 0.0
    if per_byte * stream * MOST_REACHED < 1:
        per_byte = 1 / (stream * MOST_REACHED)
        row = max(0.0, (sum(times) - sum(sizes) * per_byte) / sum(rows))
    return min(MOST_REACHED, 1 / (per_byte * stream)), row


def fit_shapes(shapes: Sequence[tuple[int, int]], times: Sequence[float]) -> tuple[float, float, float]:
    """(launch, row, weight) of three times: t = launch + n * row + n * k * weight, the first two shapes with
    the same k. None is below 0: what a time cannot be explained by is left out, a weight never.

    >>> fit_shapes(((2, 4), (4, 4), (2, 8)), (1 + 2 * 3 + 8, 1 + 4 * 3 + 16, 1 + 2 * 3 + 16))
    (1.0, 3.0, 1.0)
    """
    (n0, k0), (n1, _), (n2, k2) = shapes
    each = (times[1] - times[0]) / (n1 - n0)  # of a row with its k0 weights
    launch = min(max(0.0, times[0] - n0 * each), 0.9 * min(times))
    longer = (times[2] - launch) / n2
    weight = max(longer - each, 0.0) / (k2 - k0)
    if weight * k2 < 0.5 * longer or weight * k0 > each:  # rows that cost nothing, or nearly everything
        return launch, 0.0, longer / k2
    return launch, each - k0 * weight, weight
