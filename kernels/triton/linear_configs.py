"""How a product is cut into programs: a table for known GPUs, and the candidates that `tune` times.

The table was chosen on paper for the H100 and H200 (132 multiprocessors, 64 k registers and 227 KiB each;
3.35 and 4.8 TB/s). Reading at full speed takes some 40 to 64 KiB in flight per multiprocessor. In decoding a
thread has ROWS * CHUNKS / threads chunks of 8 bytes (16 of 16-bit weights) in flight, so a program of 128
threads with 8 rows has 8 KiB (16 KiB), and 72 registers let 7 of them run on a multiprocessor. Splits of k,
which cost a second kernel, are for matrices with too few rows to give every multiprocessor such programs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .matrix import WORDS, Matrix

MULTIPROCESSORS = 132
DECODE_TOKENS = 4  # up to here without tensor cores
BUCKETS = (1, 2, 4, 16, 64, 128)  # of tokens, that the table tells apart; beyond the last the last


@dataclass(frozen=True)
class Config:
    """One way to cut a product.

    rows: of the weight, per program (with a gated pair half of them are gates); tokens: of x, per program, 0
    for the kernel without tensor cores, which takes all; chunks: of a row, per step; splits: of a row's
    chunks, each to a program of its own; dense: dequantize the whole matrix and let cuBLAS multiply;
    integer: multiply int8 activations, by dp4a, of which `chunks` are quads, or with chunks 0 on the tensor
    cores; registers: of a thread at most, 0 as the assembler likes.
    """

    rows: int
    chunks: int
    tokens: int = 0
    splits: int = 1
    warps: int = 4
    stages: int = 3
    dense: bool = False
    integer: bool = False
    registers: int = 0


# family of formats -> bucket -> config
TABLE: dict[str, dict[int, Config]] = {
    "f32": {
        1: Config(4, 128), 2: Config(4, 128), 4: Config(4, 128), 16: Config(32, 8, 16),
        64: Config(32, 8, 32), 128: Config(64, 8, 64),
    },
    "16": {
        1: Config(4, 128), 2: Config(4, 128), 4: Config(4, 128), 16: Config(64, 16, 16, stages=4),
        64: Config(64, 8, 64, stages=4), 128: Config(128, 8, 128, warps=8),
    },
    "8": {
        1: Config(8, 128), 2: Config(8, 128), 4: Config(4, 128), 16: Config(64, 16, 16, stages=4),
        64: Config(64, 16, 64), 128: Config(128, 8, 128, warps=8),
    },
    "int4": {
        1: Config(8, 128), 2: Config(8, 128), 4: Config(4, 128), 16: Config(64, 16, 16, stages=4),
        64: Config(64, 8, 64), 128: Config(128, 8, 128, warps=8),
    },
    "int3": {
        1: Config(8, 64, warps=2), 2: Config(4, 64, warps=2), 4: Config(4, 64, warps=2),
        16: Config(64, 8, 16), 64: Config(64, 8, 64), 128: Config(128, 8, 128, warps=8, stages=2),
    },
    "int2": {
        1: Config(8, 64, warps=2), 2: Config(4, 64, warps=2), 4: Config(4, 64, warps=2),
        16: Config(64, 8, 16), 64: Config(64, 8, 64), 128: Config(128, 8, 128, warps=8, stages=2),
    },
}  # fmt: skip
# The same for int8 activations, by the tokens of a program; of one the fastest on an H200 for the matrices of
# Llama 3.1 8B, but for wide and long ones. Of 5 and more where tensor cores do not take it.
INTEGER_TABLE: dict[int, Config] = {
    1: Config(4, 64, 1, warps=2, integer=True), 2: Config(4, 64, 2, warps=2, integer=True),
    4: Config(4, 64, 4, warps=2, integer=True), 8: Config(2, 32, 8, warps=1, integer=True),
}  # fmt: skip
INTEGER_TILE = Config(64, 0, 16, warps=4, stages=4, integer=True)
INTEGER_WIDE = 16384  # rows from which a program of one token takes 8
INTEGER_LONG = 256  # quads of a row beyond which it takes as many in a step
INTEGER_TOKENS = 32  # up to here
DENSE_TOKENS = 33  # from here on
DENSE_FLOAT_TOKENS = 5  # of weights that cuBLAS can take as they are
DENSE_BYTES = 512 << 20  # of a matrix at most, dequantized
FAMILIES = {"bf16": "16", "f16": "16", "int8": "8", "fp8": "8"}


def bucket(tokens: int) -> int:
    """The row of the table for this many tokens."""
    return next((b for b in BUCKETS if tokens <= b), BUCKETS[-1])


def choose(
    matrix: Matrix, tokens: int, act_group: int = 0, multiply: torch.dtype = torch.bfloat16
) -> Config:
    """The table's config for a matrix; where that leaves a GPU idle, smaller programs, then splits.

    act_group: columns that share a scale of activations in int8, 0 for floats.
    """
    if act_group and tokens <= INTEGER_TOKENS:
        return _choose_integer(matrix, tokens, act_group)
    config = TABLE[FAMILIES.get(matrix.format, matrix.format)][bucket(tokens)]
    if is_dense(matrix, tokens, multiply):
        return replace(config, dense=True)
    while not config.tokens and config.rows > 2 and _programs(matrix, tokens, config) < 2 * MULTIPROCESSORS:
        config = replace(config, rows=config.rows // 2)
    return replace(config, splits=_splits(matrix, tokens, config))


def is_dense(matrix: Matrix, tokens: int, multiply: torch.dtype) -> bool:
    """Whether cuBLAS is faster, with the time to dequantize for it."""
    if matrix.format == "f32" or 2 * matrix.n * matrix.k > DENSE_BYTES:
        return False
    as_it_is = matrix.is_float and matrix.data.dtype == multiply
    return tokens >= (DENSE_FLOAT_TOKENS if as_it_is else DENSE_TOKENS)


def _choose_integer(matrix: Matrix, tokens: int, act_group: int) -> Config:
    if tokens > DECODE_TOKENS and has_tiles(matrix, act_group):
        splits, programs = 1, _programs(matrix, tokens, INTEGER_TILE)
        while splits < 8 and programs * splits < 2 * MULTIPROCESSORS and matrix.k >= 8 * splits * act_group:
            splits *= 2
        return replace(INTEGER_TILE, splits=splits)
    config = INTEGER_TABLE[min(8, 1 << (tokens - 1).bit_length())]
    # where a product also prepares the next one's input, the assembler would take half as many more registers
    few = 64 if matrix.format in ("int4", "int8") else 0
    if tokens == 1 and quads(matrix) > INTEGER_LONG:
        config = Config(8, 256, 1, warps=8, integer=True, registers=few)
    elif tokens == 1 and matrix.format == "int8":
        config = Config(4, 128, 1, warps=2, integer=True)
    elif tokens == 1 and matrix.n >= INTEGER_WIDE:
        config = replace(config, rows=8, registers=few)
    while config.rows > 2 and _programs(matrix, tokens, config) < 2 * MULTIPROCESSORS:
        config = replace(config, rows=config.rows // 2)
    return config


def has_tiles(matrix: Matrix, group: int) -> bool:
    """Whether the kernel on tensor cores takes it, beside int8 activations in groups of as many columns."""
    return matrix.format == "int8" or (matrix.format == "int4" and group >= 64)


def quads(matrix: Matrix) -> int:
    """Pieces of a row that a thread of the product by dp4a loads at once."""
    return matrix.row_bytes // (4 * WORDS[matrix.format])


def _programs(matrix: Matrix, tokens: int, config: Config) -> int:
    return -(-matrix.n // config.rows) * (-(-tokens // config.tokens) if config.tokens else 1)


def _splits(matrix: Matrix, tokens: int, config: Config) -> int:
    """As many as make more programs than multiprocessors, of two steps at least (a power of two up to 16)."""
    programs, steps = _programs(matrix, tokens, config), -(-matrix.chunks // config.chunks)
    splits = 1
    while splits < 16 and programs * splits <= MULTIPROCESSORS and steps >= splits * 4:
        splits *= 2
    return splits


def candidates(matrix: Matrix, tokens: int, glu: bool = False, act_group: int = 0) -> list[Config]:
    """What is worth timing on a real device: the table's config and its neighbours; glu: of a gated pair, of
    which a program takes two rows at least.
    """
    base = choose(matrix, tokens, act_group)
    found = [base]
    if base.dense:  # its neighbours are of the kernel that it stands for
        base = replace(base, dense=False)
    base = replace(base, registers=0)
    for rows in (base.rows // 2, base.rows, base.rows * 2):
        for chunks in dict.fromkeys((base.chunks // 2, base.chunks, base.chunks * 2)):
            for warps in (base.warps, base.warps * 2):
                found.append(replace(base, rows=rows, chunks=chunks, warps=warps))
    if not base.tokens or base.integer:
        found += [replace(base, splits=splits) for splits in (1, 2, 4, 8)]
    if base.tokens and not (base.integer and base.chunks):
        found += [replace(base, stages=stages) for stages in (2, 3, 4, 5)]
    tiled = base.tokens and (not base.integer or not base.chunks)
    least = 16 if tiled else 2 if glu else 1  # rows of a tile that tensor cores take
    return list(dict.fromkeys(c for c in found if c.rows >= least and (c.chunks or not base.chunks)))
