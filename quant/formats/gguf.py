"""Matrices of a GGUF file in our formats, where one holds them exactly.

    q8_0                            int8, symmetric
    q4_0                            int4, symmetric
    q5_0                            int4 with zero points where each group spans 15 levels, else int8
    q4_1, q5_1                      int4, int8 with zero points where each minimum is -scale * an integer

Groups are as wide as a scale repeats: what was exported from groups of 128 comes back as groups of 128.
Everything else, the K types above all, has scales of scales or minima of its own, and is read as values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from gristmill.quant.formats import gguf_blocks
from gristmill.quant.formats.gguf_blocks import BLOCKS, COLUMNS, Array, Levels
from gristmill.quant.formats.weight import QuantizedWeight, refuse_bad_scales
from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import FORMATS, GROUP_SIZES, Scheme

INT4_SPAN = FORMATS["int4"].levels
MIDDLE = 16  # q5_1's 0..31 around int8's 0


def read_weight(kind: str, name: str, k: int, rows: Callable[[], Array]) -> QuantizedWeight | None:
    """A matrix of a block type, None where no format of ours holds it exactly.

    rows: gives its rows [n, bytes] uint8, in the order that is wanted. Raises GristmillError for scales that
    are not finite.
    """
    found = _scales_alone(kind, name, k, rows()) or _fit(kind, name, k, gguf_blocks.unpack(kind, rows()))
    if found is None:
        return None
    scheme, n = found

    def read() -> Quantized:
        return _quantized(kind, scheme, k, gguf_blocks.unpack(kind, rows()))

    return QuantizedWeight(name, n, k, scheme.group_size, scheme, "float16", read)


def _scales_alone(kind: str, name: str, k: int, packed: Array) -> tuple[Scheme, int] | None:
    """The scheme of a type with a fixed zero that needs no look at the levels, and the number of rows."""
    formats = {"q8_0": "int8", "q4_0": "int4"}
    if kind not in formats:
        return None
    scale = gguf_blocks.scales(kind, packed)
    refuse_bad_scales(name, scale.astype(np.float32))
    return Scheme(formats[kind], next(g for g in _groups(k) if _constant(scale, k, g))), len(packed)


def _fit(kind: str, name: str, k: int, levels: Levels) -> tuple[Scheme, int] | None:
    refuse_bad_scales(name, levels.scale.astype(np.float32))
    n = len(levels.level)
    if not BLOCKS[kind].affine:
        groups = [g for g in _groups(k) if _constant(levels.scale, k, g)]
        narrow = next((g for g in groups if _int4_zero(levels, k, g) is not None), None)
        return (Scheme("int8", groups[0]) if narrow is None else Scheme("int4", narrow, False)), n
    zero = _zero(levels)
    if zero is None:
        return None
    name_of, low = ("int4", 0) if kind == "q4_1" else ("int8", MIDDLE)
    numbers = FORMATS[name_of]
    if (zero - low).min() < numbers.low or (zero - low).max() > numbers.high:
        return None
    group = next(g for g in _groups(k) if _constant(levels.scale, k, g) and _constant(zero, k, g))
    return Scheme(name_of, group, bool((zero - low == numbers.zero_point).all())), n


def _quantized(kind: str, scheme: Scheme, k: int, levels: Levels) -> Quantized:
    """The integers of a matrix that `_fit` found to have this scheme."""
    numbers, group = scheme.numbers, scheme.group_size
    scale = np.ascontiguousarray(_first(levels.scale, k, group))
    if BLOCKS[kind].affine:
        low = 0 if kind == "q4_1" else MIDDLE
        zero = _zero(levels)
        assert zero is not None, f"{kind} was found to have zero points"
        q, zero = levels.level - low, _first(zero, k, group) - low
    elif scheme.symmetric:
        q, zero = levels.level + numbers.zero_point, None
    else:
        zero = _int4_zero(levels, k, group)
        assert zero is not None, f"{kind} was found to be int4"
        q = levels.level + np.repeat(zero, group or k, axis=1)[:, :k]
    zeros = None if scheme.symmetric or zero is None else np.ascontiguousarray(zero.astype(numbers.dtype))
    return Quantized(q.astype(numbers.dtype), scale, zeros)


def _zero(levels: Levels) -> NDArray[np.int32] | None:
    """Integers with -scale * zero = minimum in every block; None where there are none."""
    assert levels.minimum is not None, "only affine types have minima"
    scale, minimum = levels.scale.astype(np.float32), levels.minimum.astype(np.float32)
    with np.errstate(all="ignore"):
        zero = np.where(minimum == 0, np.float32(0), np.rint(-minimum / scale))
    if not np.isfinite(zero).all() or not np.array_equal(-scale * zero, minimum):
        return None
    return zero.astype(np.int32)


def _int4_zero(levels: Levels, k: int, group: int) -> Array | None:
    """Zero points [n, G] with which int4 holds the levels of each group; None where one spans too much."""
    starts = np.arange(0, k, group or k)
    low = np.minimum(np.minimum.reduceat(levels.level, starts, axis=1), 0)
    high = np.maximum(np.maximum.reduceat(levels.level, starts, axis=1), 0)
    return None if (high - low > INT4_SPAN).any() else -low


def _groups(k: int) -> Iterator[int]:
    """Group sizes, widest first: 0 is the row, and a block always holds."""
    yield 0
    yield from (size for size in sorted(GROUP_SIZES, reverse=True) if size < k)


def _constant(blocks: Array, k: int, group: int) -> bool:
    """Whether the blocks [n, k / 32] of each group have one value."""
    first = _first(blocks, k, group)
    spread = np.repeat(first, (group or k) // COLUMNS, axis=1)[:, : blocks.shape[1]]
    return bool(np.array_equal(spread, blocks))


def _first(blocks: Array, k: int, group: int) -> Array:
    """The value of each group's first block."""
    return blocks[:, :: (group or k) // COLUMNS]
