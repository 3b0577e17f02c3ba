"""Small unsigned integers in 32-bit words: the packing that GPTQ, AWQ and compressed-tensors share.

Values follow each other from the lowest bit up. 2, 4 and 8 bits divide a word; 3 bits run on through three
words, which hold 32 values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
WORD = 32


def unpack_words(words: Array, bits: int) -> NDArray[np.uint8]:
    """words [R, W] of 32 bits to values [R, W * 32 / bits] of 0..2**bits - 1; W is a multiple of `span`."""
    words = np.ascontiguousarray(words).view(np.uint32)
    blocks = words.reshape(len(words), -1, span(bits))
    values = np.empty((*blocks.shape[:2], span(bits) * WORD // bits), np.uint8)
    for j, word, shift in _places(bits):
        value = blocks[:, :, word] >> np.uint32(shift)
        if shift + bits > WORD:
            value |= blocks[:, :, word + 1] << np.uint32(WORD - shift)
        values[:, :, j] = value & np.uint32((1 << bits) - 1)
    return values.reshape(len(words), -1)


def pack_words(values: Array, bits: int) -> NDArray[np.int32]:
    """The inverse: values [R, C] to words [R, W] i32; C is filled up with zeros to whole words."""
    count = span(bits) * WORD // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % count)))
    blocks = padded.reshape(len(values), -1, count).astype(np.uint32)
    words = np.zeros((*blocks.shape[:2], span(bits)), np.uint32)
    for j, word, shift in _places(bits):
        words[:, :, word] |= blocks[:, :, j] << np.uint32(shift)
        if shift + bits > WORD:
            words[:, :, word + 1] |= blocks[:, :, j] >> np.uint32(WORD - shift)
    return words.reshape(len(values), -1).view(np.int32)


def span(bits: int) -> int:
    """Words after which the pattern repeats: 3 for 3 bits, else 1."""
    return bits // math.gcd(bits, WORD)


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Value number, word and lowest bit of every value of a block of `span` words."""
    for j in range(span(bits) * WORD // bits):
        yield (j, *divmod(j * bits, WORD))
