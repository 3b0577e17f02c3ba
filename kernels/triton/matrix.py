"""Weight matrices on the device, in the layout of the artifact.

Kernels read a row in *chunks* of 8 stored elements (4 of f32), whatever those are: a thread's load is then as
many elements wide as its 16-byte load of 16-bit activations, so that both lie in the same registers of the
same threads, nothing goes through shared memory and nothing is rearranged when weights are uploaded. A chunk
has one or more *parts*, each WIDTH consecutive columns that always lie in one group:

    format      bytes a row   parts  columns of part j in chunk c
    f32         4 k           1      4 c ...
    f16, bf16   2 k           1      8 c ...
    fp8, int8   kp            1      8 c ...
    int4        kp / 2        2      64 (c // 4) + 8 (c % 4) + 32 j ...   (nibble j of each byte)
    int2        kp / 4        4      64 (c // 2) + 8 (c % 2) + 16 j ...   (crumb j of each byte)
    int3        3 kp / 8      4      as int2; third bits are the 8 bytes behind each two chunks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BITS = {"f32": 32, "f16": 16, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4, "int3": 3, "int2": 2}
PARTS = {"int4": 2, "int3": 4, "int2": 4}
ZEROS = {"int4": 8, "int3": 4, "int2": 2}  # the zero point of symmetric weights; 0 for the other formats
WORDS = {"int8": 4, "int4": 4, "int3": 6, "int2": 4}  # of 32 bits, of a row for each quad: see linear_integer
OFFSETS = {"int8": 384, "int4": 16, "int3": 8, "int2": 4}  # what kernels have added to q; see dequantize
MAGIC = {"int8": 0x43C00000, "int4": 0x41800000, "int3": 0x41000000, "int2": 0x40800000}  # the same as bits


def padded(k: int) -> int:
    """Columns in whole blocks, as packed rows and int8 activations have them."""
    return -(-k // 64) * 64


@dataclass(frozen=True)
class Matrix:
    """One weight matrix [n, k] in its stored layout.

    group: columns that share a scale, 32, 64, 128, or 0 for the whole row. data [n, row_bytes] uint8, but
    int8 for int8 and [n, k] of the format's own type for floats; scale [n, groups] f16, bf16 or f32; zero, of
    asymmetric integers: int8 [n, groups], or uint8 [n, ceil(groups / 2)] with even groups in the low nibbles.
    """

    format: str
    n: int
    k: int
    group: int
    symmetric: bool
    data: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        dtype = FLOATS.get(self.format, torch.int8 if self.format == "int8" else torch.uint8)
        columns = self.k if self.is_float else self.row_bytes
        _check("data", self.data, (self.n, columns), (dtype,))
        if self.has_scales:
            _check("scale", self.scale, (self.n, self.groups), tuple(FLOATS.values()))
        if not self.symmetric:
            packed = self.format != "int8"
            width = -(-self.groups // 2) if packed else self.groups
            _check("zero", self.zero, (self.n, width), (torch.uint8 if packed else torch.int8,))

    @property
    def is_float(self) -> bool:
        """Whether the weights are stored as they are."""
        return self.format in FLOATS

    @property
    def has_scales(self) -> bool:
        return not self.is_float

    @property
    def groups(self) -> int:
        return -(-self.k // self.group) if self.group else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of data; rows of all formats but floats have whole blocks of 64 columns."""
        columns = self.k if self.is_float else padded(self.k)
        return columns * BITS[self.format] // 8

    @property
    def bytes(self) -> int:
        """Bytes of all that a product reads."""
        tensors = (self.data, self.scale, self.zero)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def parts(self) -> int:
        return PARTS.get(self.format, 1)

    @property
    def width(self) -> int:
        """Columns of one part of a chunk."""
        return 4 if self.format == "f32" else 8

    @property
    def chunks(self) -> int:
        """Chunks of a row; the last one of a float row may be cut."""
        return -(-self.data.shape[1] // (12 if self.format == "int3" else self.width))


def meta_matrix(fmt: str, n: int, k: int, group: int = 0, symmetric: bool = True) -> Matrix:
    """A matrix on the device "meta", to plan with before its weights are read."""
    groups = -(-k // group) if group else 1

    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(n, width, dtype=dtype, device="meta")

    if fmt in FLOATS:
        return Matrix(fmt, n, k, 0, True, empty(k, FLOATS[fmt]))
    data = empty(padded(k) * BITS[fmt] // 8, torch.int8 if fmt == "int8" else torch.uint8)
    zero = None
    if not symmetric:
        zero = empty(groups, torch.int8) if fmt == "int8" else empty(-(-groups // 2), torch.uint8)
    return Matrix(fmt, n, k, group, symmetric, data, empty(groups, torch.float16), zero)


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    assert tensor is not None, f"a matrix of this format needs {name}"
    assert tuple(tensor.shape) == shape, f"{name}: expected {shape}, got {tuple(tensor.shape)}"
    assert tensor.dtype in dtypes, f"{name}: expected {dtypes}, got {tensor.dtype}"
    assert tensor.is_contiguous(), f"{name} must be contiguous"


def merge(segments: Sequence[Matrix]) -> list[Matrix]:
    """Segments one below the other, neighbours of one format made one matrix (copied: done once, at load).

    A launch costs microseconds and a short matrix does not fill a GPU, so q, k and v are one matrix where
    their formats agree. Scales of different types become f32, which holds them all exactly.
    """
    merged: list[Matrix] = []
    for segment in segments:
        if merged and _kind(merged[-1]) == _kind(segment):
            merged[-1] = _stack(merged[-1], segment)
        else:
            merged.append(segment)
    return merged


def _kind(matrix: Matrix) -> tuple[object, ...]:
    return matrix.format, matrix.k, matrix.groups, matrix.group, matrix.symmetric


def _stack(above: Matrix, below: Matrix) -> Matrix:
    scale, zero = above.scale, above.zero
    if scale is not None and below.scale is not None:
        same = scale.dtype == below.scale.dtype
        scale = torch.cat([scale, below.scale] if same else [scale.float(), below.scale.float()])
    if zero is not None and below.zero is not None:
        zero = torch.cat([zero, below.zero])
    data = torch.cat([above.data, below.data])
    return replace(above, n=above.n + below.n, data=data, scale=scale, zero=zero)
