"""A matrix of an artifact as a GGUF tensor: a type that holds it exactly, or a rounding and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from gristmill.export.llama_shape import Rows
from gristmill.export.stored import StoredWeights, scheme_of
from gristmill.quant import pack, rtn
from gristmill.quant.formats import gguf_blocks
from gristmill.quant.formats.gguf_blocks import BLOCKS, COLUMNS, Levels
from gristmill.quant.formats.weight import stored_scale
from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import Scheme
from gristmill.runtime.errors import GristmillError

Array = NDArray[Any]
FLOATS = ("f32", "f16", "bf16")
TYPES = (*FLOATS, "q8_0", "q5_0", "q4_1", "q4_0")
CHUNK_WEIGHTS = 1 << 22  # converted at a time: 16 MiB of f32, whatever the matrix
SMALLEST = {"int8": "q8_0", "int4": "q4_0", "int3": "q4_0", "int2": "q4_0", "fp8": "f16"}


@dataclass(frozen=True)
class Tensor:
    """rows as GGUF orders them: its row i is row order[i]; None: as they are. end: embedding or head."""

    name: str
    rows: Rows
    order: Array | None = None
    end: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.count, self.rows.segment.k

    @property
    def has_blocks(self) -> bool:
        """Whether its rows are whole blocks with columns in their own order."""
        return self.rows.segment.k % COLUMNS == 0 and self.rows.order is None


@dataclass(frozen=True)
class Encoded:
    """array: what the file holds. loss: sum((w - stored)^2) / sum(w^2)."""

    array: Array
    loss: float


def choose(weights: StoredWeights, tensor: Tensor, asked: str | None) -> str:
    """The type of a tensor: as asked (q8_0 for both ends where blocks were), else the smallest exact one.

    Rows that are not whole blocks stay f32. Without an exact type: q8_0 for integers, f16 for the rest.
    """
    segment = tensor.rows.segment
    if asked in FLOATS:
        return str(asked)
    scaled = scheme_of(segment).numbers.scaled
    if segment.k % COLUMNS:
        return "f32" if scaled or asked else segment.format
    if asked is not None:
        return "q8_0" if tensor.end else asked
    if not scaled:
        return segment.format
    if tensor.rows.order is not None:
        return "f16"
    if segment.symmetric:
        return SMALLEST[segment.format]
    return _asymmetric(weights, tensor)


def _asymmetric(weights: StoredWeights, tensor: Tensor) -> str:
    """q4_0 where it has the levels (int2, int3), q4_1 where f16 has every minimum, else one wide enough."""
    kinds = ("q8_0",) if tensor.rows.segment.format == "int8" else ("q4_0", "q4_1", "q5_0")
    for kind in kinds:
        if all(exact_levels(weights, tensor, rows, kind) is not None for rows in _chunks(tensor)):
            return kind
    return "q8_0"


def byte_count(kind: str, shape: tuple[int, int]) -> int:
    """Bytes of a tensor [n, k] of this type."""
    n, k = shape
    return n * k * (4 if kind == "f32" else 2) if kind in FLOATS else n * k // COLUMNS * BLOCKS[kind].nbytes


def encode(weights: StoredWeights, tensor: Tensor, kind: str) -> Encoded:
    """The tensor in a type, a chunk of rows at a time: level by level where it fits, else rounded anew."""
    out: Array | None = None
    at, error, norm = 0, 0.0, 0.0
    for rows in _chunks(tensor):
        w = values(weights, tensor, rows)
        part = _encode_rows(weights, tensor, rows, w, kind)
        out = np.empty((tensor.shape[0], part.shape[1]), part.dtype) if out is None else out
        out[at : at + len(part)] = part
        at += len(part)
        error += float(np.square(w - decode(part, kind), dtype=np.float64).sum())
        norm += float(np.square(w, dtype=np.float64).sum())
    if not np.isfinite(error):
        raise GristmillError(f"{tensor.name} has weights beyond the range of {kind}; give --type bf16 or f32")
    weights.give_back()
    assert out is not None, f"{tensor.name} has no rows"
    return Encoded(out, error / max(norm, np.finfo(np.float64).tiny))


def _encode_rows(weights: StoredWeights, tensor: Tensor, rows: Array, w: Array, kind: str) -> Array:
    if kind in FLOATS:
        return pack.encode_float(w, kind)
    levels = exact_levels(weights, tensor, rows, kind)
    return _round(w, kind) if levels is None else gguf_blocks.pack(kind, levels)


def _round(w: Array, kind: str) -> Array:
    """Round anew. For 4 bits our own choice of scales, which errs less than the largest weight's."""
    if kind != "q4_0":
        quantize: Callable[..., Array] = gguf.quantize
        return quantize(w, gguf.GGMLQuantizationType[kind.upper()])
    scheme = Scheme("int4", COLUMNS)
    made = rtn.quantize_rows(w, scheme, np.float16)
    return gguf_blocks.pack(kind, Levels(made.q.astype(np.int16) - scheme.numbers.zero_point, made.scale))


