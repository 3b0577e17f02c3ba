"""A weight that a checkpoint holds quantized, whatever wrote it.

What the formats have in common once unpacked: integers q [n, k], a scale and a zero point for each row and
group of columns, and sometimes an order of columns (act-order: groups are formed in the order in which GPTQ
visited the columns). An artifact stores groups of consecutive columns, so columns are sorted by group here
and the order is kept beside them: nothing is rounded again, w = f32(scale) * (q - zero) holds to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gristmill.quant import pack, rtn
from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import FORMATS, GROUP_SIZES, Format, Scheme
from gristmill.quant.tensor import QuantizedTensor, store
from gristmill.runtime.errors import GristmillError

Array = NDArray[Any]
F32 = NDArray[np.float32]


class Tensors(Protocol):
    """What a reader needs of a checkpoint: tensors by name; `read` gives floats as f32."""

    def __contains__(self, name: str) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Any: ...


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix [n, k], read when asked for.

    group: columns of one scale, 0: the row. scheme: how an artifact stores it; None: it cannot. scale_dtype:
    float16, or float32 where f16 does not hold every scale exactly. read: gives q, scale and zero with
    columns sorted by group. codes: what each q means where it is not an integer (fp8). order: [k] i32, column
    j as stored is column order[j] of the layer; None: as they are. rows: which rows of `read` these are;
    None: all.
    """

    name: str
    n: int
    k: int
    group: int
    scheme: Scheme | None
    scale_dtype: str
    read: Callable[[], Quantized]
    codes: F32 | None = None
    order: Array | None = None
    rows: Array | None = None

    @property
    def merge_key(self) -> Hashable:
        """Weights of one input may be one instruction where this is equal: column order, integer or float."""
        order = None if self.order is None else hashlib.sha256(self.order.tobytes()).hexdigest()
        return order, self.codes is None

    def select(self, rows: Any) -> QuantizedWeight:
        """These rows of the matrix, in this order."""
        index = np.asarray(rows, np.int64)
        return replace(self, n=len(index), rows=index if self.rows is None else self.rows[index])

    def load(self) -> Quantized:
        """q [n, k] with columns as stored, scale and zero [n, G]."""
        whole = self.read()
        if self.rows is None:
            return whole
        zero = None if whole.zero is None else whole.zero[self.rows]
        return Quantized(whole.q[self.rows], whole.scale[self.rows], zero)

    def dequantize(self) -> F32:
        """The weights [n, k] f32 with columns in the layer's order."""
        sorted_columns = self._values(self.load())
        if self.order is None:
            return sorted_columns
        w = np.empty_like(sorted_columns)
        w[:, self.order] = sorted_columns
        return w

    def _values(self, quantized: Quantized) -> F32:
        """f32 values with columns as stored."""
        if self.codes is None:
            assert self.scheme is not None, "integers always have a scheme"
            return rtn.dequantize(quantized, self.scheme)
        groups = rtn.grouped(self.codes[quantized.q], self.group)
        values = groups * quantized.scale.astype(np.float32)[..., None]
        return values.reshape(self.n, -1)[:, : self.k]

    def stored(self, name: str) -> QuantizedTensor:
        """As an artifact stores it under `name`; no error: the checkpoint's own values are the reference."""
        assert self.scheme is not None, "lowering refuses what no format stores"
        scheme = self.scheme.normalize(self.k)
        return store(name, pack.stored_arrays(self.load(), scheme), scheme, self.k, 0.0)


@dataclass(frozen=True)
class Columns:
    """How columns lie in groups: `group` consecutive sorted columns share a scale, the last may be fewer.

    group: 32, 64, 128 or 0 (the row). source: [G] which of the checkpoint's groups each one is. order: see
    QuantizedWeight.
    """

    group: int
    source: Array
    order: Array | None


def assemble(
    name: str,
    k: int,
    bits: int,
    columns: Columns,
    scale: F32,
    zero: Array | None,
    read_q: Callable[[], Array],
) -> QuantizedWeight:
    """A QuantizedWeight from unsigned integers.

    scale: [n, G of the checkpoint] f32. zero: the same shape, 0..2**bits - 1; None: the middle.
    read_q: gives q [n, k] uint8 in the layer's column order. Raises GristmillError for unusable scales, and
    for a width that no format stores.
    """
    numbers = integer_format(name, bits)
    refuse_bad_scales(name, scale)
    scale = stored_scale(scale[:, columns.source])
    zeros = None if zero is None else _signed(zero[:, columns.source], numbers)
    if zeros is not None and (zeros == numbers.zero_point).all():
        zeros = None

    def read() -> Quantized:
        q = read_q()
        return Quantized(_signed(q if columns.order is None else q[:, columns.order], numbers), scale, zeros)

    scheme = Scheme(numbers.name, columns.group, symmetric=zeros is None)
    return QuantizedWeight(
        name, len(scale), k, columns.group, scheme, scale.dtype.name, read, order=columns.order
    )


