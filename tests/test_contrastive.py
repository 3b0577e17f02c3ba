"""Contrastive search against the textbook: every candidate's whole text from the start, no cache, float64."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY as FAMILY_VOCABULARY
from families import save_tiny
from programs import Llama, llama
from tiny import EOS, FakeExecutor, batches, fake_session, tiny_artifact

import gristmill
from gristmill.runtime.cpu import _native
from gristmill.runtime.decoding.contrastive import Context, choose, generate_contrastive, likeliest
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import NO_HIDDEN_STATES, Program
from gristmill.runtime.session import Session

CLOSE = 1e-4  # scores of a f32 model that may change places

# n texts of T token ids -> logits [n, V] after the last token, hidden states [n, T, H] of all
Model = Callable[[list[list[int]]], tuple[np.ndarray, np.ndarray]]


def textbook(model: Model, text: list[int], count: int, alpha: float, k: int) -> list[tuple[int, float]]:
    """The tokens that follow, each with how far its score is above the next candidate's."""
    found = []
    logits = model([text])[0][0]
    for _ in range(count):
        probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        tried = np.argsort(-probability, kind="stable")[:k].tolist()
        after, states = model([[*text, v] for v in tried])
        units = states / np.linalg.norm(states, axis=2, keepdims=True)
        scores = [(1 - alpha) * probability[v] - alpha * (u[:-1] @ u[-1]).max() for v, u in zip(tried, units)]
        best, second = np.argsort(scores)[::-1][:2]
        found.append((tried[best], scores[best] - scores[second]))
        text, logits = [*text, tried[best]], after[best]
    return found


