"""Integers, scales and zero points as the bytes of an artifact, and back.

The layouts are the artifact's, for every device: rows of whole 64-column blocks, so that a kernel never
meets a ragged end; padded columns are read by kernels but their activations are 0.

int8: weight [n, kp] I8, zero [n, G] I8.
int4: weight [n, kp/2] U8, in each 64 columns byte i holds column i in the low nibble and column i+32 in the
high one (one load, one mask, one shift give 64 columns in order); zero [n, ceil(G/2)] U8, even groups in
low nibbles.
int2: weight [n, kp/4] U8, in each 64 columns byte i holds columns i, i+16, i+32, i+48, the first lowest.
int3: weight [n, 3kp/8] U8, each 64 columns take 16 bytes of low two bits, laid out as int2, and 8 bytes of
third bits: bit c % 8 of byte c / 8 belongs to column c. Zeros of int3 and int2 as those of int4: there is one
per group, and a denser form would save 0.06 bits per weight at groups of 32.
fp8: weight [n, kp] U8, the bits of e4m3; padded with 0.
All of them: scale [n, G] F16, or F32. Float formats: weight [n, k], bf16 as its bits in uint16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import Scheme

BLOCK = 64

Array = NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """How one format lies in memory: weights by blocks, zeros by rows; each with its inverse."""

    pack: Callable[[Array], Array]  # q [N, kp] -> stored [N, bytes]
    unpack: Callable[[Array], Array]
    pack_zero: Callable[[Array], Array]  # zero [N, G] -> stored
    unpack_zero: Callable[[Array], Array]  # may return one group too many


def stored_arrays(quantized: Quantized, scheme: Scheme) -> dict[str, Array]:
    """The arrays of one quantized matrix by their suffix: weight, scale and, when asymmetric, zero."""
    arrays = {"weight": pack_weight(quantized, scheme), "scale": quantized.scale}
    if quantized.zero is not None:
        arrays["zero"] = LAYOUTS[scheme.format].pack_zero(quantized.zero)
    return arrays


def pack_weight(quantized: Quantized, scheme: Scheme) -> Array:
    """The stored weight array of q [N, K], padded to whole blocks with the format's zero point."""
    q = quantized.q
    if q.shape[1] % BLOCK:
        q = np.pad(q, ((0, 0), (0, -q.shape[1] % BLOCK)), constant_values=scheme.numbers.zero_point)
    return LAYOUTS[scheme.format].pack(q)


def unpack(arrays: Mapping[str, Array], scheme: Scheme, k: int) -> Quantized:
    """The inverse of `stored_arrays`: q [N, k], scale [N, G], zero [N, G]."""
    layout, scale, zero = LAYOUTS[scheme.format], arrays["scale"], arrays.get("zero")
    zeros = None if zero is None else layout.unpack_zero(zero)[:, : scale.shape[1]]
    return Quantized(layout.unpack(arrays["weight"])[:, :k], scale, zeros)


def encode_float(w: NDArray[np.float32], format_name: str) -> Array:
    """w rounded to nearest even in f32, f16, or bf16 (as the bits in uint16)."""
    if format_name != "bf16":
        with np.errstate(over="ignore"):
            return w.astype({"f32": np.float32, "f16": np.float16}[format_name])
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode_float(stored: Array) -> NDArray[np.float32]:
    """The f32 values of an array from `encode_float`."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def pack_nibble_blocks(q: Array) -> Array:
    """q [N, kp] of 0..15 to [N, kp/2]: columns i and i+32 of a block share byte i."""
    halves = q.reshape(len(q), -1, 2, BLOCK // 2)
    packed: Array = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return packed.reshape(len(q), -1)


def unpack_nibble_blocks(packed: Array) -> Array:
    """[N, kp/2] to q [N, kp] of 0..15."""
    blocks = packed.reshape(len(packed), -1, BLOCK // 2)
    return np.stack([blocks & 15, blocks >> 4], axis=2).reshape(len(packed), -1)


def pack_crumb_blocks(q: Array) -> Array:
    """q [N, kp] of 0..3 to [N, kp/4]: columns i, i+16, i+32 and i+48 of a block share byte i."""
    quarters = q.reshape(len(q), -1, 4, BLOCK // 4)
    packed: Array = quarters[:, :, 0] | quarters[:, :, 1] << 2
    packed |= quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6
    return packed.reshape(len(q), -1)


def unpack_crumb_blocks(packed: Array) -> Array:
    """[N, kp/4] to q [N, kp] of 0..3."""
    blocks = packed.reshape(len(packed), -1, BLOCK // 4)
    return np.stack([blocks >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(len(packed), -1)


def pack_three_bit_blocks(q: Array) -> Array:
    """q [N, kp] of 0..7 to [N, 3kp/8]: in each block 16 bytes of low crumbs, 8 bytes of third bits."""
    crumbs = pack_crumb_blocks(q & 3).reshape(len(q), -1, BLOCK // 4)
    bits = np.packbits((q >> 2).reshape(len(q), -1, BLOCK), axis=2, bitorder="little")
    return np.concatenate([crumbs, bits], axis=2).reshape(len(q), -1)


def unpack_three_bit_blocks(packed: Array) -> Array:
    """[N, 3kp/8] to q [N, kp] of 0..7."""
    blocks = packed.reshape(len(packed), -1, 3 * BLOCK // 8)
    crumbs = unpack_crumb_blocks(blocks[:, :, : BLOCK // 4].reshape(len(packed), -1))
    bits = np.unpackbits(blocks[:, :, BLOCK // 4 :], axis=2, bitorder="little")
    return crumbs | bits.reshape(len(packed), -1) << 2


def pack_nibble_pairs(zero: Array) -> Array:
    """zero [N, G] of 0..15 to [N, ceil(G/2)]: groups 2i and 2i+1 share byte i, the even one low."""
    padded = np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)))
    packed: Array = padded[:, ::2] | (padded[:, 1::2] << 4)
    return packed


def unpack_nibble_pairs(packed: Array) -> Array:
    """[N, P] to zero [N, 2P] of 0..15."""
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def _as_is(values: Array) -> Array:
    return values


LAYOUTS = {
    "fp8": Layout(_as_is, _as_is, _as_is, _as_is),
    "int8": Layout(_as_is, _as_is, _as_is, _as_is),
    "int4": Layout(pack_nibble_blocks, unpack_nibble_blocks, pack_nibble_pairs, unpack_nibble_pairs),
    "int3": Layout(pack_three_bit_blocks, unpack_three_bit_blocks, pack_nibble_pairs, unpack_nibble_pairs),
    "int2": Layout(pack_crumb_blocks, unpack_crumb_blocks, pack_nibble_pairs, unpack_nibble_pairs),
}
