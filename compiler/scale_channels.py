"""AWQ over a graph: where a linear's input channels can be scaled for nothing, and the search that does it.

A scale s on the input channels of a linear (its weight columns times s) is undone for nothing where whatever
made the input can be divided by s: the weight of a norm, the value rows before attention, the up rows of a
gated pair, the rows of a linear without a curved activation. The places are found in the graph. The function
that the graph computes stays the same, so that the walk over the calibration set sees the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from ..passes.graph import Lazy, Traced, arguments, aten, is_op, ours, shape
from ..quant.awq import channel_scales
from ..quant.gptq import DAMPING, Plan, gptq
from ..quant.grid import rounded_grid
from ..quant.hessian import Moments, row_errors
from ..quant.scheme import Scheme
from .walk import Walk

SEARCH_ROWS = 512  # rows of the calibration set that candidates are judged by
LEAST_GAIN = 0.95  # GPTQ makes up for most of what scaling gains; less than this is chance
LINEAR_ACTIVATIONS = ("none", "relu")  # f(x / s) = f(x) / s for s > 0
NORMS = (ours.rms_norm.default, ours.layer_norm.default)

Schemes = Callable[[str], Scheme | None]  # placeholder of a matrix -> its integer scheme, None: not quantized
Factors = dict[str, Tensor]  # "placeholder" of a vector, "placeholder.rows", "placeholder.columns" -> factor


@dataclass
class Site:
    """A tensor whose channels can be scaled.

    consumers: the linears that read it. producers: (placeholder, first row, end row, first channel): the rows
    of a weight (the elements of a vector) that channels from the first one on come from. tied: [K] producing
    channel of each input channel, None where it is the same.
    """

    consumers: list[fx.Node]
    producers: list[tuple[fx.Node, int, int, int]] = field(default_factory=list)
    tied: Tensor | None = None


def find_site(traced: Traced, linear: fx.Node) -> Site | None:
    """The site at a linear's input, None where its channels cannot be scaled; at the first consumer only."""
    x = arguments(linear)["x"]
    consumers = list(x.users)
    if not all(is_op(n, ours.linear.default) and arguments(n)["x"] is x for n in consumers):
        return None
    if consumers[0] is not linear or any(_is_residual(x, n) for n in consumers):
        return None
    if not all(_owned(traced, w, n) for n in consumers for w in arguments(n)["weights"]):
        return None  # a head that is the embedding as well, say
    if is_op(x, *NORMS):
        return _norm_site(traced, x, consumers)
    if is_op(x, ours.attention.default):
        return _value_site(traced, x, consumers)
    if is_op(x, ours.linear.default):
        return _linear_site(traced, x, consumers)
    return None


def _is_residual(x: fx.Node, linear: fx.Node) -> bool:
    return arguments(linear)["residual"] is x


def _owned(traced: Traced, node: fx.Node | None, user: fx.Node) -> bool:
    """Whether a placeholder is a float weight that nothing else uses."""
    if node is None:
        return True
    lazy = traced.weight(node)
    return lazy is not None and is_float(lazy) and list(node.users) == [user]


def _norm_site(traced: Traced, norm: fx.Node, consumers: list[fx.Node]) -> Site | None:
    a = arguments(norm)
    vectors = [v for v in (a["weight"], a.get("bias")) if v is not None]
    if a["weight"] is None or a["residual"] is not None or not all(_owned(traced, v, norm) for v in vectors):
        return None
    width = shape(norm)[-1]
    return Site(consumers, [(v, 0, width, 0) for v in vectors])


def _value_site(traced: Traced, attention: fx.Node, consumers: list[fx.Node]) -> Site | None:
    a = arguments(attention)
    v, start, stop = _columns_of(a["v"])
    uses = [n for n in a["v"].users if n is not attention]
    if uses or not _scalable(traced, v) or arguments(v)["activation"] != "none" or a["v"] in (a["q"], a["k"]):
        return None
    if v is a["v"] and len(v.users) > 1:
        return None
    producers = _rows_of(traced, v, start, stop)
    width, heads = (stop - start) // a["kv_heads"], a["heads"]
    channel = torch.arange(heads * width)
    tied = channel // width // (heads // a["kv_heads"]) * width + channel % width
    return Site(consumers, producers, tied if heads != a["kv_heads"] else None)


def _linear_site(traced: Traced, linear: fx.Node, consumers: list[fx.Node]) -> Site | None:
    a = arguments(linear)
    if not _scalable(traced, linear) or not (a["glu"] or a["activation"] in LINEAR_ACTIVATIONS):
        return None
    width = shape(linear)[-1]
    first = width if a["glu"] else 0  # the up half follows the gate
    producers = _rows_of(traced, linear, first, first + width)
    return Site(consumers, producers)


def _scalable(traced: Traced, node: fx.Node) -> bool:
    """A linear whose output rows can be divided: nothing is added or bent after it."""
    if not is_op(node, ours.linear.default):
        return False
    a = arguments(node)
    parts = [*a["weights"], *(b for b in a["biases"] if b is not None)]
    return a["residual"] is None and not a["softcap"] and all(_owned(traced, p, node) for p in parts)


