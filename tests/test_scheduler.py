"""Many generations in one session: batches, prefixes, waiting, ends; over a fake executor."""

import asyncio
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import batches, fake_session, tiny_artifact

import gristmill
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.slots import Slots, common_prefix

LONG = "a text that is longer than what is worth copying: "


def alone(prompt: Any, **options: Any) -> list[int]:
    return list(fake_session(max_len=200).generate(prompt, **options).token_ids)


def in_threads(*calls: Any) -> list[Any]:
    """Results of the calls, made at once."""
    found: dict[int, Any] = {}
    together = threading.Barrier(len(calls))

    def work(number: int) -> None:
        together.wait()
        try:
            found[number] = calls[number]()
        except GristmillError as error:
            found[number] = error

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == len(calls), "some wait for ever"
    return [found[n] for n in range(len(calls))]


def nothing_is_left(session: gristmill.Session) -> bool:
    scheduler = session._scheduler
    idle = (
        not scheduler._driving
        and not scheduler._waiters
        and not scheduler._running
        and not scheduler._waiting
    )
    return idle and not session._slots._holders


# ---- many at once ------------------------------------------------------------------------------------


def test_many_threads_share_the_slots_and_get_what_each_gets_alone() -> None:
    session = fake_session(max_slots=8, max_tokens=16, max_len=200)
    prompts = [chr(97 + n % 26) * (1 + 7 * n % 40) + str(n) for n in range(64)]
    lengths = [1 + 5 * n % 30 for n in range(64)]
    options: list[dict[str, Any]] = [
        {"max_new_tokens": n, "temperature": 0.8 * (n % 2), "seed": n} for n in lengths
    ]
    calls = [
        lambda p=p, o=o: session.generate(p, **o).token_ids for p, o in zip(prompts, options, strict=True)
    ]
    assert in_threads(*calls) == [alone(p, **o) for p, o in zip(prompts, options, strict=True)]
    assert nothing_is_left(session)
    statistics = session.statistics
    assert statistics.requests == statistics.finished == 64
    assert statistics.generated_tokens == sum(lengths) and statistics.longest_wait_s > 0
    assert statistics.steps < sum(lengths) / 3, "several decode in a step"


def test_a_prompt_does_not_hold_up_those_that_decode() -> None:
    session = fake_session(max_slots=2, max_tokens=150, max_len=600)
    stream = session.stream("a", max_new_tokens=400, lookup=False)
    next(stream)
    before = len(batches(session))
    session.generate("b" * 400, max_new_tokens=1)
    assert max(batches(session)[before:]) == 129, "128 rows of the prompt beside one that decodes"


def test_streams_and_results_at_once() -> None:
    session = fake_session(max_slots=2, max_len=200)
    streams = [session.stream(c, max_new_tokens=12) for c in "abc"]
    firsts = [next(stream) for stream in streams]  # the third waits until another is through
    whole = session.generate("d", max_new_tokens=3).token_ids
    texts = [first + "".join(stream) for first, stream in zip(firsts, streams, strict=True)]
    assert whole == alone("d", max_new_tokens=3)
    assert texts == [fake_session(max_len=200).generate(c, max_new_tokens=12).text for c in "abc"]
    assert nothing_is_left(session)


def test_text_is_told_as_it_comes() -> None:
    session = fake_session(max_len=200)
    told: list[tuple[int, str]] = []
    results = session.generate(["a", "b"], on_text=lambda n, piece: told.append((n, piece)), max_new_tokens=9)
    for number, result in enumerate(results):
        assert "".join(piece for n, piece in told if n == number) == result.text
    assert len(told) > 4


