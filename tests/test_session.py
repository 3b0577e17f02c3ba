"""The session: slots, batches, streams, memory, tokenizers; mostly over a fake executor."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import BOS, EOS, VOCABULARY, batches, fake_session, tiny_artifact, tiny_program

import gristmill
from gristmill.runtime import footprint
from gristmill.runtime.artifact import parse_json
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.evaluation import negative_log_likelihood, score_text, text_windows, token_nll
from gristmill.runtime.slots import Slots
from gristmill.runtime.tokenizer import Tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "py7m"


# ---- forward -----------------------------------------------------------------------------------------


def test_forward_returns_the_asked_rows() -> None:
    session = fake_session()
    whole = session.forward([5, 6, 7], [0, 1, 2], [0, 0, 0])
    assert whole.shape == (3, VOCABULARY) and whole.dtype == np.float32
    again = session.forward([5, 6, 7], [0, 1, 2], [1, 1, 1], [2])
    np.testing.assert_array_equal(again, whole[2:])


def test_forward_takes_rows_in_any_order_and_rolls_back() -> None:
    session = fake_session()
    whole = session.forward([5, 6, 7, 8], [0, 1, 2, 3], [0, 0, 0, 0])
    mixed = session.forward([7, 5, 6, 5], [2, 0, 1, 0], [1, 1, 1, 2])
    np.testing.assert_array_equal(mixed[[1, 2, 0]], whole[:3])
    session.forward([9], [1], [0])
    np.testing.assert_array_equal(session.forward([6, 7], [1, 2], [0, 0]), whole[1:3])


@pytest.mark.parametrize(
    "tokens, positions, slots, rows, message",
    [
        ([1], [1], [0], None, "gap"),
        ([1, 1], [0, 2], [0, 0], None, "gap"),
        ([1, 1], [0, 0], [0, 0], None, "twice"),
        ([1], [40], [0], None, "max_len"),
        ([1], [-1], [0], None, "position -1"),
        ([1], [0], [3], None, "max_slots"),
        ([1], [0], [-1], None, "slot -1"),
        ([VOCABULARY], [0], [0], None, "token id"),
        ([-1], [0], [0], None, "token id"),
        ([1], [0, 1], [0], None, "equally many"),
        ([], [], [], None, "0 rows"),
        (list(range(6)), list(range(6)), [0] * 6, None, "max_tokens"),
        ([1], [0], [0], [1], "rows"),
        ([1], [0], [0], [-1], "rows"),
        ([1.5], [0], [0], None, "tokens"),
        (["a"], [0], [0], None, "tokens"),
        ([[1]], [0], [0], None, "tokens"),
        ([[1], [2, 3]], [0], [0], None, "tokens"),
        ([2**40], [0], [0], None, "32 bits"),
    ],
)
def test_batches_that_cannot_be(
    tokens: list[Any], positions: list[int], slots: list[int], rows: list[int] | None, message: str
) -> None:
    session = fake_session()
    with pytest.raises(GristmillError, match=message):
        session.forward(tokens, positions, slots, rows)
    session.forward([1], [0], [0])  # nothing was noted of the refused batch


def test_a_failure_leaves_the_rows_before_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    session = fake_session()
    session.forward([1, 2], [0, 1], [0, 0])
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(session.executor, "forward", None)
        session.forward([3], [2], [0])
    session.forward([3], [2], [0])
    with pytest.raises(GristmillError, match="gap"):
        session.forward([3], [4], [0])


def test_a_window_limits_how_far_back_a_slot_rolls() -> None:
    slots = Slots(max_slots=1, max_len=100, ring=14, reach=4)  # window 10, max_tokens 4

    def go(first: int, count: int) -> None:
        positions = np.arange(first, first + count, dtype=np.int32)
        slots.advance(*slots.check(positions, np.zeros(count, np.int32), held=True))

    for first in range(0, 12, 4):
        go(first, 4)
    go(3, 4)  # 12 rows: nothing of the ring is overwritten yet
    for first in range(7, 31, 4):
        go(first, 4)
    go(27, 4)  # 31 so far; position 27 needs 18 to 26, and the ring holds 17 to 30
    with pytest.raises(GristmillError, match="sliding window"):
        go(26, 1)
    go(0, 4)  # from the beginning all is well
    go(2, 1)


def test_the_ring_of_a_program() -> None:
    program = tiny_program(max_tokens=16, max_len=64, window=10)
    assert footprint.smallest_ring(program, 64) == 26
    assert footprint.smallest_ring(program, 20) == 0
    assert footprint.kv_bytes(program, 64, 3) == 3 * 32 * 2 * 8 * 4, "whole tiles of 16 rows"


def test_a_slot_of_ones_own() -> None:
    session = fake_session(max_slots=1)
    with session.slot() as slot:
        session.forward([1], [0], [slot])
        with pytest.raises(GristmillError, match="in use"):
            session.generate("x")
    session.generate("x", max_new_tokens=1)


def test_slots_of_forward_and_of_generate_do_not_meet() -> None:
    session = fake_session(max_slots=2)
    session.forward([1], [0], [0])
    stream = session.stream("ab", max_new_tokens=5)
    first = next(stream)
    with pytest.raises(GristmillError, match="generating"):
        session.forward([1], [0], [1])
    with pytest.raises(GristmillError, match="slot 2"):
        session.reset(2)
    session.generate("x", max_new_tokens=2)  # waits for the stream's slot, whose text it brings to its end
    assert stream.result.finish_reason == "length"
    session.forward([1], [0], [1])
    with pytest.raises(GristmillError, match="in use"):
        session.generate("x")
    session.reset(0)
    session.generate("x", max_new_tokens=2)
    assert "".join([first, *stream]) == stream.result.text


# ---- generate ----------------------------------------------------------------------------------------

PROMPTS = ["a", "the longest of all prompts here", "", "two", "five!", "six..."]


def test_a_batch_gives_what_each_prompt_gives_alone() -> None:
    alone = [fake_session().generate(p, max_new_tokens=7).token_ids for p in PROMPTS]
    shapes: list[Any] = [{}, {"max_slots": 1}, {"max_tokens": 2}, {"max_tokens": 64, "max_slots": 8}]
    for shape in shapes:
        session = fake_session(**shape)
        together = session.generate(PROMPTS, max_new_tokens=7)
        assert [g.token_ids for g in together] == alone, shape
        assert not session._slots._holders and not session._slots.lengths.any()


def test_sampling_does_not_depend_on_the_batch() -> None:
    options = {"max_new_tokens": 9, "temperature": 1.5, "top_k": 50, "seed": 3}
    alone = [fake_session().generate(p, **options).token_ids for p in PROMPTS]
    assert [g.token_ids for g in fake_session(max_tokens=3).generate(PROMPTS, **options)] == alone
    assert [g.token_ids for g in fake_session().generate(PROMPTS, **{**options, "seed": 4})] != alone
    fresh = [fake_session().generate("a", max_new_tokens=9, temperature=1.5) for _ in range(2)]
    assert fresh[0].seed != fresh[1].seed
    repeated = fake_session().generate("a", max_new_tokens=9, temperature=1.5, seed=fresh[0].seed)
    assert repeated.token_ids == fresh[0].token_ids


def test_prefill_asks_for_no_logits_but_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    session = fake_session(max_tokens=5)
    asked = []
    forward = session.executor.forward

    def count(tokens: Any, positions: Any, slots: Any, rows: Any) -> np.ndarray:
        asked.append(len(rows))
        return forward(tokens, positions, slots, rows)

    monkeypatch.setattr(session.executor, "forward", count)
    session.generate("x" * 13, max_new_tokens=3)
    assert asked == [0, 0, 1, 1, 1] and batches(session) == [5, 5, 4, 1, 1]


def test_the_result_says_what_happened() -> None:
    result = fake_session().generate("abc", max_new_tokens=4)
    assert result.prompt_tokens == 4 and len(result.token_ids) == 4 and result.finish_reason == "length"
    assert result.ttft_s > 0 and result.decode_tok_s > 0
    one = fake_session().generate("abc", max_new_tokens=1)
    assert one.decode_tok_s == 0 and one.token_ids == result.token_ids[:1]


def test_token_ids_as_prompt() -> None:
    session = fake_session()
    text = session.generate("abc", max_new_tokens=4)
    ids = session.tokenizer.encode("abc")
    assert ids[0] == BOS
    given: list[Any] = [ids, np.array(ids), tuple(ids)]
    for prompt in given:
        assert session.generate(prompt, max_new_tokens=4).token_ids == text.token_ids
    both = session.generate([ids, ids], max_new_tokens=4)
    assert [g.token_ids for g in both] == [text.token_ids] * 2


def test_end_of_sequence() -> None:
    session = fake_session()
    third = session.generate("abc", max_new_tokens=5).token_ids[2]
    session.eos_ids = frozenset({EOS, third})
    ended = session.generate("abc", max_new_tokens=5)
    assert ended.finish_reason == "stop" and ended.token_ids[-1] == third and len(ended.token_ids) <= 3
    assert len(session.generate("abc", max_new_tokens=5, ignore_eos=True).token_ids) == 5


def test_stop_strings() -> None:
    session = fake_session()
    whole = session.generate("abc", max_new_tokens=12).text
    stop = whole[3:5]
    stopped = session.generate("abc", max_new_tokens=12, stop=stop)
    assert stopped.text == whole[: whole.index(stop)] and stopped.finish_reason == "stop"
    assert session.generate("abc", max_new_tokens=12, stop=["never seen", stop]).text == stopped.text
    assert "".join(session.stream("abc", max_new_tokens=12, stop=stop)) == stopped.text


def test_a_stream_is_the_text_in_pieces() -> None:
    session = fake_session()
    whole = session.generate("abc", max_new_tokens=20)
    stream = session.stream("abc", max_new_tokens=20)
    pieces = list(stream)
    assert "".join(pieces) == whole.text == stream.result.text and all(pieces)
    assert stream.result.token_ids == whole.token_ids and stream.result.finish_reason == "length"


def test_a_stream_given_up_frees_its_slot() -> None:
    session = fake_session(max_slots=1)
    stream = session.stream("abc")
    next(stream)
    stream.close()
    assert session.generate("abc", max_new_tokens=2).finish_reason == "length"


def test_max_len() -> None:
    session = fake_session(max_len=10)
    assert (
        len(session.generate("abcdefghi", max_new_tokens=50).token_ids) == 1
    )  # 10 with BOS: room for its answer
    assert len(session.generate("abc", max_new_tokens=50).token_ids) == 7
    with pytest.raises(GristmillError, match="max_len is 10"):
        session.generate("abcdefghij")


@pytest.mark.parametrize(
    "prompt", [[], [VOCABULARY], [-1], [0.5], None, 3, b"x", {"a": 1}, "\ud800", [[1], "x", []]]
)
def test_prompts_that_cannot_be(prompt: Any) -> None:
    session = fake_session()
    with pytest.raises(GristmillError):
        session.generate(prompt)
    assert not session._slots._holders


def test_an_empty_prompt_needs_a_bos() -> None:
    assert fake_session(bos=True).generate("", max_new_tokens=1).prompt_tokens == 1
    with pytest.raises(GristmillError, match="empty"):
        fake_session(bos=False).generate("")


def test_options_are_checked_before_anything_runs() -> None:
    session = fake_session()
    with pytest.raises(GristmillError, match="did you mean temperature"):
        session.generate("a", temperatur=1)
    with pytest.raises(GristmillError, match="top_p"):
        session.stream("a", top_p=3)
    assert batches(session) == []


def test_logits_that_are_not_numbers_end_it_and_free_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    session = fake_session()
    nan = np.full((8, VOCABULARY), np.nan, np.float32)
    monkeypatch.setattr(session.executor, "forward", lambda t, p, s, rows: nan[: len(rows)])
    with pytest.raises(GristmillError, match="nan"):
        session.generate(["a", "b"])
    with pytest.raises(GristmillError, match="not a number"):
        negative_log_likelihood(session, [3, 4, 5])
    assert not session._slots._holders


def test_without_a_tokenizer() -> None:
    session = fake_session(tokenizer=False)
    result = session.generate([1, 2, 3], max_new_tokens=3)
    assert len(result.token_ids) == 3 and result.text == ""
    with pytest.raises(GristmillError, match="tokenizer"):
        session.generate("x")
    with pytest.raises(GristmillError, match="stop strings"):
        session.generate([1], stop="x")


def test_ids_beyond_the_tokenizer_print_as_nothing() -> None:
    session = fake_session(vocabulary=VOCABULARY + 40)
    assert session.tokenizer.decode([VOCABULARY + 3]) == ""
    assert session.generate("abc", max_new_tokens=30, temperature=5.0, seed=1).finish_reason is not None


def test_threads_generate_side_by_side() -> None:
    expected = {p: fake_session().generate(p, max_new_tokens=12).token_ids for p in PROMPTS}
    session = fake_session(max_slots=2)  # fewer slots than threads: some wait
    found: dict[str, list[int]] = {}

    def work(prompt: str) -> None:
        found[prompt] = session.generate(prompt, max_new_tokens=12).token_ids

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == expected


# ---- chat and tokenizers -----------------------------------------------------------------------------


def test_chat() -> None:
    session = fake_session()
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi", "name": None},
    ]
    assert session.tokenizer.chat(messages) == "<s>[system]be brief[user]hi[assistant]"
    ids = session.tokenizer.encode_chat(messages)
    assert ids[0] == BOS and ids.count(BOS) == 1
    with pytest.raises(GristmillError, match="message"):
        session.tokenizer.chat([])


@pytest.fixture(scope="module")
def transformers_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EXAMPLE)


def example_tokenizer(template: str | None = None) -> Tokenizer:
    config = parse_json((EXAMPLE / "tokenizer_config.json").read_bytes(), "tokenizer_config.json")
    return Tokenizer((EXAMPLE / "tokenizer.json").read_bytes(), config, template)


TEXTS = [
    "",
    " ",
    "def f(x):\n    return x\n",
    "naïve café 東京 🙂",
    "<|endoftext|>a",
    "\t\n",
    "a" * 3000,
    "\u200b\ufeff",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_are_those_of_transformers(transformers_tokenizer: Any, text: str) -> None:
    tokenizer = example_tokenizer()
    ids = transformers_tokenizer(text)["input_ids"]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == transformers_tokenizer.decode(ids, skip_special_tokens=True)


TEMPLATE = """{%- set ns = namespace(first=true) %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {{- '<|' + m['role'] + '|>' + m['content'] | trim + (eos_token if not ns.first else '') }}
    {%- set ns.first = false %}
    {% generation %}{{ {'k': m.content, 'é': [1, none, true]} | tojson }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{ '<|assistant|>' }}
{%- endif %}
{{ strftime_now('%Y') if tools is none and documents is not defined or true }}"""


def test_chats_are_those_of_transformers(transformers_tokenizer: Any) -> None:
    messages = [
        {"role": r, "content": c} for r, c in (("system", "s"), ("user", " <b>'hé'</b> "), ("assistant", "x"))
    ]
    for generate in (False, True):
        expected = transformers_tokenizer.apply_chat_template(
            messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=generate
        )
        assert example_tokenizer(TEMPLATE).chat(messages, add_generation_prompt=generate) == expected


# ---- evaluation --------------------------------------------------------------------------------------


def test_windows_cover_the_text_once() -> None:
    ids = list(range(100, 123))
    pieces = text_windows(ids, [0], 6)
    assert all(piece[0] == 0 and len(piece) <= 6 for piece in pieces)
    assert [i for piece in pieces for i in piece[1:]] == ids
    assert text_windows([5], [], 6) == []


def test_nll_is_the_log_softmax() -> None:
    logits = np.random.default_rng(0).normal(0, 5, (7, 50)).astype(np.float32)
    targets = np.arange(7)
    wide = logits.astype(np.float64)
    expected = np.log(np.exp(wide).sum(1)) - wide[targets, targets]
    np.testing.assert_allclose(token_nll(logits, targets), expected, rtol=1e-6)


@pytest.mark.parametrize("bos, counted", [(True, 50), (False, 50 - 5)])
def test_nll_of_a_text_is_that_of_its_windows(bos: bool, counted: int) -> None:
    """Every token but the one without anything before it is counted once, whatever the chunks."""
    text = "The quick brown fox jumps over the lazy dog, twice"
    found = [score_text(fake_session(bos=bos, max_tokens=n), text, window=10) for n in (1, 3, 16)]
    assert found[0].tokens == counted
    assert found[0] == found[1] == found[2]


def test_texts_that_cannot_be_scored() -> None:
    with pytest.raises(GristmillError, match="too short"):
        score_text(fake_session(bos=False), "x")
    with pytest.raises(GristmillError, match="max_len"):
        score_text(fake_session(), "some text", window=41)
    with pytest.raises(GristmillError, match="room"):
        score_text(fake_session(), "some text", window=2)


# ---- load --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("session") / "a")


def test_load_and_generate(artifact: Path) -> None:
    session = gristmill.load(artifact, threads=2)
    assert (session.max_len, session.max_slots, session.threads, session.vocabulary) == (64, 4, 2, VOCABULARY)
    assert session.eos_ids == {EOS, 299}
    assert session.memory["kv_bytes"] == footprint.kv_bytes(session.program, 64, 4)
    whole = session.generate(PROMPTS, max_new_tokens=10)
    alone = [gristmill.load(artifact, threads=1, max_slots=1).generate(p, max_new_tokens=10) for p in PROMPTS]
    assert [g.token_ids for g in whole] == [g.token_ids for g in alone]


def test_load_changes_the_limits(artifact: Path) -> None:
    session = gristmill.load(artifact, max_len=256, max_slots=9)
    assert (session.max_len, session.max_slots) == (256, 9)


def test_huge_pages_change_nothing_but_where_weights_lie(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, copied = gristmill.load(artifact), gristmill.load(artifact, hugepages=True)
    with (artifact / "weights.safetensors").open("rb") as file:  # the copy is of the file as it was
        assert copied.executor.weight_bytes == len(file.read())
    for prompt in PROMPTS:
        wanted = mapped.generate(prompt, max_new_tokens=10).token_ids
        assert copied.generate(prompt, max_new_tokens=10).token_ids == wanted
    needed = footprint.kv_bytes(mapped.program, 64, 4) + mapped.program.arena_bytes
    monkeypatch.setattr("gristmill.runtime.machine.available_memory_bytes", lambda: needed)
    gristmill.load(artifact)
    with pytest.raises(GristmillError, match="load without hugepages"):
        gristmill.load(artifact, hugepages=True)


def affinities() -> dict[int, set[int]]:
    """Processors that each thread of this process may run on."""
    return {int(task): os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="pinning needs two processors")
def test_pinned_threads_stay_on_processors_of_their_own(artifact: Path) -> None:
    before = affinities()
    plain, pinned = gristmill.load(artifact, threads=2), gristmill.load(artifact, threads=2, pin=True)
    new = [where for task, where in affinities().items() if task not in before]
    assert sorted(map(len, new)) == sorted([1, len(os.sched_getaffinity(0))])
    assert affinities()[os.getpid()] == before[os.getpid()]  # the caller goes where it likes
    wanted = plain.generate(PROMPTS[0], max_new_tokens=10).token_ids
    assert pinned.generate(PROMPTS[0], max_new_tokens=10).token_ids == wanted


@pytest.mark.parametrize(
    "given, message",
    [
        ({"threads": 200, "pin": True}, "expected at most"),
        ({"max_len": 257}, "max_len"),
        ({"max_len": 0}, "max_len"),
        ({"max_slots": -1}, "max_slots"),
        ({"threads": 0}, "threads"),
        ({"threads": "2"}, "threads"),
        ({"device": "gpu"}, "expected one of cpu, cuda, onnx:cpu, onnx:cuda, torchscript, pt2:cpu"),
        ({"device": "cuda", "threads": 2}, "are for device 'cpu'"),
        ({"thread": 2}, "did you mean threads"),
    ],
)
def test_loads_that_cannot_be(artifact: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        gristmill.load(artifact, **given)


def test_more_than_the_memory_is_refused_before_it_is_taken(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gristmill.runtime.machine.available_memory_bytes", lambda: 100_000)
    with pytest.raises(GristmillError, match="MiB"):
        gristmill.load(artifact, max_slots=64)
