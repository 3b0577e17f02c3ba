"""GGML's simple blocks: 32 columns of a row that share an f16 scale, as a GGUF file holds them.

    q8_0  d f16, 32 signed bytes                              w = d * q
    q4_0  d, 16 bytes: byte i has column i low, i + 16 high   w = d * (q - 8)
    q5_0  d, a word of the fifth bits, 16 bytes as above      w = d * (q - 16)
    q4_1  d, m f16, as q4_0                                   w = d * q + m
    q5_1  d, m, as q5_0                                       w = d * q + m

The first three are integers with a fixed zero, so groups of any multiple of 32 columns go over exactly,
a scale written once per block. The last two hold m = -d * zero only where f16 does. The K types (blocks of
256 with scales of scales) fit none of our formats and are only ever read as values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
COLUMNS = 32  # of a block


@dataclass(frozen=True)
class Block:
    """bits of a stored q; offset: what is taken off it (q8_0 is signed and has none); affine: has an m."""

    bits: int
    offset: int = 0
    affine: bool = False

    @property
    def low(self) -> int:
        """The smallest level q - offset that it holds."""
        return -128 if self.bits == 8 else -self.offset

    @property
    def high(self) -> int:
        """The largest level."""
        return self.low + (1 << self.bits) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of a block, as 4 bits and the fifth apart."""
        return 2 + 2 * self.affine + COLUMNS * self.bits // 8


BLOCKS = {
    "q8_0": Block(8),
    "q4_0": Block(4, 8),
    "q5_0": Block(5, 16),
    "q4_1": Block(4, affine=True),
    "q5_1": Block(5, affine=True),
}


@dataclass(frozen=True)
class Levels:
    """w = scale * level + minimum. level: [n, k] int; scale, minimum: [n, k / 32] f16, minimum None: 0."""

    level: Array
    scale: Array
    minimum: Array | None = None


def pack(kind: str, levels: Levels) -> Array:
    """The rows [n, bytes] uint8 of a matrix whose levels the kind holds."""
    block = BLOCKS[kind]
    n, k = levels.level.shape
    assert k % COLUMNS == 0, f"{k} columns are not whole blocks of {kind}"
    q = (levels.level - (0 if block.bits == 8 else block.low)).astype(np.int16)
    q = q.reshape(n, -1, COLUMNS)
    parts = [_bytes(levels.scale)]
    if block.affine:
        assert levels.minimum is not None, f"{kind} needs minima"
        parts.append(_bytes(levels.minimum))
    if block.bits == 8:
        parts.append(q.astype(np.int8).view(np.uint8))
    else:
        low = (q & 15).astype(np.uint8)
        if block.bits == 5:
            parts.append(np.packbits((q >> 4).astype(np.uint8), axis=2, bitorder="little"))
        parts.append(low[..., : COLUMNS // 2] | low[..., COLUMNS // 2 :] << 4)
    packed: Array = np.concatenate(parts, axis=2).reshape(n, -1)
    return packed


def unpack(kind: str, rows: Array) -> Levels:
    """The inverse of `pack`: rows [n, bytes] uint8 to int16 levels."""
    block = BLOCKS[kind]
    blocks = rows.reshape(len(rows), -1, block.nbytes)
    header = 2 + 2 * block.affine
    halves = np.ascontiguousarray(blocks[..., :header]).view(np.float16)
    data = blocks[..., header:]
    if block.bits == 8:
        q = np.ascontiguousarray(data).view(np.int8).astype(np.int16)
    else:
        nibbles = data[..., -COLUMNS // 2 :]
        q = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).astype(np.int16)
        if block.bits == 5:
            q |= np.unpackbits(data[..., :4], axis=2, bitorder="little").astype(np.int16) << 4
        q -= block.offset
    return Levels(q.reshape(len(rows), -1), halves[..., 0], halves[..., 1] if block.affine else None)


def scales(kind: str, rows: Array) -> Array:
    """The scales [n, k / 32] f16 of packed rows."""
    blocks = rows.reshape(len(rows), -1, BLOCKS[kind].nbytes)
    return np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]


def values(levels: Levels) -> NDArray[np.float32]:
    """The weights [n, k] f32, multiplied and added as llama.cpp does."""
    n, k = levels.level.shape
    w = levels.level.reshape(n, -1, COLUMNS).astype(np.float32) * levels.scale.astype(np.float32)[..., None]
    if levels.minimum is not None:
        w += levels.minimum.astype(np.float32)[..., None]
    return w.reshape(n, k)


def _bytes(halves: Array) -> Array:
    """[n, G] f16 to [n, G, 2] uint8."""
    return np.ascontiguousarray(halves, np.float16)[..., None].view(np.uint8)
