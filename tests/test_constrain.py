"""Constrained decoding: whatever the logits, the text is what was asked for."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from gristmill.runtime.decoding.chooser import Chooser
from gristmill.runtime.decoding.constrain import Constrainer, Constraint
from gristmill.runtime.decoding.options import GenerationOptions
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.tokenizer import Tokenizer

EXAMPLE = (Path(__file__).parents[1] / "examples" / "py7m" / "tokenizer.json").read_bytes()
TOKENIZER = Tokenizer(EXAMPLE)
V = 4100  # four ids more than the tokenizer has
EOS = 0
EXAMPLES = Constrainer(EXAMPLE, [EOS], V)


def write(constraint: Constraint, seed: int, limit: int = 300, **options: Any) -> tuple[str, bool]:
    """A text for random logits, and whether it came to its end."""
    random, ids = np.random.default_rng(seed), list[int]()
    chooser = Chooser(GenerationOptions.of(**{"temperature": 1.0, **options}), [], seed, 0, [EOS], V)
    while not constraint.finished and len(ids) < limit:
        mask = constraint.mask()
        assert mask.shape == (V,) and mask.any() and not mask[TOKENIZER.size :].any()
        token = chooser.choose(random.normal(0, 2, V).astype(np.float32), len(ids), mask).token
        for taker in (constraint, chooser):
            taker.accept(token)
        ids += [token] if token != EOS else []
    return TOKENIZER.decode(ids, skip_special_tokens=False), constraint.finished


REGEXES = [
    r"[a-z]{2,5}=[0-9]{1,4};",
    r"(def|class) [A-Z][A-Za-z0-9_]{0,8}:\n",
    r"[0-9]{4}-[0-9.]{2}/[0-9]{2}",
    r"(yes|no)( maybe){0,3}",
    r"[é-ü☃😀]{1,6}",
    r"(#[^\n]{0,20}\n){1,3}",
]


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
def test_texts_match_their_regex(regex: str, options: dict[str, Any]) -> None:
    compiled = EXAMPLES.constraint("regex", regex)
    for seed in range(5):
        text, finished = write(compiled.copy(), seed, **options)
        assert finished and re.fullmatch(regex, text), text


def test_masks_computed_ahead_are_those_computed_when_asked_for() -> None:
    constraint = EXAMPLES.constraint("regex", REGEXES[0])
    ahead = constraint.copy()
    while not constraint.finished:
        ahead.prepare()
        ahead.prepare()
        other = ahead.copy()
        mask = constraint.mask()
        np.testing.assert_array_equal(ahead.mask(), mask)
        np.testing.assert_array_equal(other.mask(), mask)
        token = int(np.flatnonzero(mask)[0])
        constraint.accept(token)
        ahead.accept(token)
    ahead = EXAMPLES.constraint("regex", "a+").copy()
    ahead.accept(int(np.flatnonzero(ahead.mask())[0]))
    ahead.prepare()
    assert ahead._ahead is not None
    ahead._ahead.result()  # no thread of another library's is to hold a lock now
    child = os.fork()
    if child == 0:  # the thread that computes is not here
        EXAMPLES.after_fork()
        os._exit(0 if ahead.mask().any() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_digits_are_ascii() -> None:
    """Unicode has hundreds more, which no date and no number means; a class of them and its opposite too."""
    compiled = EXAMPLES.constraint("regex", r"\d{4}-[\d.]{2}/\d\D")
    texts = [write(compiled.copy(), seed)[0] for seed in range(30)]
    assert all(re.fullmatch(r"[0-9]{4}-[0-9.]{2}/[0-9][^0-9]", text) for text in texts), texts


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6), st.integers(0, 99))
def test_texts_are_one_of_the_choices(choices: list[str], seed: int) -> None:
    """Quotes, escapes and control characters included, and choices that begin another."""
    text, finished = write(EXAMPLES.constraint("choices", choices), seed)
    assert finished and text in choices


def test_every_choice_can_come() -> None:
    compiled = EXAMPLES.constraint("choices", ["yes", "yesterday", "no"])
    assert {write(compiled.copy(), seed)[0] for seed in range(40)} == {"yes", "yesterday", "no"}


def has_keys(value: Any, required: set[str], known: set[str]) -> bool:
    return isinstance(value, dict) and required <= set(value) <= known


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


SCHEMAS: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    (
        {
            "type": "object",
            "properties": {
                "n": {"type": "integer", "minimum": 3, "maximum": 120},
                "kind": {"enum": ["x", "y\n", 3, None]},
                "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
            },
            "required": ["n", "kind"],
            "additionalProperties": False,
        },
        lambda v: (
            has_keys(v, {"n", "kind"}, {"n", "kind", "flags"})
            and is_integer(v["n"])
            and 3 <= v["n"] <= 120
            and v["kind"] in ("x", "y\n", 3, None)
            and 1 <= len(v.get("flags", [True])) <= 3
            and all(isinstance(flag, bool) for flag in v.get("flags", []))
        ),
    ),
    (
        {"type": "string", "pattern": '^[ab]{2}"c$'},
        lambda v: isinstance(v, str) and re.fullmatch('[ab]{2}"c', v) is not None,
    ),
    (
        {"anyOf": [{"const": {"a": [1, 2]}}, {"type": "string", "minLength": 2, "maxLength": 4}]},
        lambda v: v == {"a": [1, 2]} or (isinstance(v, str) and 2 <= len(v) <= 4),
    ),
    (
        {
            "$defs": {
                "tree": {
                    "type": "object",
                    "properties": {"left": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
                    "required": ["left"],
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/tree",
        },
        lambda v: is_tree(v),
    ),
]


def is_tree(value: Any) -> bool:
    return has_keys(value, {"left"}, {"left"}) and (value["left"] is None or is_tree(value["left"]))


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_texts_are_json_of_their_schema(number: int) -> None:
    schema, holds = SCHEMAS[number]
    compiled = EXAMPLES.constraint("schema", schema)
    ended = 0
    for seed in range(25):
        text, finished = write(compiled.copy(), seed)
        ended += finished
        if finished:
            assert holds(json.loads(text)), text
    assert ended >= 20  # a tree may grow for long


def test_a_schema_as_text_is_the_same() -> None:
    schema = SCHEMAS[0][0]
    given_text, given_object = (EXAMPLES.constraint("schema", s) for s in (json.dumps(schema), schema))
    assert write(given_text, 3) == write(given_object, 3)


def test_the_checks_above_can_fail() -> None:
    wrong = [{"n": 2, "kind": "x"}, "ab", "a", {"left": 3}]
    assert not any(holds(value) for (_, holds), value in zip(SCHEMAS, wrong))


def test_an_end_comes_where_the_text_is_complete() -> None:
    constraint = EXAMPLES.constraint("regex", "ab?")
    assert not constraint.may_end and not constraint.mask()[EOS]
    constraint.accept(TOKENIZER.encode("a")[0])
    assert constraint.may_end and constraint.mask()[EOS] and not constraint.finished
    other = constraint.copy()
    constraint.accept(EOS)
    assert constraint.finished and constraint.may_end
    assert not other.finished
    other.accept(TOKENIZER.encode("b")[0])
    assert other.finished and other.may_end


def test_several_ends_and_none() -> None:
    """Whatever ends a text for the model is allowed together; an id beyond the tokenizer's too."""
    several = Constrainer(EXAMPLE, [0, 2, 4099, 5000], V).constraint("regex", "a?")
    assert {0, 2, 4099} <= set(np.flatnonzero(several.mask()).tolist())
    several.accept(4099)
    assert several.finished
    none = Constrainer(EXAMPLE, [], V).constraint("regex", "ab?")
    none.accept(TOKENIZER.encode("a")[0])
    assert none.may_end and np.flatnonzero(none.mask()).tolist() == TOKENIZER.encode("b")