def test_samples_of_a_prompt_differ_by_their_number_and_share_its_rows() -> None:
    session = fake_session(max_slots=3, max_tokens=64, max_len=300)
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seed": 5}
    four = session.generate(LONG * 2, n=4, **options)
    assert len({tuple(g.token_ids) for g in four}) == 4 and len({g.seed for g in four}) == 1
    assert four[0].token_ids == alone_in(300, LONG * 2, **options)
    rows = len(session.tokenizer.encode(LONG * 2))
    assert sum(g.reused_tokens for g in four) > 2 * rows
    pairs = session.generate(["a", "b"], n=2, **options)
    assert [len(pair) for pair in pairs] == [2, 2]
    assert session.generate(LONG * 2, n=4, **options)[3].token_ids == four[3].token_ids
    with pytest.raises(GristmillError, match="n is 2, a stream is of one sample"):
        session.stream("a", n=2)


def test_every_option_of_a_choice_gets_there() -> None:
    session = fake_session(max_len=200)
    plain = session.generate("abc", max_new_tokens=8)
    with_logprobs = session.generate("abc", max_new_tokens=8, logprobs=2)
    assert with_logprobs.token_ids == plain.token_ids and plain.logprobs is None
    assert [choice.token for choice in with_logprobs.logprobs] == plain.token_ids
    assert all(c.top[0] == (c.token, c.logprob) and len(c.top) == 2 for c in with_logprobs.logprobs)
    third = plain.token_ids[2]
    ended = session.generate("abc", max_new_tokens=8, stop_ids=third)
    assert ended.token_ids == plain.token_ids[:3] and ended.finish_reason == "stop"
    assert ended.text == session.tokenizer.decode(plain.token_ids[:2])
    longer = session.generate("abc", max_new_tokens=8, stop_ids=third, min_new_tokens=5)
    assert len(longer.token_ids) >= 5
    assert third not in session.generate("abc", max_new_tokens=8, logit_bias={third: float("-inf")}).token_ids
    ids = session.generate("abc", max_new_tokens=150, no_repeat_ngram=1).token_ids
    assert len(set(ids)) == len(ids)


def test_constraints_hold_in_a_generation() -> None:
    pytest.importorskip("llguidance", reason="needs the package llguidance")
    session = fake_session(max_len=200)
    options: dict[str, Any] = {"temperature": 1.5, "seed": 2, "max_new_tokens": 60}
    found = session.generate(["a", "bc"], n=3, regex="[a-f]{3}-[0-9]{4}", **options)
    texts = [g.text for pair in found for g in pair]
    assert all(re.fullmatch("[a-f]{3}-[0-9]{4}", text) for text in texts) and len(set(texts)) > 3
    assert all(g.finish_reason == "stop" for pair in found for g in pair)
    one = session.generate("x", choices=["yes", "no", "never"], **options)
    assert one.text in ("yes", "no", "never")
    enum = {"a": {"enum": [1, 2]}}
    schema = {"type": "object", "properties": enum, "required": ["a"], "additionalProperties": False}
    assert json.loads("".join(session.stream("x", schema=schema, **options)))["a"] in (1, 2)
    for bad, message in (
        ({"regex": "("}, "regex"), ({"schema": "{"}, "schema"), ({"regex": 3}, "regex is int"),
        ({"regex": "a", "choices": ["b"]}, "exclude each other"),
    ):  # fmt: skip
        with pytest.raises(GristmillError, match=message):
            session.generate("x", **bad)
    assert nothing_is_left(session)


def test_searches_stand_beside_generations() -> None:
    session = fake_session(max_slots=4, max_len=100)
    stream = session.stream("abc", max_new_tokens=6)
    first = next(stream)
    best = session.beam_search("abc", num_beams=3, max_new_tokens=6)[0]
    assert len(best.token_ids) == 6 and best.text
    assert session.beam_search("abc", num_beams=1, max_new_tokens=6)[0].token_ids == alone(
        "abc", max_new_tokens=6
    )
    assert first + "".join(stream) == fake_session().generate("abc", max_new_tokens=6).text
    with pytest.raises(GristmillError, match="did you mean num_beams"):
        session.beam_search("abc", num_beam=3)
    with pytest.raises(GristmillError, match="did you mean top_k"):
        session.contrastive_search("abc", topk=3)
    assert nothing_is_left(session)


