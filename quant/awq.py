"""AWQ: scale the input channels that carry the output before rounding, so that their weights round finer.

arXiv 2306.00978, section 3.2: Q(W diag(s)) diag(s)^-1 x has the output of W x with errors weighted by 1 / s.
The scales are s = m^a with m the mean magnitude of each channel and a searched on a grid by output error
(eq. 4 and 5); the released search also divides by the weights' own magnitude, m^a / w^(1 - a), which is tried
too. The grid begins at a = 0, no scaling, so that the result is never worse on the rows it is judged by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gristmill.quant.grid import rounded_grid
from gristmill.quant.scheme import Scheme

EXPONENTS = tuple(i / 20 for i in range(1, 20))
DUO_EXPONENTS = tuple(i / 10 for i in range(1, 10))
CHUNK_WEIGHTS = 1 << 17  # weights rounded together: 512 KiB, what a core's cache holds
LEAST = 1e-4  # of a scale, before they are centered


def channel_scales(
    weights: Sequence[Tensor],
    schemes: Sequence[Scheme],
    x: Tensor,
    magnitude: Tensor,
    tied: Tensor | None = None,
) -> Tensor:
    """The scales s [K] f32 (all 1 where none help) for the linears ``weights`` [N_i, K] of one input.

    x: rows [S, K] f32 to judge by. magnitude: mean(|x|) [K] over the whole set. tied: [K] integers; channels
    of one number get one scale (query heads that share a value head).
    """
    best = torch.ones(len(magnitude))
    least = _error(weights, schemes, x, best)
    for candidate in _candidates(weights, schemes, magnitude.float(), tied):
        error = _error(weights, schemes, x, candidate)
        if error < least:
            best, least = candidate, error
    return best


def _candidates(
    weights: Sequence[Tensor], schemes: Sequence[Scheme], magnitude: Tensor, tied: Tensor | None
) -> Iterator[Tensor]:
    own = _weight_magnitude(weights, schemes)
    if tied is not None:
        magnitude, own = _mean_of(magnitude, tied), _mean_of(own, tied)
    for a in EXPONENTS:
        yield _centered(magnitude**a)
    for a in DUO_EXPONENTS:
        yield _centered(magnitude**a / (own ** (1 - a) + LEAST))


def _weight_magnitude(weights: Sequence[Tensor], schemes: Sequence[Scheme]) -> Tensor:
    """Mean over all outputs of |w| relative to the largest of its group [K]."""
    total = torch.zeros(weights[0].shape[1])
    for w, scheme in zip(weights, schemes, strict=True):
        k = w.shape[1]
        group = scheme.normalize(k).group_size or k
        padded = torch.nn.functional.pad(w.abs(), (0, -k % group)).view(len(w), -1, group)
        total += (padded / padded.amax(-1, keepdim=True).clamp_(min=1e-6)).view(len(w), -1)[:, :k].sum(0)
    return total / sum(len(w) for w in weights)


def _mean_of(values: Tensor, tied: Tensor) -> Tensor:
    count = int(tied.max()) + 1
    sums = torch.zeros(count).index_add_(0, tied, values)
    return (sums / torch.bincount(tied, minlength=count))[tied]


def _centered(scales: Tensor) -> Tensor:
    """Largest and smallest as far from 1 as each other."""
    scales = scales.clamp(min=LEAST)
    return scales / (scales.max() * scales.min()).sqrt()


def _error(weights: Sequence[Tensor], schemes: Sequence[Scheme], x: Tensor, scales: Tensor) -> float:
    """Squared error of all outputs over the rows x."""
    total = 0.0
    rows = max(1, CHUNK_WEIGHTS // len(scales))
    for w, scheme in zip(weights, schemes, strict=True):
        for part in w.split(rows):
            scaled = part * scales
            grid = rounded_grid(scaled, scheme)
            difference = (grid.values(grid.nearest(scaled)) / scales - part) @ x.T
            total += float(difference.square().sum(dtype=torch.float64))
    return total
