"""Continuations scored over the slots against rows computed one text at a time; last words; the harness."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import batches, fake_session, tiny_artifact

import gristmill
from gristmill.integrations import harness
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.evaluation import token_nll
from gristmill.runtime.last_word import read_passages, score_last_words, split_last_word, wilson_interval
from gristmill.runtime.scoring import ContinuationScore, score_continuations
from gristmill.runtime.session import Session

Request = tuple[list[int], list[int]]


def direct(session: Session, context: list[int], continuation: list[int]) -> ContinuationScore:
    """The score by one pass over one text in one slot."""
    ids = [*context, *continuation][:-1]
    parts = []
    with session.slot() as slot:
        for start in range(0, len(ids), session.max_tokens):
            chunk = ids[start : start + session.max_tokens]
            parts.append(session.forward(chunk, np.arange(start, start + len(chunk)), [slot] * len(chunk)))
            parts[-1] = parts[-1].copy()
    logits = np.concatenate(parts)[len(context) - 1 :]
    nll = token_nll(logits, np.array(continuation))
    return ContinuationScore(-float(nll.sum()), bool((logits.argmax(1) == continuation).all()))


def requests(seed: int, shared: int = 0, documents: int = 8) -> list[Request]:
    """Documents with some continuations each, after `shared` tokens that all begin with, in any order."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(258) for _ in range(draw.randint(least, most))]

    beginning, found = tokens(shared, shared), []
    for _ in range(documents):
        context = [*beginning, *tokens(1, 12)]
        found += [(context, tokens(1, 6)) for _ in range(draw.randint(1, 4))]
    found.append(found[0])
    draw.shuffle(found)
    return found


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("scoring") / "a")


@pytest.mark.parametrize("shared", [0, 5, 30])
@pytest.mark.parametrize("max_tokens, max_slots", [(1, 1), (3, 2), (16, 3), (64, 8)])
def test_scores_equal_those_of_single_passes(shared: int, max_tokens: int, max_slots: int) -> None:
    session = fake_session(max_tokens=max_tokens, max_slots=max_slots, max_len=60)
    asked = requests(seed=shared + max_slots, shared=shared)
    done: list[int] = []
    found = score_continuations(session, asked, on_done=done.append)
    for (context, continuation), score in zip(asked, found, strict=True):
        expected = direct(session, context, continuation)
        assert score.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-9)
        assert score.greedy == expected.greedy
    assert sum(done) == len(asked) and session._slots.free() == max_slots


def test_scores_of_an_executor(artifact: Path) -> None:
    session = gristmill.load(artifact)
    asked = requests(seed=1, shared=20)
    for (context, continuation), score in zip(asked, score_continuations(session, asked), strict=True):
        assert score.log_likelihood == pytest.approx(
            direct(session, context, continuation).log_likelihood, abs=1e-9
        )


def test_greedy_is_true_for_what_the_model_says(artifact: Path) -> None:
    session = gristmill.load(artifact)
    said = session.generate([0, 5, 9], max_new_tokens=5, ignore_eos=True).token_ids
    wrong = [*said[:-1], (said[-1] + 1) % 258]
    found = score_continuations(session, [([0, 5, 9], said), ([0, 5, 9], wrong), ([0, 5, 9], wrong[:-1])])
    assert [score.greedy for score in found] == [True, False, True]


def test_a_sliding_window() -> None:
    """A ring that has begun to overwrite itself is not rolled back further than it reaches."""
    session = fake_session(max_tokens=8, max_slots=2, max_len=90, window=20)
    draw = random.Random(5)
    context = [draw.randrange(258) for _ in range(20)]
    asked = [(context, [draw.randrange(258) for _ in range(n)]) for n in (60, 2, 50, 3)]
    for (a, b), score in zip(asked, score_continuations(session, asked), strict=True):
        assert score.log_likelihood == pytest.approx(direct(session, a, b).log_likelihood, abs=1e-9)