def test_a_byte_tokenizer() -> None:
    """Characters of several tokens each."""
    data = byte_tokenizer().to_str().encode()
    tokenizer = Tokenizer(data)
    constraint = Constrainer(data, [], 300).constraint("regex", "[é☃]{3}")
    random, ids = np.random.default_rng(0), list[int]()
    while not constraint.finished:
        ids.append(int(random.choice(np.flatnonzero(constraint.mask()))))
        constraint.accept(ids[-1])
    assert re.fullmatch("[é☃]{3}", tokenizer.decode(ids)) and len(ids) > 3


def test_a_token_that_does_not_follow() -> None:
    constraint = EXAMPLES.constraint("regex", "[0-9]+")
    with pytest.raises(GristmillError, match="does not follow"):
        constraint.accept(TOKENIZER.encode("a")[0])
    with pytest.raises(GristmillError, match="does not follow"):
        constraint.accept(EOS)
    with pytest.raises(ValueError, match="read-only"):
        constraint.mask()[0] = True


@pytest.mark.parametrize(
    "kind, what, message",
    [
        ("regex", "[a-", "the regex '\\[a-' cannot be used: unclosed character class"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", 3, "a regex is int, expected text"),
        ("regex", "a\ud800", "surrogate"),
        ("regex", "[a&&b]", "no text of this model's tokens satisfies it"),
        ("choices", [], "choices is empty"),
        ("choices", [""], "choices is empty"),
        ("choices", [1], "choices is empty or holds"),
        ("choices", "yes", "choices is str, expected a list"),
        ("choices", 3, "choices is int, expected a list"),
        ("choices", ["\ud800"], "surrogate"),
        ("schema", "{", "the schema '{' cannot be used: .*line 1 column 2"),
        ("schema", "3", "a schema is int, expected a JSON object"),
        ("schema", {"type": "nope"}, "Invalid type: nope"),
        ("schema", {"if": {}}, 'Unimplemented keys: \\["if"\\]'),
        ("schema", {"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
        ("schema", {"enum": [{1, 2}]}, "not JSON serializable"),
        ("schema", "[" * 100_000, "cannot be used"),
        ("grammar", "x", "a constraint is 'grammar', expected one of regex, choices, schema"),
    ],
)
def test_what_cannot_be_compiled(kind: str, what: Any, message: str) -> None:
    with pytest.raises(GristmillError, match=message) as raised:
        EXAMPLES.constraint(kind, what)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize("data", [b"{}", b"\xff", b"{"])
def test_a_tokenizer_that_cannot_be_used(data: bytes) -> None:
    with pytest.raises(GristmillError, match="tokenizer cannot be used for constraints"):
        Constrainer(data, [0], 10)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)  # importing it fails
    with pytest.raises(GristmillError, match=r"pip install 'gristmill\[constrain\]'"):
        Constrainer(EXAMPLE, [0], V)
