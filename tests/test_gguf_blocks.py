"""Blocks of a GGUF against the gguf package's own reading of them, and in our formats."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from gristmill.quant.formats import gguf as matrices
from gristmill.quant.formats import gguf_blocks
from gristmill.quant.formats.gguf_blocks import BLOCKS, COLUMNS, Array, Levels
from gristmill.runtime.errors import GristmillError

N, K = 5, 224  # no multiple of 64 or 128


def random_levels(kind: str, seed: int = 0) -> Levels:
    random, block = np.random.default_rng(seed), BLOCKS[kind]
    scale = random.normal(size=(N, K // COLUMNS)).astype(np.float16)
    level = random.integers(block.low, block.high + 1, (N, K))
    return Levels(level, scale, np.flip(scale, 1).copy() if block.affine else None)


def as_gguf_reads(kind: str, packed: Array) -> Array:
    values: Array = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind.upper()])
    return values


@pytest.mark.parametrize("kind", BLOCKS)
def test_packed_rows_are_what_gguf_reads(kind: str) -> None:
    levels = random_levels(kind)
    packed = gguf_blocks.pack(kind, levels)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]] == (COLUMNS, BLOCKS[kind].nbytes)
    np.testing.assert_array_equal(as_gguf_reads(kind, packed), gguf_blocks.values(levels))
    again = gguf_blocks.unpack(kind, packed)
    np.testing.assert_array_equal(again.level, levels.level)
    np.testing.assert_array_equal(again.scale, levels.scale)
    np.testing.assert_array_equal(gguf_blocks.scales(kind, packed), levels.scale)


@pytest.mark.parametrize("kind, stored", [("q8_0", "int8-g32"), ("q4_0", "int4-g32"), ("q5_0", "int8-g32")])
def test_fixed_zeros_are_kept(kind: str, stored: str) -> None:
    packed = gguf_blocks.pack(kind, random_levels(kind))
    found = matrices.read_weight(kind, "w", K, lambda: packed)
    assert found is not None and str(found.scheme) == stored
    np.testing.assert_array_equal(found.dequantize(), as_gguf_reads(kind, packed))


@pytest.mark.parametrize("group", [32, 64, 128, 0])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q5_0", "q4_1", "q5_1"])
def test_groups_are_as_wide_as_a_scale_repeats(kind: str, group: int) -> None:
    """Minima that are -scale times an integer are zero points; narrow levels of q5_0 are int4."""
    random, block = np.random.default_rng(1), BLOCKS[kind]
    groups = -(-K // (group or K))

    def spread(values: Array) -> Array:
        return np.repeat(values, (group or K) // COLUMNS, axis=1)[:, : K // COLUMNS]

    scale = spread(np.ldexp(1.5, random.integers(-9, 9, (N, groups))).astype(np.float16))
    zero = spread(random.integers(1, 8, (N, groups)))
    level = random.integers(0, 16, (N, K)) - (0 if block.affine else np.repeat(zero, COLUMNS, 1))
    level = np.clip(level, block.low, block.high)
    levels = Levels(level, scale, (-scale * zero).astype(np.float16) if block.affine else None)
    packed = gguf_blocks.pack(kind, levels)
    found = matrices.read_weight(kind, "w", K, lambda: packed)
    assert found is not None and found.scheme is not None
    assert found.scheme.group_size == group
    assert found.scheme.format == ("int4" if kind in ("q4_0", "q5_0", "q4_1") else "int8")
    assert found.scheme.symmetric == (kind in ("q8_0", "q4_0"))
    np.testing.assert_array_equal(found.dequantize(), as_gguf_reads(kind, packed))
    rows = found.select([3, 0])
    np.testing.assert_array_equal(rows.dequantize(), as_gguf_reads(kind, packed)[[3, 0]])


@pytest.mark.parametrize("kind", ["q4_1", "q5_1"])
def test_other_minima_fit_no_format(kind: str) -> None:
    w = np.random.default_rng(2).normal(size=(N, K)).astype(np.float32)
    packed = gguf.quantize(w, gguf.GGMLQuantizationType[kind.upper()])
    assert matrices.read_weight(kind, "w", K, lambda: packed) is None


def test_scales_that_are_not_finite_are_refused() -> None:
    levels = random_levels("q4_0")
    levels.scale[1, 2] = np.nan
    packed = gguf_blocks.pack("q4_0", levels)
    with pytest.raises(GristmillError, match="w: its scales hold NaN"):
        matrices.read_weight("q4_0", "w", K, lambda: packed)