def test_what_requests_share_is_computed_once() -> None:
    choices, longer, few_shot = (fake_session(max_tokens=64, max_slots=4, max_len=80) for _ in range(3))
    context = list(range(2, 62))
    score_continuations(choices, [(context, [7]), (context, [8]), (context, [9])])
    assert sum(batches(choices)) == 60, "one row answers all three"
    score_continuations(longer, [(context, [k, k, k]) for k in (7, 8, 9)])
    assert sum(batches(longer)) == 60 + 3 * 3, "the last row of the context again, and two of each"
    score_continuations(few_shot, [([*context, *[k] * 6], [1, 2]) for k in range(9, 17)])
    assert sum(batches(few_shot)) == 60 + 8 * 7 and len(batches(few_shot)) == 3


def test_requests_that_cannot_be_scored() -> None:
    session = fake_session(max_len=10)
    assert score_continuations(session, []) == []
    for bad, message in [(([], [1]), "0"), (([1], []), "0"), (([1] * 9, [2] * 3), "max_len is 10")]:
        with pytest.raises(GristmillError, match=message):
            score_continuations(session, [([1], [2]), bad])
    assert len(score_continuations(session, [([1] * 9, [2] * 2)])) == 1, "the last token is not put in"


# ---- last words --------------------------------------------------------------------------------------