def decode(array: Array, kind: str) -> Array:
    """The values f32 of a tensor of this type."""
    if kind in FLOATS:
        return pack.decode_float(array)
    return gguf_blocks.values(gguf_blocks.unpack(kind, array))


def values(weights: StoredWeights, tensor: Tensor, rows: Array) -> Array:
    """The artifact's own weights f32 [len(rows), k], columns in the model's order."""
    w = weights.values(tensor.rows.segment, rows)
    if tensor.rows.order is None:
        return w
    put_back = np.empty_like(w)
    put_back[:, weights.tensor(tensor.rows.order)] = w
    return put_back


def exact_levels(weights: StoredWeights, tensor: Tensor, rows: Array, kind: str) -> Levels | None:
    """These rows as levels of a block type with the same values, None where it cannot hold them."""
    segment, block = tensor.rows.segment, BLOCKS[kind]
    if not tensor.has_blocks or not scheme_of(segment).is_integer:
        return None
    quantized = weights.quantized(segment, rows)
    with np.errstate(over="ignore"):
        scale = stored_scale(quantized.scale.astype(np.float32))
    if scale.dtype != np.float16:
        return None
    q, zero = _integers(quantized, scheme_of(segment))
    scale, zero = (_by_block(a, segment.k, segment.group) for a in (scale, zero))
    wide_zero = np.repeat(zero, COLUMNS, axis=1)
    if not block.affine:
        level = q - wide_zero
        fits = level.min(initial=0) >= block.low and level.max(initial=0) <= block.high
        return Levels(level, scale) if fits else None
    low = scheme_of(segment).numbers.low
    minimum = -scale.astype(np.float32) * (zero - low)
    stored = stored_scale(minimum)
    fits = stored.dtype == np.float16 and (q - low).max(initial=0) <= block.high
    return Levels(q - low, scale, stored) if fits else None


def _integers(quantized: Quantized, scheme: Scheme) -> tuple[Array, Array]:
    """q [n, k] and zero [n, G], int16."""
    zero = quantized.zero
    if zero is None:
        zero = np.full(quantized.scale.shape, scheme.numbers.zero_point)
    return quantized.q.astype(np.int16), zero.astype(np.int16)


def _by_block(groups: Array, k: int, group: int) -> Array:
    """Values by group [n, G] repeated for every block [n, k / 32]; groups are whole blocks."""
    return np.repeat(groups, (group or k) // COLUMNS, axis=1)[:, : k // COLUMNS]


def _chunks(tensor: Tensor) -> Iterator[Array]:
    """Row numbers in the stored matrix, a chunk at a time, in the file's order."""
    count, k = tensor.shape
    order = np.arange(count) if tensor.order is None else tensor.order
    step = max(1, CHUNK_WEIGHTS // k)
    for start in range(0, count, step):
        yield tensor.rows.start + order[start : start + step]
