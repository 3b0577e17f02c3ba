"""Matrices of an artifact in the layouts of ONNX operators, nothing rounded again.

`Blocks` is what MatMulNBits reads: rows in blocks of columns, unsigned integers of 2, 4 or 8 bits with the
lower column in the lower bits, a scale and a zero point for each block. `columns` is the transposed matrix
for DequantizeLinear and MatMul, of whole rows or blocks along the first axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from gristmill.export.onnx_graph import Graph
from gristmill.export.stored import Stored, scheme_of
from gristmill.quant import pack
from gristmill.runtime.program import Segment

Array = NDArray[Any]
ROW_BLOCK = 128  # columns of a block where the artifact has one scale for the whole row
SHIFTS = {"int8": 128, "int4": 0, "int3": 4, "int2": 0}  # what makes MatMulNBits' zero point the format's own
BITS = {"int8": 8, "int4": 4, "int3": 4, "int2": 2}
PLAIN_BITS = 4  # the fewest of a standard type
FLOATS = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Kind:
    """What segments have alike that one operator can multiply by together."""

    format: str
    block: int
    symmetric: bool
    k: int

    @staticmethod
    def of(segment: Segment) -> Kind:
        block = segment.group or ROW_BLOCK
        integer = scheme_of(segment).is_integer
        symmetric = segment.symmetric or not integer
        return Kind(segment.format, block if integer else segment.group, symmetric, segment.k)

    @property
    def bits(self) -> int:
        return BITS[self.format]

    @property
    def integer(self) -> bool:
        return self.format in BITS

    @property
    def blocks(self) -> int:
        return -(-self.k // self.block)


def runs(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Neighbours of one kind, whose rows can lie below each other."""
    found: list[list[Segment]] = []
    for segment in segments:
        if found and Kind.of(found[-1][0]) == Kind.of(segment):
            found[-1].append(segment)
        else:
            found.append([segment])
    return found


@dataclass(frozen=True)
class Blocks:
    """Names of initializers: data [N, blocks, bytes] u8, scale [N, blocks], zero or ""."""

    kind: Kind
    n: int
    data: str
    scale: str
    zero: str


def blocks(graph: Graph, stored: Stored, segments: Sequence[Segment], half: bool = False) -> Blocks:
    """Integer segments of one kind, their rows below each other; scales are f32, with `half` f16."""
    kind, n = Kind.of(segments[0]), sum(s.n for s in segments)
    name = "+".join(s.name for s in segments)
    suffixes = ("blocks", "block_scale_f16" if half else "block_scale", "block_zero")
    names = [f"{name}.{suffix}" for suffix in suffixes][: 2 if kind.symmetric else 3]
    if not graph.weights.tensors.keys() >= {*names}:
        parts = [_block_arrays(stored, segment, kind) for segment in segments]
        for at, initializer in enumerate(names):
            array = np.concatenate([part[at] for part in parts])
            graph.weights.add(initializer, array.astype(np.float16) if half and at == 1 else array)
    for initializer in names:
        graph.stored(initializer)
    return Blocks(kind, n, names[0], names[1], names[2] if len(names) > 2 else "")


def _block_arrays(stored: Stored, segment: Segment, kind: Kind) -> list[Array]:
    quantized, shift = stored.quantized(segment), SHIFTS[segment.format]
    middle = 1 << (kind.bits - 1)
    q = np.full((segment.n, kind.blocks * kind.block), middle, np.uint8)
    np.add(quantized.q.view(np.uint8), np.uint8(shift), out=q[:, : segment.k])  # modulo 256
    repeat = 1 if segment.group else kind.blocks
    data = pack_bits(q, kind.bits).reshape(segment.n, kind.blocks, -1)
    found = [data, np.repeat(quantized.scale.astype(np.float32), repeat, 1)]
    if quantized.zero is not None:
        zero = np.repeat(quantized.zero.view(np.uint8) + np.uint8(shift), repeat, 1)
        per_byte = 8 // kind.bits
        found.append(pack_bits(np.pad(zero, ((0, 0), (0, -zero.shape[1] % per_byte))), kind.bits))
    return found


