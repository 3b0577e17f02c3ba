"""Schemes: reading, writing, counting bits, and the activation group that goes with them."""

import pytest

from gristmill.quant.scheme import FORMATS, GROUP_SIZES, Scheme, activation_group, parse
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import BLOCK_BYTES, FLOAT_BYTES, Segment, segment_row_bytes

ALL = [Scheme(f) for f in FORMATS] + [
    Scheme(name, group, symmetric)
    for name, numbers in FORMATS.items()
    for group in (0, *GROUP_SIZES)
    for symmetric in (True, False)
    if numbers.integer or (numbers.scaled and symmetric)
]


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_text_reads_back(scheme: Scheme) -> None:
    assert parse(str(scheme)) == scheme


def test_options_fill_in_what_the_text_leaves_unsaid() -> None:
    assert parse("int4") == Scheme("int4", 128, True)
    assert parse("int4", group_size=0) == Scheme("int4", 0, True)
    assert parse("int8") == Scheme("int8", 0, True)
    assert parse(" INT4 ", group_size=32, symmetric=False) == Scheme("int4", 32, False)
    assert parse("int4-g64-sym", group_size=32, symmetric=False) == Scheme("int4", 64, True)


@pytest.mark.parametrize(
    ("text", "group_size", "symmetric", "says"),
    [
        ("int5", None, None, "unknown weight format 'int5'"),
        ("int4-g48", None, None, "group size 48"),
        ("int4", 256, None, "group size 256"),
        ("int4-64", None, None, "'64' is not"),
        ("bf16", 64, None, "no groups"),
        ("f32", None, False, "no zero points"),
        ("fp8-asym", None, None, "no zero points"),
        ("int1", None, None, "expected one of f32, bf16, f16, fp8, int8, int4, int3, int2"),
    ],
)
def test_refuses(text: str, group_size: int | None, symmetric: bool | None, says: str) -> None:
    with pytest.raises(GristmillError, match=says):
        parse(text, group_size, symmetric)


def test_a_group_as_wide_as_the_row_is_the_row() -> None:
    assert Scheme("int4", 64).normalize(64) == Scheme("int4", 0)
    assert Scheme("int4", 64).normalize(65) == Scheme("int4", 64)
    assert [Scheme("int4", 64).groups(k) for k in (1, 64, 65, 129)] == [1, 1, 2, 3]


def test_bits_per_weight_count_scales_and_zeros() -> None:
    assert parse("int4-g128").bits_per_weight(2048) == 4.125
    assert parse("int4-g32-asym").bits_per_weight(2048) == 4 + 20 / 32
    assert parse("int8").bits_per_weight(64) == 8.25
    assert parse("int8-g64-asym").bits_per_weight(96) == 8 + 2 * 24 / 96
    assert parse("bf16").bits_per_weight(7) == 16
    assert parse("int3").bits_per_weight(2048) == 3.125
    assert parse("int2-g32-asym").bits_per_weight(2048) == 2 + 20 / 32  # zeros are nibbles here, too
    assert parse("fp8").bits_per_weight(64) == 8.25
    assert parse("fp8-g32").bits_per_weight(64) == 8.5


def test_the_runtime_knows_every_format() -> None:
    assert set(FLOAT_BYTES) | set(BLOCK_BYTES) == set(FORMATS)
    assert set(BLOCK_BYTES) == {name for name, numbers in FORMATS.items() if numbers.scaled}


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_the_runtime_counts_the_bytes_of_a_row_as_the_scheme_counts_bits(scheme: Scheme) -> None:
    segment = Segment("w", scheme.format, 1, 1024, scheme.group_size, scheme.symmetric)
    zero_bits = 0 if scheme.symmetric else scheme.numbers.zero_bits * scheme.groups(1024)
    rounded_up = -zero_bits % 8  # to whole bytes
    assert segment_row_bytes(segment) * 8 == scheme.bits_per_weight(1024) * 1024 + rounded_up


@pytest.mark.parametrize(
    ("texts", "k", "group"),
    [
        (["int4-g128"], 2048, 128),
        (["int4-g64"], 2048, 64),
        (["int4-g32-asym", "int4-g128"], 2048, 32),
        (["int8"], 2048, 64),
        (["int8", "int4-g128"], 2048, 64),
        (["int4-g128"], 300, 128),
        (["int8"], 300, 64),
        (["int8"], 200, 0),  # narrow
        (["f32", "bf16"], 2048, 0),
        (["int3", "int2-g64-asym"], 2048, 64),
        (["int2-row"], 2048, 64),
        (["fp8", "fp8-g32", "bf16"], 2048, 0),
    ],
)
def test_activation_group(texts: list[str], k: int, group: int) -> None:
    assert activation_group([parse(t) for t in texts], k) == group


def test_a_linear_is_integer_or_float() -> None:
    with pytest.raises(GristmillError, match="mixture"):
        activation_group([parse("int8"), parse("f16")], 64)
    with pytest.raises(GristmillError, match="mixture"):
        activation_group([parse("int3"), parse("fp8")], 64)
    with pytest.raises(GristmillError, match="none"):
        activation_group([], 64)