def passages(path: Path, *texts: str) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def test_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows one text by heart, and says its tokens by their positions."""
    session = fake_session(max_len=60)
    known = np.array([*session.tokenizer.encode("we say abc"), 2])
    forward = session.executor.forward

    def recite(tokens: Any, positions: Any, slots: Any, rows: Any) -> np.ndarray:
        logits = np.zeros_like(forward(tokens, positions, slots, rows))
        logits[np.arange(len(rows)), known[np.minimum(positions[rows] + 1, len(known) - 1)]] = 9
        return logits

    monkeypatch.setattr(session.executor, "forward", recite)
    hits, misses = ["we say abc", "we sax abc \n", "we say ab"], ["we say abd", "we say xbc", "we say\tabc"]
    texts = [*hits, *misses, *hits]
    score = score_last_words(session, passages(tmp_path / "a.jsonl", *texts))
    assert (score.hits, score.passages, score.accuracy) == (6, 9, 6 / 9)
    assert (score.low, score.high) == wilson_interval(6, 9)
    assert score.tokens == sum(1 + len(text.rstrip()) for text in texts) and score.tok_s > 0


def test_split_last_word() -> None:
    assert split_last_word(" a b\tlast.\n") == (" a b", "\tlast.")
    assert split_last_word("one") == ("", "one") and split_last_word(" \n") == ("", "")


def test_wilson_interval() -> None:
    assert wilson_interval(0, 12)[0] == 0 and wilson_interval(12, 12)[1] == 1
    low, high = wilson_interval(50, 100)
    assert (low, high) == (pytest.approx(0.4038315), pytest.approx(0.5961685))


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 3 is not JSON"),
        ('{"txt": "a b"}', 'line 3 holds no "text"'),
        ('["a b"]', 'line 3 holds no "text"'),
        ('{"text": "one"}', "line 3 has no two words"),
        (json.dumps({"text": "a " * 40}), "line 3 has 80 tokens, max_len is 40"),
    ],
)
def test_lines_that_are_no_passages(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b"}\n\n' + line + "\n")
    with pytest.raises(GristmillError, match=message):
        score_last_words(fake_session(max_len=40), path)
    path.write_text("\n \n")
    with pytest.raises(GristmillError, match="holds no text"):
        list(read_passages(path))


# ---- lm-evaluation-harness ---------------------------------------------------------------------------


def test_texts_of_the_harness_get_one_bos() -> None:
    tokenizer = fake_session().tokenizer
    plain = harness.encode(tokenizer, "ab")
    assert harness.encode(tokenizer, "<s>ab") == plain and plain[0] == 0
    assert harness.encode(tokenizer, "ab", add_special_tokens=False) == plain[1:]
    assert harness.prefix_token(tokenizer, frozenset()) == 0


@pytest.mark.parametrize("length", [0, 1, 4, 5, 8, 9, 23])
def test_rolling_windows_predict_each_token_once(length: int) -> None:
    windows = harness.rolling_windows(list(range(length)), prefix=99, max_len=4)
    assert [token for _, continuation in windows for token in continuation] == list(range(length))
    tokens = [99, *range(length)]
    for context, continuation in windows:
        end = continuation[-1] + 2
        assert context + continuation == tokens[end - len(context + continuation) : end]
        assert len(context + continuation) == min(5, end), "as much context as there is room for"


def test_what_does_not_fit_loses_its_beginning() -> None:
    assert harness.cut_context([1, 2, 3, 4], [5, 6], max_len=4) == [2, 3, 4]
    assert harness.cut_prompt([1, 2, 3, 4], max_len=4, max_new_tokens=2) == [2, 3, 4]
    for call in (
        lambda: harness.cut_context([1], [2] * 5, max_len=4),
        lambda: harness.cut_prompt([1], max_len=4, max_new_tokens=5),
    ):
        with pytest.raises(GristmillError, match="max_len is 4"):
            call()


def test_generation_options() -> None:
    def of(**given: Any) -> dict[str, Any]:
        return harness.generation_options(given, 256)

    greedy = {"stop": ["\n"], "max_new_tokens": 256}
    assert of(until="\n") == of(until=["\n", ""], do_sample=False, temperature=0.7, top_p=0.9) == greedy
    assert of(max_gen_toks=5, num_beams=1) == {"stop": [], "max_new_tokens": 5}
    assert of(do_sample=True, top_k=4) == {"stop": [], "max_new_tokens": 256, "top_k": 4, "temperature": 1.0}
    assert of(no_repeat_ngram_size=3, n=1) == {"stop": [], "max_new_tokens": 256, "no_repeat_ngram": 3}
    with pytest.raises(GristmillError, match="num_beams=4"):
        of(num_beams=4)


def test_chat_prompts() -> None:
    tokenizer = fake_session().tokenizer
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well "}]
    assert harness.chat_prompt(tokenizer, messages[:1]) == "<s>[user]hi[assistant]"
    assert harness.chat_prompt(tokenizer, messages, False) == "<s>[user]hi[assistant]well"


@pytest.fixture
def model(artifact: Path) -> Any:
    """The adapter, where the harness is installed."""
    pytest.importorskip("lm_eval", reason="needs lm_eval (`pip install 'gristmill[lm-eval]'`)")
    from lm_eval.api.registry import get_model

    import gristmill.integrations.lm_eval  # noqa: F401

    return get_model("gristmill").create_from_arg_string(
        f"artifact={artifact},max_gen_toks=8", {"batch_size": 1, "device": "cuda:0"}
    )


def ask(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_the_adapter_against_direct_computation(model: Any) -> None:
    session, encode = model.session, model.session.tokenizer.encode
    pairs = [("some text", " next"), ("some text ", "other"), ("", "begins"), ("x" * 100, "y")]
    found = model.loglikelihood([ask(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (log_likelihood, greedy) in zip(pairs, found, strict=True):
        ids = encode(context + continuation)
        cut = len(encode(context.rstrip()))
        expected = direct(session, ids[:cut][-(65 - len(ids) + cut) :], ids[cut:])
        assert log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-9)
        assert greedy == expected.greedy
    text = "rolling text " * 10
    windows = harness.rolling_windows(encode(text, False), 0, session.max_len)
    expected_sum = sum(direct(session, *window).log_likelihood for window in windows)
    rolling = model.loglikelihood_rolling([ask(text), ask("")], disable_tqdm=True)
    assert rolling == [pytest.approx(expected_sum), 0]
    texts = model.generate_until([ask("ab", {"until": ["q"]}), ask("cd", {"max_gen_toks": 3})], True)
    assert texts == [
        session.generate("ab", max_new_tokens=8, stop="q").text,
        session.generate("cd", max_new_tokens=3).text,
    ]


def test_the_adapter_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "gristmill.integrations.lm_eval", raising=False)
    with pytest.raises(GristmillError, match=r"gristmill\[lm-eval\]"):
        importlib.import_module("gristmill.integrations.lm_eval")