# ---- ends --------------------------------------------------------------------------------------------


def test_what_a_callback_raises_ends_its_call_only() -> None:
    session = fake_session(max_slots=2, max_len=200)
    stream = session.stream("abc", max_new_tokens=20)
    first = next(stream)

    def fail(number: int, piece: str) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        session.generate("x", on_text=fail, max_new_tokens=50)
    with pytest.raises(GristmillError, match="on_text is 3"):
        session.generate("x", on_text=3)
    assert first + "".join(stream) == fake_session().generate("abc", max_new_tokens=20).text
    assert nothing_is_left(session)


def test_a_timeout_ends_the_text_where_it_is() -> None:
    session = fake_session(max_len=200)
    late = session.generate("abc", max_new_tokens=100, timeout_s=0.0)
    assert late.finish_reason == "timeout" and late.token_ids == [] and nothing_is_left(session)
    whole = session.generate("abc", max_new_tokens=100, timeout_s=60)
    assert whole.finish_reason == "length"
    with pytest.raises(GristmillError, match="timeout_s is -1"):
        session.generate("abc", timeout_s=-1)


def test_too_many_that_wait_are_refused() -> None:
    session = fake_session(max_slots=1, max_len=200)
    session._scheduler._max_waiting = 2
    stream = session.stream("abc", max_new_tokens=50)
    next(stream)
    prompts = [session.stream("x"), session.stream("y")]
    for waiting in prompts:
        session._scheduler.submit([waiting._sequence])
    with pytest.raises(GristmillError, match="2 sequences wait for a slot, max_waiting is 2"):
        session.generate("z")
    session._scheduler.cancel([waiting._sequence for waiting in prompts])
    stream.close()
    assert len(session.generate(["a", "b", "c", "d"], max_new_tokens=1)) == 4, "one call may be larger"


def test_a_failed_forward_ends_those_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    session = fake_session(max_slots=2, max_len=200)
    stream = session.stream("abc", max_new_tokens=20)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(session.executor, "forward", None)
        with pytest.raises(TypeError):
            session.generate("x")
    with pytest.raises(TypeError):
        list(stream)
    assert nothing_is_left(session)
    assert session.generate("abc", max_new_tokens=3).token_ids == alone("abc", max_new_tokens=3)


def test_an_interrupt_ends_the_call_that_it_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    session = fake_session(max_slots=2, max_len=200)
    stream = session.stream("abc", max_new_tokens=20)
    text = next(stream)
    forward = session.executor.forward

    def interrupted(*arguments: Any) -> np.ndarray:
        monkeypatch.setattr(session.executor, "forward", forward)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.executor, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.generate("x")
    text += "".join(stream)
    assert text == fake_session().generate("abc", max_new_tokens=20).text
    assert nothing_is_left(session)


def test_a_stream_forgotten_is_ended() -> None:
    session = fake_session(max_slots=1, max_len=200)
    stream = session.stream("abc", max_new_tokens=100)
    next(stream)
    result = stream.result
    del stream
    assert result.finish_reason == "cancelled" and nothing_is_left(session)
    with session.stream("abc", max_new_tokens=100) as stream:
        next(stream)
    assert nothing_is_left(session)


def test_what_is_cancelled_behind_the_last_step_is_let_go() -> None:
    session = fake_session(max_slots=1, max_len=200)
    scheduler, stream = session._scheduler, session.stream("abc", max_new_tokens=100)
    next(stream)
    assert scheduler._take_the_reins(lambda: False), "as another thread that has made its last step"
    stream.close()
    assert session._slots._holders
    scheduler._hand_over()
    assert nothing_is_left(session) and stream.result.finish_reason == "cancelled"