def pack_bits(q: Array, bits: int) -> Array:
    """Unsigned integers [N, K] with so many bits each, the first of a byte lowest: [N, K * bits / 8]."""
    if bits == 8:
        return q
    per_byte = 8 // bits
    out = q[:, ::per_byte].copy()
    for at in range(1, per_byte):
        out |= q[:, at::per_byte] << (bits * at)
    return out


def float_columns(graph: Graph, stored: Stored, segments: Sequence[Segment]) -> str:
    """Segments of one float format [K, N], as they are stored."""
    kind, n = Kind.of(segments[0]), sum(s.n for s in segments)
    return _initializer(
        graph, "+".join(s.name for s in segments) + ".columns", FLOATS[kind.format], (kind.k, n),
        lambda: _joined([stored.tensor(f"{s.name}.weight") for s in segments]),
    )  # fmt: skip


def columns(graph: Graph, stored: Stored, segments: Sequence[Segment]) -> str:
    """A value [K, N] f32 that standard operators make of segments of one kind."""
    name, kind = "+".join(s.name for s in segments), Kind.of(segments[0])
    n = sum(s.n for s in segments)
    if kind.format in FLOATS:
        found = float_columns(graph, stored, segments)
        return found if kind.format == "f32" else graph.op("Cast", found, to=TensorProto.FLOAT)
    new = f"{name}.columns" not in graph.weights.tensors
    quantized = [stored.quantized(s) for s in segments] if new else []
    group, symmetric = segments[0].group, kind.symmetric
    data_kind, offset = _column_type(segments[0], symmetric)
    data = _initializer(
        graph, f"{name}.columns", data_kind, (kind.k, n),
        lambda: _packed(_joined([q.q for q in quantized]), data_kind, offset),
    )  # fmt: skip
    scale = _initializer(
        graph, f"{name}.column_scale", TensorProto.FLOAT, (segments[0].groups, n) if group else (n,),
        lambda: _joined([q.scale.astype(np.float32) for q in quantized]),
    )  # fmt: skip
    inputs = [data, scale]
    if not symmetric:
        shape = (segments[0].groups, n) if group else (n,)
        inputs.append(_initializer(
            graph, f"{name}.column_zero", data_kind, shape,
            lambda: _packed(_joined([q.zero for q in quantized if q.zero is not None]), data_kind, offset),
        ))  # fmt: skip
    if group:
        return graph.op("DequantizeLinear", *inputs, axis=0, block_size=group)
    return graph.op("DequantizeLinear", *inputs, axis=1)


def _column_type(segment: Segment, symmetric: bool) -> tuple[int, int]:
    """The type of stored numbers, and what is taken off ours: symmetric ones need no zero point."""
    if segment.format == "fp8":
        return TensorProto.FLOAT8E4M3FN, 0
    if segment.format == "int8":
        return TensorProto.INT8, 0
    return (TensorProto.INT4, scheme_of(segment).numbers.zero_point) if symmetric else (TensorProto.UINT4, 0)


def _joined(parts: Sequence[Array]) -> Array:
    """Rows below each other, then transposed: [K, N]."""
    return np.ascontiguousarray(np.concatenate(parts).T)


def _packed(q: Array, kind: int, offset: int) -> Array:
    """The bytes of a tensor of this type; 4-bit numbers two a byte in the order of the whole tensor."""
    if kind not in (TensorProto.INT4, TensorProto.UINT4):
        return q
    flat = (q.reshape(1, -1).astype(np.int16) - offset).astype(np.uint8) & 15
    return pack_bits(np.pad(flat, ((0, 0), (0, flat.size % 2))), 4)[0]


def _initializer(graph: Graph, name: str, kind: int, shape: tuple[int, ...], make: Any) -> str:
    if name not in graph.weights.tensors:
        graph.weights.add(name, make(), kind, shape)
    return graph.stored(name)


