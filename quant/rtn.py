"""Round to nearest: each group of columns gets a scale (and a zero point), each weight its nearest level.

The scale is first rounded to the type it is stored in, so the integers are the nearest ones for the scale
that the kernels will use. Pure functions over f32 arrays, none of which looks at more than one row's group
at a time: any split of the rows gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.quant import e4m3
from gristmill.quant.scheme import Format, Scheme

Array = NDArray[Any]
F32 = NDArray[np.float32]

# An f16 scale below this is so deep among the subnormals that its rounding could move the largest int8
# weight by half a step (127 * 2**-9 / 2 < 0.5): a tensor with such a group keeps f32 scales.
SMALLEST_F16_SCALE = 2.0**-16
LARGEST_F16_SCALE = 65504.0


@dataclass(frozen=True)
class Quantized:
    """Integers and what they mean: w = scale * (q - zero), zero being the format's zero point when None.

    q: [N, K] uint8 (int4: 0..15, int3: 0..7, int2: 0..3) or int8; scale: [N, G] f16 or f32; zero: [N, G] of
    q's dtype, or None. In a scaled float format q holds the floats' bits, and w = scale * float(q).
    """

    q: Array
    scale: Array
    zero: Array | None


def quantize(w: F32, scheme: Scheme) -> Quantized:
    """Round w [N, K] to the nearest levels of a scheme with scales; they are f16 if they fit, else f32."""
    quantized = quantize_rows(w, scheme, np.float16)
    return quantized if scales_fit(quantized.scale) else quantize_rows(w, scheme, np.float32)


def quantize_rows(w: F32, scheme: Scheme, scale_dtype: type) -> Quantized:
    """`quantize` with scales of the given type: meaningful only where `scales_fit` then says so."""
    numbers = scheme.numbers
    groups = grouped(w, scheme.normalize(w.shape[1]).group_size)
    with np.errstate(all="ignore"):  # a scale that f16 cannot hold is 0 or infinite here
        if not numbers.integer:
            return _round_to_floats(groups, w.shape[1], numbers, scale_dtype)
        scale, zero = group_scales(groups, scheme, scale_dtype)
        q = round_to_levels(groups, scale.astype(np.float32), zero, numbers)
        q = q.reshape(len(w), -1)[:, : w.shape[1]].astype(numbers.dtype)
        return Quantized(q, scale, None if scheme.symmetric else zero.astype(numbers.dtype))


def scales_fit(scale: Array) -> bool:
    """Whether stored scales kept the precision that the integers need; f32 always does."""
    size = np.abs(scale)
    low, high = (SMALLEST_F16_SCALE, LARGEST_F16_SCALE) if scale.dtype == np.float16 else (0, np.inf)
    return bool((size.min(initial=1) >= low) and (size.max(initial=1) <= high))


def dequantize(quantized: Quantized, scheme: Scheme) -> F32:
    """The weights [N, K] that a kernel sees: f32(scale) * (q - zero), or f32(scale) * float(q)."""
    n, k = quantized.q.shape
    levels = quantized.q.astype(np.float32) if scheme.is_integer else e4m3.decode(quantized.q)
    q = grouped(levels, scheme.normalize(k).group_size)
    zero = np.float32(scheme.numbers.zero_point) if quantized.zero is None else _over_columns(quantized.zero)
    w = (q - zero) * _over_columns(quantized.scale)
    return w.reshape(n, -1)[:, :k]


def grouped(w: F32, group: int) -> F32:
    """View w [N, K] as [N, G, group], a short last group filled up with zeros; group 0 is the whole row."""
    n, k = w.shape
    width = group or k
    if k % width:
        w = np.pad(w, ((0, 0), (0, width - k % width)))
    return w.reshape(n, -1, width)


def group_scales(groups: F32, scheme: Scheme, scale_dtype: type) -> tuple[Array, F32]:
    """Scale (as stored) and zero point [N, G] of groups [N, G, width]; a group of zeros has scale 1."""
    assert scheme.is_integer, f"{scheme} has no levels"
    # Zero is always within the range: a padded column, and a weight of exactly 0, must stay exactly 0.
    low = np.minimum(groups.min(-1), 0)
    high = np.maximum(groups.max(-1), 0)
    if scheme.symmetric:
        scale = _symmetric_scale(groups, low, high, scheme.numbers, scale_dtype)
        return scale, np.full_like(low, scheme.numbers.zero_point)
    levels = np.float32(scheme.numbers.levels)
    scale = _stored(high / levels - low / levels, scale_dtype)  # high - low could overflow
    zero = np.rint(-low / scale.astype(np.float32)) + scheme.numbers.low
    return scale, np.clip(zero, scheme.numbers.low, scheme.numbers.high)


def round_to_levels(groups: F32, scale: F32, zero: F32, numbers: Format) -> F32:
    """The nearest q (integers in f32) of groups [N, G, width] for scale and zero [N, G]."""
    q = groups / scale[..., None]
    np.rint(q, out=q)
    q += zero[..., None]
    return np.clip(q, numbers.low, numbers.high, out=q)


def _round_to_floats(groups: F32, k: int, numbers: Format, scale_dtype: type) -> Quantized:
    """Groups [N, G, width] in a scaled float format: each group's largest magnitude meets the format's."""
    scale = _stored(np.abs(groups).max(-1) / np.float32(numbers.high), scale_dtype)
    q = e4m3.encode(groups / scale.astype(np.float32)[..., None])
    return Quantized(q.reshape(len(q), -1)[:, :k], scale, None)


def _symmetric_scale(groups: F32, low: F32, high: F32, numbers: Format, scale_dtype: type) -> Array:
    """The better of two scales per group, by squared error.

    Plain: the largest magnitude meets the shorter side of the range (7 of -8..7). Signed: it meets the
    longer side (-8), with a negative scale when that weight is positive; the step is an eighth smaller (a
    quarter at three bits, half at two), and a few weights near the other extreme may be clipped. Eight bits
    gain nothing from this and take the plain scale.
    """
    below, above = numbers.zero_point - numbers.low, numbers.high - numbers.zero_point
    size = np.maximum(-low, high)
    plain = _stored(size / np.float32(above), scale_dtype)
    if numbers.levels > 15:
        return plain
    signed = _stored(np.where(-low >= high, size, -size) / np.float32(below), scale_dtype)
    better = _squared_error(groups, signed, -below, above) < _squared_error(groups, plain, -below, above)
    return np.where(better, signed, plain)


def _squared_error(groups: F32, scale: Array, low: int, high: int) -> Array:
    """Squared error [N, G] of rounding groups [N, G, width] to low..high times these scales."""
    step = scale.astype(np.float32)
    offset = groups / step[..., None]
    q = np.rint(offset)
    np.clip(q, low, high, out=q)
    offset -= q
    error: Array = np.einsum("ngk,ngk->ng", offset, offset) * step * step
    return error


def _stored(scale: Array, scale_dtype: type) -> Array:
    """The scale as stored. Where it is 0 the group is all zeros; 1 spares readers a division by 0."""
    return np.where(scale == 0, np.float32(1), scale).astype(scale_dtype)


def _over_columns(values: Array) -> Array:
    return values.astype(np.float32)[..., None]
