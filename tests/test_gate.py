"""The gate on a model whose next token depends on the last one only: every figure can be computed by hand."""

import ast
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gristmill.compiler import gate
from gristmill.compiler.gate import Evaluation, Greedy, HeldText, Limits, enforce, run_gate
from gristmill.compiler.statistics import Interval
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Limits as ProgramLimits
from gristmill.runtime.program import Program
from gristmill.runtime.session import Session

V = 50


class TableExecutor:
    """Logits are a row of a table, chosen by the token; counts the rows it ran."""

    max_slots, max_len, max_tokens, vocabulary, threads = 4, 300, 64, V, 1
    kv_bytes = arena_bytes = weight_bytes = weight_bytes_per_token = 0

    def __init__(self, table: np.ndarray):
        self.table, self.rows = table, 0

    def forward(self, tokens: Any, positions: Any, slots: Any, rows: Any) -> np.ndarray:
        self.rows += len(tokens)
        return self.table[tokens[rows]]

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        raise AssertionError("the gate copies no slots")


class Letters:
    """A tokenizer: one token per character, BOS 0."""

    prefix_ids = [0]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [1 + ord(c) % (V - 1) for c in text]


class Reference:
    """The float model; records what it was asked."""

    def __init__(self, table: np.ndarray):
        self.table = table
        self.asked: list[list[int]] = []

    def __call__(self, windows: list[list[int]]) -> Iterator[np.ndarray]:
        assert not self.asked, "asked once for everything: the weights pass by once"
        self.asked = windows
        for window in windows:
            yield self.table[window]


def table(seed: int, noise: float = 0.0) -> np.ndarray:
    base = np.random.default_rng(0).standard_normal((V, V)) * 2
    return (base + noise * np.random.default_rng(seed).standard_normal((V, V))).astype(np.float32)


def session_of(logits: np.ndarray) -> Session:
    executor = TableExecutor(logits)
    limits = ProgramLimits(max_tokens=executor.max_tokens, max_slots=4, max_len=300, max_position=300)
    return Session(None, Program(vocabulary=V, limits=limits), executor)


def held_text(tokens: int) -> HeldText:
    text = "".join(chr(97 + i) for i in np.random.default_rng(5).integers(0, 26, 5000))
    return HeldText.of("letters.txt", text, Letters(), tokens)


def evaluate(noise: float, tokens: int = 1024, window: int = 128) -> Evaluation:
    return run_gate(session_of(table(1, noise)), Reference(table(0)), held_text(tokens), window=window)


def test_the_same_model_loses_nothing() -> None:
    found = evaluate(0.0)
    assert found.tokens == 1024
    assert found.nll == found.reference_nll
    assert found.ppl_increase == found.kl == Interval(0, 0, 0)
    assert found.top1_agreement == 1
    assert found.greedy == Greedy(gate.GREEDY_PROMPT, gate.GREEDY_TOKENS, None)
    assert "all 64 tokens" in found.lines()[-1]


def test_figures_equal_their_definitions() -> None:
    text, a, b = held_text(1000), table(0).astype(np.float64), table(1, 0.3).astype(np.float64)
    log_p, log_q = (t - np.log(np.exp(t).sum(1, keepdims=True)) for t in (a, b))
    pieces = [text.ids[i : i + 127] for i in range(0, 1000, 127)]
    pairs = [(x, y) for piece in pieces for x, y in zip([0, *piece], piece)]
    before, after = np.array(pairs).T
    found = evaluate(0.3, tokens=1000)
    assert found.tokens == len(pairs) == 1000
    assert found.reference_nll == pytest.approx(-log_p[before, after].mean(), rel=1e-5)
    assert found.nll == pytest.approx(-log_q[before, after].mean(), rel=1e-5)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1)[before]
    assert found.kl.estimate == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-4)
    assert found.top1_agreement == pytest.approx((a.argmax(1) == b.argmax(1))[before].mean())
    assert found.ppl_increase.estimate == pytest.approx(found.ppl / found.reference_ppl - 1)
    assert found.ppl_increase.low < found.ppl_increase.estimate < found.ppl_increase.high


def test_windows_begin_with_the_prefix_and_the_reference_is_asked_once() -> None:
    reference, session = Reference(table(0)), session_of(table(1, 0.3))
    found = run_gate(session, reference, held_text(300), window=100)
    *windows, greedy = reference.asked
    assert [len(window) for window in windows] == [100, 100, 100, 4]
    assert all(window[0] == 0 for window in windows)
    assert sum(windows[:3], [])[1:100] == held_text(300).ids[:99]
    assert greedy[: gate.GREEDY_PROMPT] == windows[0][: gate.GREEDY_PROMPT]
    assert len(greedy) == gate.GREEDY_PROMPT + gate.GREEDY_TOKENS - 1
    assert found.window == 100


def test_without_a_prefix_the_first_token_of_a_window_is_not_counted() -> None:
    text = HeldText("letters.txt", "", held_text(256).ids, [])
    assert run_gate(session_of(table(0)), Reference(table(0)), text, window=128).tokens == 254


def test_a_window_is_no_longer_than_the_session() -> None:
    assert run_gate(session_of(table(0)), Reference(table(0)), held_text(600), window=4096).window == 300


