"""The grid of a sweep: every combination that differs, once."""

from __future__ import annotations

import pytest

from gristmill.compiler.options import CompileOptions
from gristmill.report.configurations import DEFAULT, Configuration, grid, split
from gristmill.runtime.errors import GristmillError


def test_methods_matter_for_integers_only() -> None:
    found = grid(("f16", "int4", "fp8"), ("rtn", "gptq"), ("f16", "int8"))
    assert [c.name for c in found] == [
        "f16-kv-f16", "f16-kv-int8", "int4-rtn-kv-f16", "int4-rtn-kv-int8", "int4-gptq-kv-f16",
        "int4-gptq-kv-int8", "fp8-kv-f16", "fp8-kv-int8",
    ]  # fmt: skip
    assert grid(("int4", "int4"), ("rtn", "rtn"), ("f16",)) == (Configuration("int4", "rtn", "f16"),)


def test_defaults_where_nothing_or_something_is_asked() -> None:
    assert [(c.weights, c.method, c.kv) for c in grid()] == list(DEFAULT)
    assert [c.name for c in grid(weights=("int3",))] == ["int3-rtn-kv-f16", "int3-gptq-kv-f16"]
    assert [c.label for c in grid(kv=("int8",), methods=("rtn",), weights=("f16",))] == ["f16, KV int8"]


def test_every_point_of_the_grid_compiles_by_its_options() -> None:
    for configuration in grid(("f16", "int4"), ("rtn", "awq+gptq"), ("f16", "int8/int4")):
        options = CompileOptions.of(**configuration.compile_options())
        assert options.weights == configuration.weights and str(options.cache_format) == configuration.kv
        assert options.method == (configuration.method or "rtn")


def test_a_point_is_asked_for_by_its_words() -> None:
    for configuration in grid(("f16", "int4"), ("gptq",), ("int8/int4",)):
        words = configuration.sweep_options()
        asked = {name.removeprefix("--"): split(value) for name, value in zip(words[::2], words[1::2])}
        assert grid(**asked) == (configuration,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": ("int5",)}, "--weights has 'int5', expected some of f32, bf16, f16, fp8, int8"),
        ({"methods": ("gtpq",)}, "--methods has 'gtpq', expected some of rtn, rtn\\+search, gptq"),
        ({"kv": ("int3",)}, "--kv has 'int3', expected some of f32, f16, int8, fp8, int4$"),
        ({"weights": ()}, "--weights is empty"),
    ],
)
def test_unknown_names(given: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        grid(**given)


def test_split() -> None:
    assert split("f16, int8,,int4 ") == ("f16", "int8", "int4")
    assert split(None) is None and split(" ") == ()