def _columns_of(node: fx.Node) -> tuple[fx.Node, int, int]:
    """A value as columns [start, stop) of what it is sliced from."""
    width = shape(node)[-1]
    if not is_op(node, aten.slice.Tensor):
        return node, 0, width
    a = arguments(node)
    return a["self"], int(a["start"] or 0), int(a["start"] or 0) + width


def _rows_of(traced: Traced, linear: fx.Node, start: int, stop: int) -> list[tuple[fx.Node, int, int, int]]:
    """The parts of a linear's weights and biases that its output columns [start, stop) come from."""
    a = arguments(linear)
    parts, offset = [], 0
    for weight, bias in zip(a["weights"], a["biases"], strict=True):
        n = traced.weights[weight.name].shape[0]
        first, end = max(start, offset), min(stop, offset + n)
        if first < end:
            parts += [
                (p, first - offset, end - offset, first - start) for p in (weight, bias) if p is not None
            ]
        offset += n
    return parts


def search(walk: Walk, site: Site, schemes: Schemes, by_gptq: bool) -> Factors:
    """Search the scales of a site and divide the values at hand by them; returns the factors to apply.

    by_gptq: the scales are for GPTQ, and kept where its output error is smaller with them than without.
    """
    traced, x = walk.traced, arguments(site.consumers[0])["x"]
    names = [w.name for n in site.consumers for w in arguments(n)["weights"]]
    chosen = [(n, s) for n in names if (s := schemes(n)) is not None]
    if not chosen:
        return {}
    values = walk.values[x]
    scales = channel_scales(
        [traced.weights[n].load() for n, _ in chosen], [s for _, s in chosen], sample_rows(values),
        _mean_magnitude(values), site.tied,
    )  # fmt: skip
    if bool((scales == 1).all()) or (by_gptq and not _gain_by_gptq(traced, chosen, values, scales)):
        return {}
    walk.values[x] = [part / scales for part in values]
    return dict(_factors(traced, site, names, scales))


def _gain_by_gptq(
    traced: Traced, chosen: list[tuple[str, Scheme]], values: list[Tensor], scales: Tensor
) -> bool:
    """Whether GPTQ of the scaled matrices leaves less error than of those there are."""
    moments = Moments(len(scales))
    for part in values:
        moments.add(part[0])
    h = moments.hessian()
    ones = torch.ones_like(scales)
    with_scales, without = (_gptq_error(traced, chosen, h, s) for s in (scales, ones))
    return with_scales < LEAST_GAIN * without


def _gptq_error(traced: Traced, chosen: list[tuple[str, Scheme]], h: Tensor, scales: Tensor) -> float:
    """Squared output error of plain GPTQ on W diag(s), whose inputs are divided by s."""
    inverse = 1 / scales.double()
    plan = Plan.of(h * inverse[:, None] * inverse, damping=DAMPING)
    error = 0.0
    for name, scheme in chosen:
        w = traced.weights[name].load()
        scaled = w * scales
        grid = rounded_grid(scaled, scheme)
        difference = grid.values(gptq(scaled, plan, grid)) / scales - w
        error += float(row_errors(difference, h.float()).sum(dtype=torch.float64))
    return error


def _factors(traced: Traced, site: Site, names: list[str], scales: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield f"{name}.columns", scales
    channels = scales if site.tied is None else _first_of_each(scales, site.tied)
    for node, first, end, channel in site.producers:
        factor = torch.ones(traced.weights[node.name].shape[0])
        factor[first:end] = 1 / channels[channel : channel + end - first]
        yield f"{node.name}.rows", factor


def _first_of_each(scales: Tensor, tied: Tensor) -> Tensor:
    out = torch.ones(int(tied.max()) + 1)
    out[tied] = scales
    return out


def sample_rows(values: list[Tensor], count: int = SEARCH_ROWS) -> Tensor:
    """About ``count`` rows [S, K], evenly spaced over a value's chunks [1, T_i, K]."""
    step = max(1, sum(v.shape[1] for v in values) // count)
    return torch.cat([v[0, ::step] for v in values])


def _mean_magnitude(values: list[Tensor]) -> Tensor:
    rows = sum(v.shape[1] for v in values)
    return torch.stack([v[0].abs().sum(0, dtype=torch.float64) for v in values]).sum(0) / rows


def apply(traced: Traced, factors: Mapping[str, Tensor]) -> None:
    """Multiply weights by factors when they are loaded, in the graph and in what was lowered from it."""
    for key, factor in factors.items():
        name, _, side = key.rpartition(".")
        lazy = traced.weights[name]
        lazy.load = _scaled(
            lazy.load, factor if side == "columns" or len(lazy.shape) == 1 else factor[:, None]
        )


def stored(names: Mapping[str, str], factors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """The factors of matrices as an artifact holds them; names: of a matrix's placeholder -> stored."""
    sides = {"columns": "input_scale", "rows": "output_scale"}
    split = [(*key.rpartition("."), factor) for key, factor in factors.items()]
    return {
        f"{names[name]}.{sides[side]}": factor.numpy().astype(np.float32)
        for name, _, side, factor in split
        if name in names
    }


def _scaled(load: Callable[[], Tensor], factor: Tensor) -> Callable[[], Tensor]:
    return lambda: load() * factor


def is_float(lazy: Lazy) -> bool:
    """Whether the checkpoint holds the weight unquantized: others are stored as they came."""
    return lazy.quantized is None