def test_greedy_parts_where_the_float_model_would_have_chosen_otherwise() -> None:
    float_table, changed = table(0), table(0)
    prompt = [0, *held_text(100).ids[: gate.GREEDY_PROMPT - 1]]
    token, path = prompt[-1], []
    while token not in path:
        path.append(token)
        token = int(float_table[token].argmax())
    assert len(path) > 2
    turn = path[2]  # two tokens agree, then the artifact prefers the float model's last choice
    worst = int(float_table[turn].argmin())
    changed[turn, worst] = 100
    found = run_gate(session_of(changed), Reference(float_table), held_text(100)).greedy
    ordered = np.sort(float_table[turn])
    assert found.first_difference == 2
    assert found.top2_margin == pytest.approx(ordered[-1] - ordered[-2], rel=1e-5)
    assert found.preference == pytest.approx(ordered[-1] - ordered[0], rel=1e-5)
    assert "token 3 of 64" in str(found)


def test_more_noise_is_more_loss() -> None:
    found = [evaluate(noise) for noise in (0.01, 0.1, 0.5)]
    assert found[0].kl.high < found[1].kl.low
    assert found[1].kl.high < found[2].kl.low
    assert found[0].top1_agreement > found[2].top1_agreement


def test_no_limit_no_word() -> None:
    assert enforce(evaluate(0.5), Limits()) == []


def test_limits_kept_are_said_with_the_bound_that_decides() -> None:
    lines = enforce(evaluate(0.02), Limits(ppl_increase=0.05, kl=0.01))
    assert len(lines) == 2
    assert all("the upper bound decides" in line for line in lines)
    assert "--max-ppl-increase 5 %" in lines[0]
    assert "--max-kl 0.01 nats" in lines[1]


def test_breaches_fail() -> None:
    with pytest.raises(GristmillError, match="breaches --max-kl 0.001 nats"):
        enforce(evaluate(0.5), Limits(kl=0.001))


def with_increase(low: float, estimate: float, high: float) -> Evaluation:
    values = {**evaluate(0.1).__dict__, "ppl_increase": Interval(estimate, low, high)}
    return Evaluation(**values)


def test_an_interval_too_wide_fails_and_says_how_many_tokens_would_do() -> None:
    with pytest.raises(
        GristmillError, match=r"cannot promise .*--max-ppl-increase 2 % .*--gate-tokens 4100 "
    ):
        enforce(with_increase(-0.01, 0.01, 0.03), Limits(ppl_increase=0.02))


def test_an_estimate_beyond_the_limit_fails_whatever_the_interval() -> None:
    with pytest.raises(GristmillError, match="the estimate is beyond"):
        enforce(with_increase(-0.01, 0.01, 0.03), Limits(ppl_increase=0.005))


def test_the_upper_bound_itself_is_allowed() -> None:
    assert enforce(with_increase(-0.01, 0.01, 0.03), Limits(ppl_increase=0.03))


def test_a_limit_needs_enough_text() -> None:
    with pytest.raises(GristmillError, match="too few to decide"):
        enforce(evaluate(0.0, tokens=100), Limits(kl=1.0))


def test_no_text_is_refused() -> None:
    with pytest.raises(GristmillError, match="too short"):
        run_gate(session_of(table(0)), Reference(table(0)), HeldText("empty.txt", "", [], [0]))


def test_another_model_is_refused() -> None:
    with pytest.raises(GristmillError, match="not the same model"):
        run_gate(session_of(table(0)), Reference(table(0)[:, :-1]), held_text(100))


def test_json_is_plain_and_repeatable() -> None:
    text, versions = held_text(500), {"torch": "2.13.0"}

    def once() -> str:
        session, reference = session_of(table(1, 0.2)), Reference(table(0))
        found = run_gate(session, reference, text, command="gristmill compile m -o a", versions=versions)
        return json.dumps(found.to_json(), sort_keys=True, allow_nan=False)

    read = json.loads(once())
    assert once() == json.dumps(read, sort_keys=True)
    assert read["text_sha256"] == text.sha256
    assert read["command"] == "gristmill compile m -o a"
    assert read["versions"] == versions
    assert set(read["kl"]) == {"estimate", "low", "high"}


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_default_texts_hold_more_than_the_default_number_of_tokens(kind: str) -> None:
    text = gate.default_text(kind)
    assert 6000 < len(text.encode()) < 10000
    assert text.isascii()
    assert len(text) / 5 > gate.DEFAULT_TOKENS  # few tokenizers take more than five characters to a token


def test_the_code_text_is_python() -> None:
    ast.parse(gate.default_text("code"))


def test_the_suiting_text_is_the_one_a_tokenizer_packs_densely() -> None:
    class Indented(Letters):
        """Takes four spaces for one token, as tokenizers made for code do."""

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return super().encode(text.replace("    ", "\t"), add_special_tokens)

    class Words(Letters):
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1] * len(text.split(" "))

    assert gate.suiting_text(Indented())[0] == "gate_code.txt"
    assert gate.suiting_text(Words())[0] == "gate_prose.txt"


def test_held_text_is_hashed_whole() -> None:
    text = HeldText.of("a.txt", "abc" * 100, Letters(), 7)
    assert text.sha256 == hashlib.sha256(b"abc" * 100).hexdigest()
    assert len(text.ids) == 7
    assert text.prefix == [0]