def of_transformers(model: Any) -> Model:
    """A float64 copy of a transformers model."""
    double = model.double().eval()

    def run(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            out = double(torch.tensor(texts), output_hidden_states=True)
        return out.logits[:, -1].numpy(), out.hidden_states[-1].numpy()

    return run


def of_executor(make: Callable[[], Any]) -> Model:
    """The model of an executor that `make` makes: every text in slot 0 of a fresh one."""

    def run(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        at = np.arange(len(texts[0]), dtype=np.int32)
        runs = [make().forward_hidden(np.array(t, np.int32), at, np.zeros_like(at), at) for t in texts]
        logits = np.stack([logits[-1] for logits, _ in runs])
        return logits.astype(np.float64), np.stack([states for _, states in runs]).astype(np.float64)

    return run


def same_until_close(got: list[int], expected: list[tuple[int, float]]) -> int:
    """Tokens that agree; where the texts part the textbook's two best scores are close."""
    for n, (token, (wanted, margin)) in enumerate(zip(got, expected, strict=True)):
        if token != wanted:
            assert margin < CLOSE, f"token {n} is {token}, expected {wanted}, better by {margin:.2e}"
            return n
    return len(got)


# ---- against transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(py7m: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Session]:
    from transformers import AutoModelForCausalLM

    out = tmp_path_factory.mktemp("py7m") / "f32"
    gristmill.compile(py7m, out, weights="f32", kv="f32", gate=False)
    model = AutoModelForCausalLM.from_pretrained(py7m, dtype=torch.float32)
    return of_transformers(model), gristmill.load(out, threads=1)


@pytest.mark.parametrize(
    ("prompt", "alpha", "k"), [("def read_lines(path):\n", 0.6, 4), ("class Stack:\n    def push(", 0.3, 6)]
)
def test_the_example_says_what_the_textbook_says(
    example: tuple[Model, Session], prompt: str, alpha: float, k: int
) -> None:
    model, session = example
    ids = session.tokenizer.encode(prompt)
    got = generate_contrastive(session, prompt, 15, alpha, k, ignore_eos=True)
    assert same_until_close(got.token_ids, textbook(model, ids, 15, alpha, k)) > 9
    greedy = session.generate(prompt, max_new_tokens=15, ignore_eos=True)
    assert got.token_ids != greedy.token_ids, "the penalty changes nothing here: a vacuous test"
    assert got.text == session.tokenizer.decode(ids + got.token_ids)[len(prompt) :]


def test_a_tiny_model_says_what_the_textbook_says(tmp_path: Path) -> None:
    """Random weights, a softcap, a tied head, windows whose rings of 16 rows wrap, a prompt in chunks."""
    model = save_tiny(tmp_path / "model", "gemma2")
    gristmill.compile(tmp_path / "model", tmp_path / "a", weights="f32", kv="f32", gate=False, max_tokens=8)
    session = gristmill.load(tmp_path / "a", threads=1)
    ids = np.random.default_rng(3).integers(2, FAMILY_VOCABULARY, 21).tolist()
    got = generate_contrastive(session, ids, 16, 0.6, 4, ignore_eos=True)
    assert same_until_close(got.token_ids, textbook(of_transformers(model), ids, 16, 0.6, 4)) > 9


def test_without_penalty_or_choice_it_is_greedy(example: tuple[Model, Session]) -> None:
    _, session = example
    prompt = "import os\n"
    greedy = session.generate(prompt, max_new_tokens=24)
    for alpha, k in [(0.0, 5), (0.6, 1), (0.0, 99)]:
        got = generate_contrastive(session, prompt, 24, alpha, k)
        assert (got.token_ids, got.text) == (greedy.token_ids, greedy.text)
        assert (got.finish_reason, got.prompt_tokens) == (greedy.finish_reason, greedy.prompt_tokens)


@pytest.mark.parametrize("cache", [("int8", ""), ("int8", "int4"), ("f16", "fp8")])
def test_rows_of_quantized_caches_are_copied(cache: tuple[str, str], tmp_path: Path) -> None:
    """Beside rows of other positions in one tile, and around a window's ring of 48 rows."""
    made = llama(Llama(cache=cache[0], cache_v=cache[1], window=9, seed=5))
    weights = str(made.write(tmp_path))

    def executor(max_slots: int = 1, threads: int = 1) -> Any:
        return _native.Executor(
            made.text(), weights, threads=threads, max_len=64, max_slots=max_slots, alone_below=0
        )

    ids = np.random.default_rng(1).integers(0, made.vocabulary, 20).tolist()
    expected = textbook(of_executor(executor), ids, 12, 0.6, 4)
    for max_slots, threads in ((4, 1), (6, 2)):
        session = Session(None, Program.from_json(made.json), executor(max_slots, threads))
        got = generate_contrastive(session, ids, 12, 0.6, 4)
        assert same_until_close(got.token_ids, expected) > 9
    long = generate_contrastive(session, ids, 44, 0.6, 4)
    assert long.token_ids[:12] == got.token_ids and len(long.token_ids) == 44


# ---- over a fake executor --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [{}, {"max_tokens": 2}, {"max_tokens": 40}, {"max_slots": 7}], ids=lambda shape: str(shape)
)
@pytest.mark.parametrize(("alpha", "k"), [(0.6, 3), (1.0, 2), (0.2, 3)])
def test_chunks_and_slots_change_nothing(shape: dict[str, Any], alpha: float, k: int) -> None:
    """Also where one forward takes fewer rows than there are candidates."""
    session = fake_session(**shape)
    ids = session.tokenizer.encode("a prompt")
    got = generate_contrastive(session, "a prompt", 12, alpha, k, ignore_eos=True)
    expected = textbook(of_executor(lambda: FakeExecutor(40, 1)), ids, 12, alpha, k)
    assert got.token_ids == [token for token, _ in expected]
    assert not session._slots._holders and not session._slots.lengths.any()


def test_a_token_costs_one_forward_of_the_candidates() -> None:
    session = fake_session(max_tokens=5)
    generate_contrastive(session, "x" * 13, 3, 0.6, 3)
    assert batches(session) == [5, 5, 4, 3, 3, 3]


def test_a_text_that_would_repeat_itself_does_not() -> None:
    """The likeliest token has the hidden state of one before, the second one a state of its own."""
    logits = np.array([0.0, 2.0, 1.5, -1.0], np.float32)
    states = np.eye(4, dtype=np.float32)
    context = Context(states[:2] * 7, 3)
    tokens, probabilities = likeliest(logits, 2)
    assert tokens.tolist() == [1, 2] and abs(probabilities[0] - np.exp(2) / np.exp(logits).sum()) < 1e-6
    similarity = context.similarity(states[tokens] * 3)
    assert similarity.tolist() == [1.0, 0.0]
    assert choose(probabilities, similarity, 0.0) == 0 and choose(probabilities, similarity, 0.5) == 1
    context.add(states[2:3])
    assert context.similarity(states[2:] * 5).tolist() == [1.0, 0.0]
    assert context.similarity(np.zeros((1, 4), np.float32)).tolist() == [0.0]


def test_the_lowest_ids_among_equals_are_tried() -> None:
    tokens, probabilities = likeliest(np.array([1, 3, 2, 3, 3, 0], np.float32), 2)
    assert tokens.tolist() == [1, 3] and probabilities[0] == probabilities[1]
    assert likeliest(np.array([1, 3], np.float32), 5)[0].tolist() == [1, 0]
    with pytest.raises(GristmillError, match="the model gave nan as a logit"):
        likeliest(np.array([1, np.nan], np.float32), 2)


def test_it_ends_as_other_texts_end() -> None:
    session = fake_session()
    whole = generate_contrastive(session, "abc", 9, top_k=3, ignore_eos=True)
    assert whole.finish_reason == "length" and len(whole.token_ids) == 9 and whole.decode_tok_s > 0
    stop = whole.text[2:4]
    pieces: list[str] = []
    stopped = generate_contrastive(session, "abc", 9, top_k=3, stop=stop, on_text=pieces.append)
    assert stopped.text == whole.text[: whole.text.index(stop)] == "".join(pieces)
    assert stopped.finish_reason == "stop"
    by_id = generate_contrastive(session, "abc", 9, top_k=3, stop_ids=whole.token_ids[4])
    assert by_id.finish_reason == "stop" and by_id.token_ids[-1] == whole.token_ids[4]
    session.eos_ids = frozenset({EOS, whole.token_ids[4]})
    ended = generate_contrastive(session, "abc", 9, top_k=3)
    assert ended.finish_reason == "stop" and ended.token_ids == whole.token_ids[: len(ended.token_ids)]
    assert ended.token_ids[-1] == whole.token_ids[4]


def test_the_last_positions_of_a_slot() -> None:
    session = fake_session(max_len=10)
    got = generate_contrastive(session, list(range(2, 9)), 50, top_k=2, ignore_eos=True)
    assert len(got.token_ids) == 3 and got.finish_reason == "length"
    assert len(generate_contrastive(session, list(range(2, 11)), 50, top_k=2).token_ids) == 1
    with pytest.raises(GristmillError, match="fills all 10 positions.* larger max_len"):
        generate_contrastive(session, list(range(2, 12)), 50, top_k=2)


def test_an_exception_frees_the_slots() -> None:
    session = fake_session()

    def fail(piece: str) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        generate_contrastive(session, "abc", 9, top_k=3, on_text=fail)
    assert session._slots.free() == 3
    assert generate_contrastive(session, "abc", 9, top_k=3).token_ids


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"penalty_alpha": 1.5}, "penalty_alpha is 1.5, expected a number from 0 to 1"),
        ({"penalty_alpha": float("nan")}, "penalty_alpha is nan"),
        ({"penalty_alpha": "0.5"}, "penalty_alpha is '0.5'"),
        ({"penalty_alpha": True}, "penalty_alpha is True"),
        ({"top_k": 0}, "top_k is 0, expected an integer from 1"),
        ({"top_k": 2.0}, r"top_k is 2\.0"),
        ({"top_k": 4}, "top_k is 4, but the session has 3 slots.* load with max_slots=4 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ""}, "stop holds something"),
        ({"prompt": []}, "the prompt is empty"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    session = fake_session()
    with pytest.raises(GristmillError, match=message):
        generate_contrastive(session, **{"prompt": "abc", "top_k": 3, **given})
    assert batches(session) == [] and session._slots.free() == 3


def test_artifacts_without_hidden_states_are_refused(tmp_path: Path) -> None:
    session = gristmill.load(tiny_artifact(tmp_path / "a"), threads=1)
    assert session.artifact and generate_contrastive(session, "abc", 3).token_ids
    session.artifact.manifest["quantization"]["rotated"] = True
    with pytest.raises(GristmillError, match="compile without --rotate"):
        generate_contrastive(session, "abc", 3)
    session = fake_session()
    session.program.instructions.append(session.program.instructions[0])
    for call in (
        lambda: generate_contrastive(session, "abc", 3, top_k=2),
        lambda: session.forward_hidden([1], [0], [0]),
    ):
        with pytest.raises(GristmillError) as error:
            call()
        assert str(error.value) == NO_HIDDEN_STATES


# ---- beside other texts ----------------------------------------------------------------------------------


def test_it_waits_until_enough_slots_are_free() -> None:
    session = fake_session()
    alone = generate_contrastive(session, "abc", 9, top_k=3).token_ids
    found: list[list[int]] = []
    with session.slot():
        threads = [
            threading.Thread(
                target=lambda: found.append(generate_contrastive(session, "abc", 9, top_k=3).token_ids),
                daemon=True,
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        assert not found
    for thread in threads:
        thread.join(timeout=30)
    assert found == [alone] * 3


def test_slots_that_nobody_else_can_free() -> None:
    session = fake_session()
    with session.slot(), pytest.raises(GristmillError, match="3 slots are needed at once, 2 of 3 are free"):
        generate_contrastive(session, "abc", 9, top_k=3)
    assert generate_contrastive(session, "abc", 9, top_k=3).token_ids


def test_it_runs_beside_plain_generation() -> None:
    session = fake_session(max_slots=4)
    plain = session.generate("abc", max_new_tokens=20, ignore_eos=True).token_ids
    alone = generate_contrastive(session, "xyz", 12, top_k=3, ignore_eos=True).token_ids
    found: list[list[int]] = []
    other = threading.Thread(
        target=lambda: found.extend(
            session.generate("abc", max_new_tokens=20, ignore_eos=True).token_ids for _ in range(5)
        ),
        daemon=True,
    )
    other.start()
    beside = [generate_contrastive(session, "xyz", 12, top_k=3, ignore_eos=True).token_ids for _ in range(3)]
    other.join(timeout=30)
    assert beside == [alone] * 3 and found == [plain] * 5
