"""The 8-bit float e4m3fn: a sign, four exponent bits of bias 7, three mantissa bits (arXiv 2209.05433).

No infinities; the largest value is 448, the smallest above zero 2**-9. The two bit patterns left over, 0x7f
and 0xff, are NaN; nothing here writes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 448.0
SMALLEST_NORMAL = 2.0**-6


def encode(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The bits of the nearest e4m3 values, ties to even, 448 for what is beyond. x: any shape, no NaN."""
    x = np.ascontiguousarray(x, np.float32)
    size = np.minimum(np.abs(x), np.float32(LARGEST))
    bits = size.view(np.uint32)
    # 20 of the mantissa's 23 bits go; a carry moves on into the exponent, whose bias changes from 127 to 7.
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - np.uint32(120 << 3)
    subnormal = np.rint(np.minimum(size, np.float32(SMALLEST_NORMAL)) * np.float32(2**9)).astype(np.uint32)
    code = np.where(size < SMALLEST_NORMAL, subnormal, normal) | np.signbit(x).astype(np.uint32) << 7
    return code.astype(np.uint8)


def decode(bits: NDArray[Any]) -> NDArray[np.float32]:
    """The f32 values of e4m3 bits (uint8), exact."""
    values: NDArray[np.float32] = VALUES[bits]
    return values


def _values() -> NDArray[np.float32]:
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    size = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size[127] = np.nan
    return np.concatenate([size, -size]).astype(np.float32)


VALUES = _values()  # [256], by bits
