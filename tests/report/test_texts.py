"""Numbers as they are written, and texts that a page shows as they stand."""

from __future__ import annotations

import math

import pytest

from gristmill.report import units
from gristmill.report.clean import clean, context, visible
from gristmill.report.tables import Number, Small, Text, join, say, slug


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1234.5, "tok/s", "1,234"),
        (48.149, "tok/s", "48.1"),
        (0.01234, "nats", "0.0123"),
        (9.9999, "nats", "10.0"),
        (1.04e-7, "nats", "1.0e−7"),
        (0, "nats", "0"),
        (-0.0012, "increase", "−0.12 %"),
        (0.0041, "increase", "+0.41 %"),
        (0.123, "increase", "+12.3 %"),
        (0.00004, "increase", "+0.004 %"),
        (0.5, "share", "50.0 %"),
        (0.0314, "share", "3.1 %"),
        (3.2e-9, "seconds", "3.20 ns"),
        (0.0214, "seconds", "21.4 ms"),
        (0.9999, "seconds", "1.00 s"),
        (514.2, "seconds", "8.57 min"),
        (7300.0, "seconds", "2.03 h"),
        (0, "seconds", "0"),
        (632_291_328, "bytes", "603 MiB"),
        (1024 * 1024 - 1, "bytes", "1.00 MiB"),
        (512, "bytes", "512 B"),
        (31e9, "bytes/s", "31.0 GB/s"),
        (999.9e9, "ops/s", "1.00 Top/s"),
        (3.068, "factor", "3.07 ×"),
        (16384, "count", "16,384"),
        (0.01, "limit", "1 %"),
        (math.inf, "nats", "∞"),
        (math.nan, "increase", "not a number"),
    ],
)
def test_numbers_are_read_at_a_glance(value: float, unit: units.Unit, text: str) -> None:
    assert units.text(value, unit).replace("\u00a0", " ") == text


def test_hidden_characters_are_shown_as_codes() -> None:
    assert clean("a\x1b[31m\u202eb\ud800\u2028\n") == "a‹U+001B›[31m‹U+202E›b‹U+D800›‹U+2028›\n"
    assert clean("naïve 日本 🙂 <&>") == "naïve 日本 🙂 <&>"


def test_white_space_of_tokens_is_seen() -> None:
    assert visible(" a\n\t\r\u00a0") == "␣a⏎⇥␍‹U+00A0›"
    assert context("  if x:\n  y ") == "␣␣if x:⏎␣␣y␣"


def test_texts_keep_their_numbers() -> None:
    text = say("{} at {}{}", "int4 {}", Number(3.1, "factor"), Small(say("{}", Number(0.2, "nats"))))
    assert str(text) == "int4 {} at 3.10\u00a0× (0.200)"
    assert [number.value for number in text.numbers] == [3.1, 0.2]
    assert str(join([text, Text(("b",))], "; ")) == f"{text}; b"
    with pytest.raises(AssertionError, match="has 1 gaps, got 2 parts"):
        say("{}", "a", "b")


def test_names_make_ids_that_differ() -> None:
    assert slug("int4-gptq") == "int4-gptq"
    assert slug("a b") != slug("a/b") and '"' not in slug('a"b')
