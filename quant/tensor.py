"""A weight matrix in the form an artifact stores it, made row chunk by row chunk.

Whole models pass through here, so memory and time count: a chunk stays in the processor's cache through all
its steps, chunks are shared out over threads (numpy releases the interpreter), and only the packed result
is kept.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gristmill.quant import pack, rtn
from gristmill.quant.scheme import Scheme
from gristmill.runtime.errors import GristmillError

Array = NDArray[Any]
F32 = NDArray[np.float32]

CHUNK_WEIGHTS = 1 << 17  # 512 KiB of f32: stays in a core's second-level cache

DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8", "uint8": "U8"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor for the safetensors writer. BF16 values are the bits in a uint16 array."""

    name: str
    array: Array

    @property
    def dtype(self) -> str:
        """safetensors' name of the type: F32, F16, BF16, I8 or U8."""
        return DTYPES[str(self.array.dtype)]

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight matrix [n, k] as stored: `name.weight`, and as the scheme asks `name.scale`, `name.zero`."""

    name: str
    scheme: Scheme  # normalized for k
    n: int
    k: int
    tensors: tuple[StoredTensor, ...]
    relative_error: float  # sum((w - stored)^2) / sum(w^2)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def arrays(self) -> dict[str, Array]:
        """The tensors' arrays by suffix: "weight", and as the scheme asks "scale", "zero"."""
        return {tensor.name.removeprefix(self.name + "."): tensor.array for tensor in self.tensors}

    def segment(self) -> dict[str, Any]:
        """This matrix as a weight segment of program.json."""
        return {
            "name": self.name,
            "format": self.scheme.format,
            "n": self.n,
            "k": self.k,
            "group": self.scheme.group_size,
            "symmetric": self.scheme.symmetric,
        }


def quantize_tensor(name: str, w: Any, scheme: Scheme) -> QuantizedTensor:
    """Round w [n, k] to nearest in any scheme, float formats too.

    w is a torch tensor or an array of f32, f16 or bf16.
    Raises GristmillError for weights that are NaN or infinite, or that f16 cannot hold.
    """
    scheme = scheme.normalize(w.shape[1])
    stored = _encode_all(name, w, scheme, np.float16)
    if "scale" in stored.arrays and not rtn.scales_fit(stored.arrays["scale"]):
        stored = _encode_all(name, w, scheme, np.float32)
    return store(name, stored.arrays, scheme, w.shape[1], stored.relative_error())


def store_quantized(name: str, w: torch.Tensor, quantized: rtn.Quantized, scheme: Scheme) -> QuantizedTensor:
    """Integers that a calibrated method chose for w [n, k] f32, as stored."""
    scheme = scheme.normalize(w.shape[1])
    difference = w.numpy() - rtn.dequantize(quantized, scheme)
    error, norm = (float(np.square(x, dtype=np.float64).sum()) for x in (difference, w.numpy()))
    arrays = pack.stored_arrays(quantized, scheme)
    return store(name, arrays, scheme, w.shape[1], error / max(norm, np.finfo(np.float64).tiny))


def store(
    name: str, arrays: dict[str, Array], scheme: Scheme, k: int, relative_error: float
) -> QuantizedTensor:
    """Name the arrays (of `pack.stored_arrays`, say) of one matrix with k columns."""
    tensors = tuple(StoredTensor(f"{name}.{suffix}", array) for suffix, array in arrays.items())
    return QuantizedTensor(name, scheme.normalize(k), len(arrays["weight"]), k, tensors, relative_error)


def dequantize_tensor(tensor: QuantizedTensor) -> F32:
    """The weights [n, k] f32 that the stored bytes mean."""
    return _decode(tensor.arrays, tensor.scheme, tensor.k)