def integer_format(name: str, bits: int) -> Format:
    """The format of this many bits; refused with the widths that there are."""
    known = {f.bits: f for f in FORMATS.values() if f.integer}
    if bits not in known:
        widths = ", ".join(map(str, sorted(known)))
        raise GristmillError(f"{name}: weights of {bits} bits are not supported; expected one of {widths}")
    return known[bits]


def stored_scale(scale: F32) -> Array:
    """The scales as f16 where that loses nothing, else as they are."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scale) else np.ascontiguousarray(scale)


def refuse_bad_scales(name: str, scale: F32) -> None:
    if not np.isfinite(scale).all():
        raise GristmillError(
            f"{name}: its scales hold NaN or infinity: the checkpoint is damaged, fetch it again"
        )


def plan_columns(name: str, k: int, groups: int, group_size: int, g_idx: Array | None = None) -> Columns:
    """Columns of a matrix whose checkpoint has `groups` scales per row, one for each `group_size` columns.

    g_idx: [k] the group of each column; None: consecutive. A group with fewer columns than the others is put
    last; a second one cannot be stored and is refused, as are group sizes that no 32 divides.
    """
    width = k if group_size <= 0 or group_size >= k else group_size
    expected = -(-k // width)
    if groups != expected:
        raise GristmillError(
            f"{name}: {groups} groups of scales, expected {expected} for {k} columns in groups of {width}; "
            "the config and the tensors do not belong together"
        )
    native = _native_group(name, width, k)
    if g_idx is None or not g_idx.any():  # old files leave g_idx at 0 where there is no order
        ids, order = np.arange(k) // width, None
    else:
        ids, order = _sorted_by_group(name, g_idx, k, groups, width)
    return Columns(native, ids[:: native or k], order)


def _native_group(name: str, width: int, k: int) -> int:
    """The group size to store: the widest that divides the checkpoint's."""
    if width >= k:
        return 0
    native = next((size for size in sorted(GROUP_SIZES, reverse=True) if width % size == 0), None)
    if native is None:
        raise GristmillError(
            f"{name}: groups of {width} columns cannot be stored; expected a multiple of {min(GROUP_SIZES)}, "
            "or give --weights to round the weights anew"
        )
    return native


def _sorted_by_group(name: str, g_idx: Array, k: int, groups: int, width: int) -> tuple[Array, Array | None]:
    """Group numbers of the sorted columns, and the order (None where they are sorted already)."""
    if g_idx.shape != (k,) or g_idx.min() < 0 or g_idx.max() >= groups:
        raise GristmillError(
            f"{name}: g_idx has shape {list(g_idx.shape)} and values {g_idx.min()} to {g_idx.max()}, "
            f"expected {k} values from 0 to {groups - 1}"
        )
    counts = np.bincount(g_idx, minlength=groups)
    if (counts > width).any() or np.count_nonzero((counts > 0) & (counts < width)) > 1:
        raise GristmillError(
            f"{name}: g_idx puts {counts.min()} to {counts.max()} columns into a group, expected {width} in "
            "all but one; give --weights to round the weights anew"
        )
    full_first = np.where(counts[g_idx] == width, g_idx, groups)
    order = np.argsort(full_first, kind="stable").astype(np.int32)
    return g_idx[order], None if np.array_equal(order, np.arange(k)) else order


def _signed(q: Array, numbers: Format) -> Array:
    """Unsigned integers as the format holds them: int8 begins at -128."""
    return (q.astype(np.int16) + numbers.low).astype(numbers.dtype)


def require_tensors(tensors: Tensors, module: str, suffixes: tuple[str, ...]) -> None:
    """Raises GristmillError that names the first tensor that a quantized layer lacks."""
    for suffix in suffixes:
        if f"{module}.{suffix}" not in tensors:
            raise GristmillError(
                f"the checkpoint has no tensor '{module}.{suffix}'; is a shard missing? "
                "download the model again"
            )


def require_shape(tensors: Tensors, name: str, expected: tuple[int, ...]) -> None:
    if tensors.shape(name) != expected:
        raise GristmillError(
            f"tensor '{name}' has shape {list(tensors.shape(name))}, expected {list(expected)}; "
            "the config and the tensors do not belong together"
        )