def test_time_runs_while_others_hold_the_slots() -> None:
    session = fake_session(max_slots=1, max_len=200)
    held, done = threading.Event(), threading.Event()

    def holds() -> str:
        with session.slot():
            held.set()
            done.wait()
        return ""

    def asks() -> str:
        held.wait()
        late = session.generate("x", timeout_s=0.1)
        done.set()
        return str(late.finish_reason)

    assert in_threads(holds, asks) == ["", "timeout"] and nothing_is_left(session)


def test_slots_beyond_the_rows_of_a_forward_take_turns() -> None:
    session = fake_session(max_slots=6, max_tokens=2, max_len=100)
    ends: list[int] = []
    session.generate(
        [chr(97 + n) for n in range(6)], max_new_tokens=40, lookup=False,
        on_text=lambda number, piece: ends.append(number),
    )  # fmt: skip
    assert set(ends[len(ends) // 2 :]) == set(range(6)), "all are on their way when half is done"


def test_a_slot_lent_stays_lent_when_it_is_reset() -> None:
    session = fake_session()
    with session.slot() as slot:
        session.forward([1], [0], [slot])
        session.reset(slot)
        session.forward([1], [0], [slot])


def test_a_forward_that_fails_may_have_written_a_ring() -> None:
    slots = Slots(max_slots=1, max_len=100, ring=14, reach=4)
    one, first, ends = np.array([0]), np.array([0]), np.array([20])
    slots.advance(one, first, ends)
    slots.begin(one, np.array([20]), np.array([24]))  # and no advance
    assert slots.reachable(0, 17) == 0 and slots.reachable(0, 20) == 20


def test_waiting_for_a_slot_that_cannot_come_is_refused() -> None:
    """A thread that holds the only slot waits for the driver, and the driver for the slot."""
    session = fake_session(max_slots=1)
    inside = threading.Event()

    def holds() -> str:
        with session.slot():
            inside.set()
            time.sleep(0.05)
            return str(session.generate("x").text)

    def asks() -> str:
        inside.wait()
        return str(session.generate("y").text)

    assert any(isinstance(found, GristmillError) for found in in_threads(holds, asks))
    assert nothing_is_left(session)


# ---- prefixes ----------------------------------------------------------------------------------------


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == common_prefix([3], [1]) == 0


def test_a_conversation_goes_on_in_its_slot() -> None:
    session = fake_session(max_slots=2, max_tokens=64, max_len=200)
    ids = session.tokenizer.encode(LONG)
    first = session.generate(ids, max_new_tokens=5)
    more = [*ids, *first.token_ids, 70, 71]
    second = session.generate(more, max_new_tokens=5)
    assert second.token_ids == alone(more, max_new_tokens=5)
    assert second.reused_tokens == len(more) - 3, (
        "all but the last token, which nobody had run, and the new ones"
    )
    assert session.statistics.reused_tokens == second.reused_tokens


def test_a_common_beginning_is_copied_and_stays() -> None:
    session = fake_session(max_slots=3, max_tokens=64, max_len=200)
    prompts = [LONG + end for end in ("one", "two", "three", "four", "one and more")]
    found = [session.generate(p, max_new_tokens=6) for p in prompts]
    assert [g.token_ids for g in found] == [alone(p, max_new_tokens=6) for p in prompts]
    begin = len(session.tokenizer.encode(LONG))
    assert [g.reused_tokens >= begin for g in found] == [False, True, True, True, True]


def test_prompts_of_one_batch_share_what_they_begin_with() -> None:
    session = fake_session(max_slots=4, max_tokens=32, max_len=300)
    prompts = [LONG * 3 + end for end in "abcd"]
    found = session.generate(prompts, max_new_tokens=4)
    assert [g.token_ids for g in found] == [alone_in(300, p, max_new_tokens=4) for p in prompts]
    begin = len(session.tokenizer.encode(LONG * 3))
    assert [g.reused_tokens >= begin - 64 for g in found] == [False, True, True, True]
    assert sum(batches(session)) < 2 * begin + 100


def alone_in(max_len: int, prompt: str, **options: Any) -> list[int]:
    return list(fake_session(max_len=max_len).generate(prompt, **options).token_ids)


def test_forward_never_reads_what_a_generation_left() -> None:
    session = fake_session(max_slots=1, max_tokens=64, max_len=200)
    session.generate(LONG, max_new_tokens=2)
    with pytest.raises(GristmillError, match="holds 0 positions"):
        session.forward([1], [3], [0])
    session.forward([1], [0], [0])
    session.reset(0)
    assert session.generate(LONG, max_new_tokens=2).reused_tokens == 0
    with session.slot() as slot, pytest.raises(GristmillError, match="holds 0 positions"):
        session.forward([1], [3], [slot])


def test_a_ring_is_reused_only_where_it_holds_the_window() -> None:
    slots = Slots(max_slots=2, max_len=100, ring=14, reach=4)  # window 10, max_tokens 4
    slot = slots.take()
    assert slot is not None
    rows = np.arange(12)
    slots.advance(np.array([slot]), np.array([0]), np.array([len(rows)]))
    slots.give_back(slot, rows.tolist())
    assert slots.longest_kept([0, 1, 2, 9]) == (slot, 3), "nothing overwritten yet"
    assert slots.take_kept(slot, 12, 0)
    slots.advance(np.array([slot]), np.array([12]), np.array([20]))
    slots.give_back(slot, list(range(20)))
    assert slots.longest_kept([0, 1, 2, 9]) == (-1, 0)
    assert slots.longest_kept(list(range(17))) == (slot, 17)


def test_prefixes_in_the_real_executor(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a")
    prompts = [[5 + n % 3 for n in range(40)] + end for end in ([7], [8, 9], [7, 7, 7])]
    expected = [
        gristmill.load(artifact, max_slots=1).generate(p, max_new_tokens=10).token_ids for p in prompts
    ]
    session = gristmill.load(artifact, max_slots=3)
    for _ in range(2):
        assert [g.token_ids for g in session.generate(prompts, max_new_tokens=10)] == expected
    assert session.statistics.reused_tokens > 100


# ---- asynchronous ------------------------------------------------------------------------------------


def test_asynchronous_streams_run_side_by_side() -> None:
    session = fake_session(max_slots=2, max_len=200)

    async def one(prompt: str) -> str:
        return "".join([piece async for piece in session.astream(prompt, max_new_tokens=8)])

    async def everything() -> list[str]:
        return list(await asyncio.gather(*[one(p) for p in "abcdef"]))

    expected = [fake_session(max_len=200).generate(p, max_new_tokens=8).text for p in "abcdef"]
    assert asyncio.run(everything()) == expected
    assert asyncio.run(everything()) == expected, "with the thread started anew"
    assert sum(batches(session)) > len(batches(session)), "several in one forward"


def test_an_asynchronous_stream_given_up_frees_its_slot() -> None:
    session = fake_session(max_slots=1, max_len=200)

    async def give_up() -> str:
        stream = session.astream("abc", max_new_tokens=150)
        async for _ in stream:
            break
        await stream.aclose()
        while stream.result.finish_reason is None:  # the step under way ends first
            await asyncio.sleep(0.001)
        return stream.result.finish_reason

    async def fail() -> None:
        async for _ in session.astream([10**6]):
            pass

    assert asyncio.run(give_up()) in ("cancelled", "length")
    with pytest.raises(GristmillError, match="token id"):
        asyncio.run(fail())
    assert session.generate("abc", max_new_tokens=2).finish_reason == "length"


def test_a_child_process_goes_on_by_itself() -> None:
    session = fake_session(max_slots=2, max_len=200)
    stream = session.stream("abc", max_new_tokens=20)
    text = next(stream)
    expected = alone("x", max_new_tokens=3)
    child = os.fork()
    if child == 0:
        whole = text + "".join(stream) == stream.result.text
        os._exit(0 if whole and session.generate("x", max_new_tokens=3).token_ids == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert text + "".join(stream) == fake_session().generate("abc", max_new_tokens=20).text
