"""request: sizes, averages and patterns from text."""

import pytest

from gristmill.quant.request import (
    Keep,
    budget_of_bits,
    budget_of_size,
    keep_scheme,
    matrix_bits,
    parse_bits,
    parse_keep,
    parse_size,
    refuse_unmatched,
)
from gristmill.quant.scheme import parse
from gristmill.runtime.errors import GristmillError

ROLES = {
    "model.embed_tokens": "embedding", "lm_head": "head", "model.layers.0.mlp.down_proj": "linear",
    "model.layers.0.mlp.gate_proj": "linear", "model.layers.1.mlp.down_proj": "linear",
}  # fmt: skip


@pytest.mark.parametrize("text, expected", [
    ("400MB", 400_000_000), ("400 mb", 400_000_000), ("1.5GiB", 3 << 29), ("900kB", 900_000),
    ("12KiB", 12288), ("4096", 4096), ("7B", 7),
])  # fmt: skip
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "400 MB 2", "4 TB", "1e6", "0MB", "nan", ".5MB"])
def test_what_is_no_size(text):
    with pytest.raises(GristmillError, match="expected a number of bytes"):
        parse_size(text)


def test_bits():
    assert parse_bits("3.5") == parse_bits(3.5) == 3.5
    assert budget_of_bits(3.5, 1001) == 3503


@pytest.mark.parametrize("text", ["0", "-1", "33", "nan", "inf", "3,5", "", True])
def test_what_is_no_average(text):
    with pytest.raises(GristmillError, match="expected an average per weight"):
        parse_bits(text)


def test_a_size_beside_what_is_fixed():
    assert budget_of_size(1000, 900) == 800
    with pytest.raises(GristmillError, match="leaves nothing"):
        budget_of_size(900, 900)


def test_bits_of_a_matrix():
    assert matrix_bits(parse("int4-g64"), 10, 130) == 10 * (130 * 4 + 3 * 16)
    assert matrix_bits(parse("int4-g64-asym"), 10, 130) == 10 * (130 * 4 + 3 * 20)
    assert matrix_bits(parse("f16"), 3, 7) == 3 * 7 * 16


def test_keeps():
    keeps = [parse_keep(t) for t in ("f16:head", "int8:*.down_proj", " int4-g32-asym : model.layers.1.* ")]
    assert keeps[2] == Keep("int4-g32-asym", "model.layers.1.*")
    found = {name: keep_scheme(keeps, name, role) for name, role in ROLES.items()}
    assert found == {
        "model.embed_tokens": None, "lm_head": "f16", "model.layers.0.mlp.down_proj": "int8",
        "model.layers.0.mlp.gate_proj": None, "model.layers.1.mlp.down_proj": "int4-g32-asym",
    }  # fmt: skip
    refuse_unmatched(keeps, ROLES)
    assert keep_scheme([parse_keep("int8:model.layers.0.mlp.gate_proj.weight")], *list(ROLES.items())[3])


@pytest.mark.parametrize("text", ["f16", "f16:", ":head", ""])
def test_what_is_no_keep(text):
    with pytest.raises(GristmillError, match="expected FORMAT:PATTERN"):
        parse_keep(text)


def test_an_unknown_format_in_a_keep():
    with pytest.raises(GristmillError, match="unknown weight format 'int5'"):
        parse_keep("int5:head")


@pytest.mark.parametrize("text, near", [
    ("f16:haed", "has head"), ("f16:*.down_prj", r"has \*\.down_proj"),
    ("f16:model.layers.*.mlp.dwn_proj", r"has \*\.down_proj"),
    ("f16:model.layers.2.mlp.down_proj", r"model\.layers\.1\.mlp\.down_proj"),
    ("f16:xyzzy", r"has embedding, head, linear, \*\.embed_tokens, \*\.lm_head, \*\.down_proj"),
    ("f16:*.Down_proj", r"has \*\.down_proj"),
])  # fmt: skip
def test_a_pattern_that_matches_nothing_names_near_ones(text, near):
    with pytest.raises(GristmillError, match=near) as caught:
        refuse_unmatched([parse_keep("f16:head"), parse_keep(text)], ROLES)
    assert f"keep {text!r} matches no weight matrix" in str(caught.value)