def stored_shapes(
    name: str, n: int, k: int, scheme: Scheme, scale_dtype: type
) -> list[tuple[str, str, tuple[int, int]]]:
    """Name, safetensors dtype and shape of what a matrix [n, k] is stored as, known without its weights."""
    row = _encode(np.zeros((1, k), np.float32), scheme.normalize(k), scale_dtype)
    return [(f"{name}.{suffix}", DTYPES[str(a.dtype)], (n, a.shape[1])) for suffix, a in row.items()]


@dataclass
class _Stored:
    """Arrays being filled row by row, with each row's squared error and squared norm."""

    arrays: dict[str, Array]
    error: NDArray[np.float64]
    norm: NDArray[np.float64]

    def relative_error(self) -> float:
        return float(self.error.sum() / max(self.norm.sum(), np.finfo(np.float64).tiny))


def _encode_all(name: str, w: Any, scheme: Scheme, scale_dtype: type) -> _Stored:
    """Encode every row chunk, a thread to a processor; the bytes do not depend on how many there are."""
    n, k = w.shape
    rows = max(1, CHUNK_WEIGHTS // k)
    first = _encode(_f32_rows(w, 0, 1), scheme, scale_dtype)
    stored = _Stored(
        {s: np.empty((n, a.shape[1]), a.dtype) for s, a in first.items()}, np.empty(n), np.empty(n)
    )

    def encode_chunk(start: int) -> None:
        chunk = _f32_rows(w, start, start + rows)
        refuse_unusable(name, chunk)
        arrays = _encode(chunk, scheme, scale_dtype)
        for suffix, array in arrays.items():
            stored.arrays[suffix][start : start + rows] = array
        if "scale" in arrays and not rtn.scales_fit(arrays["scale"]):
            return  # the caller sees it too, and begins again with f32 scales
        _record_errors(name, stored, start, chunk, _decode(arrays, scheme, k))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(encode_chunk, range(0, n, rows)))
    return stored


def _encode(w: F32, scheme: Scheme, scale_dtype: type) -> dict[str, Array]:
    if not scheme.has_scales:
        return {"weight": pack.encode_float(w, scheme.format)}
    return pack.stored_arrays(rtn.quantize_rows(w, scheme, scale_dtype), scheme)


def _decode(arrays: dict[str, Array], scheme: Scheme, k: int) -> F32:
    if not scheme.has_scales:
        return pack.decode_float(arrays["weight"])
    return rtn.dequantize(pack.unpack(arrays, scheme, k), scheme)


def _f32_rows(w: Any, start: int, stop: int) -> Array:
    """Rows of a torch tensor or an array as f32. (numpy has no bf16: its bits are widened here.)"""
    rows = w[start:stop]
    if isinstance(rows, np.ndarray):
        return rows.astype(np.float32, copy=False)
    if rows.dtype == torch.bfloat16:
        return pack.decode_float(rows.detach().contiguous().view(torch.int16).numpy().view(np.uint16))
    values: Array = rows.detach().numpy()
    return values.astype(np.float32, copy=False)


def refuse_unusable(name: str, w: F32) -> None:
    if not np.isfinite(w).all():
        raise GristmillError(
            f"{name} holds NaN or infinite weights: the checkpoint is damaged, fetch it again"
        )


def _record_errors(name: str, stored: _Stored, start: int, w: F32, decoded: F32) -> None:
    """Each row's squared error and norm, which do not depend on how the rows were split."""
    if not np.isfinite(decoded).all():
        raise GristmillError(f"{name} holds weights beyond f16's range (65504): store it as bf16 or f32")
    rows = slice(start, start + len(w))
    decoded -= w
    stored.error[rows] = _squared_norms(decoded)
    stored.norm[rows] = _squared_norms(w)


def _squared_norms(w: F32) -> Array:
    """Squared norm of every row, in f64 only where f32 overflows."""
    norms: Array = np.einsum("nk,nk->n", w, w)
    if not np.isfinite(norms).all():
        norms = np.square(w, dtype=np.float64).sum(1)
    return norms