def embedded(graph: Graph, stored: Stored, segment: Segment, ids: str) -> str:
    """Rows `ids` [B, S] int64 of a matrix, [B, S, k] f32: gathered as stored, then made floats."""
    kind = Kind.of(segment)
    if kind.integer:
        return _integer_rows(graph, blocks(graph, stored, [segment]), ids)
    if segment.format == "fp8":
        return _fp8_rows(graph, stored, segment, ids)
    weight = _initializer(graph, f"{segment.name}.rows", FLOATS[segment.format], (segment.n, segment.k),
                          lambda: stored.tensor(f"{segment.name}.weight"))  # fmt: skip
    rows: str = graph.op("Gather", weight, ids, axis=0)
    return rows if segment.format == "f32" else graph.op("Cast", rows, to=TensorProto.FLOAT)


def _integer_rows(graph: Graph, matrix: Blocks, ids: str) -> str:
    kind = matrix.kind
    q = _fields(graph, graph.op("Gather", matrix.data, ids, axis=0), kind.bits, kind.blocks, kind.block)
    if matrix.zero:
        stored = kind.blocks + -kind.blocks % (8 // kind.bits)
        zero = _fields(graph, graph.op("Gather", matrix.zero, ids, axis=0), kind.bits, stored)
        zero = _first_columns(graph, zero, kind.blocks, stored)
        zero = graph.op("Unsqueeze", zero, graph.integers(-1))
    else:
        zero = graph.constant(1 << (kind.bits - 1))
    scale = graph.op("Unsqueeze", graph.op("Gather", matrix.scale, ids, axis=0), graph.integers(-1))
    values = graph.op("Mul", graph.op("Sub", q, zero), scale)
    width = kind.blocks * kind.block
    return _first_columns(graph, graph.op("Reshape", values, graph.integers(0, 0, width)), kind.k, width)


def _fields(graph: Graph, data: str, bits: int, *shape: int) -> str:
    """The integers of bytes [B, S, ...], as floats [B, S, *shape]."""
    if bits < 8:
        mask, last, parts = graph.constant((1 << bits) - 1, np.uint8), graph.integers(-1), []
        for shift in range(0, 8, bits):
            by = graph.constant(shift, np.uint8)
            part = graph.op("BitShift", data, by, direction="RIGHT") if shift else data
            parts.append(graph.op("Unsqueeze", graph.op("BitwiseAnd", part, mask), last))
        data = graph.op("Reshape", graph.op("Concat", *parts, axis=-1), graph.integers(0, 0, *shape))
    found: str = graph.op("Cast", data, to=TensorProto.FLOAT)
    return found


def _fp8_rows(graph: Graph, stored: Stored, segment: Segment, ids: str) -> str:
    """Bytes of e4m3 by a table of their 256 values."""
    from gristmill.quant.e4m3 import VALUES

    weight = _initializer(graph, f"{segment.name}.rows", TensorProto.UINT8, (segment.n, segment.k),
                          lambda: stored.tensor(f"{segment.name}.weight")[:, : segment.k])  # fmt: skip
    scale = _initializer(graph, f"{segment.name}.row_scale", TensorProto.FLOAT, (segment.n, segment.groups),
                         lambda: stored.tensor(f"{segment.name}.scale").astype(np.float32))  # fmt: skip
    table = graph.constant(np.nan_to_num(VALUES, nan=480.0))
    bits = graph.op("Cast", graph.op("Gather", weight, ids, axis=0), to=TensorProto.INT64)
    q = graph.op("Gather", table, bits)
    scales = graph.op("Gather", scale, ids, axis=0)
    if segment.group:
        columns_of = graph.constant(np.arange(segment.k) // segment.group, np.int64)
        scales = graph.op("Gather", scales, columns_of, axis=-1)
    found: str = graph.op("Mul", q, scales)
    return found


def _first_columns(graph: Graph, x: str, count: int, of: int) -> str:
    if count == of:
        return x
    bounds = (graph.integers(0), graph.integers(count), graph.integers(-1))
    found: str = graph.op("Slice", x, *bounds)
    return found


def float_values(array: Array) -> Array:
    """A vector f32, of whatever float type it is stored in."""
    return pack.decode_float(array)
