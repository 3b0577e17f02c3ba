"""`gristmill serve` as OpenAI's own client sees it: texts, streams, log-probabilities, JSON by schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serve_load
from click.testing import CliRunner
from serving import MODEL, Running, openai, running
from tiny import CHAT_TEMPLATE, EOS, byte_tokenizer, fake_session, tiny_artifact

import gristmill
from gristmill.runtime.server.token_bytes import TokenBytes
from gristmill.runtime.tokenizer import Tokenizer

CHAT: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("server")
    session = gristmill.load(tiny_artifact(folder / "a", max_tokens=64, max_len=512), threads=1)
    with running(session, folder / "log") as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


def alone(server: Running, prompt: Any, **options: Any) -> Any:
    return server.session.generate(prompt, **options)


def test_a_completion_is_what_the_session_generates(server: Running, client: openai.OpenAI) -> None:
    expected = alone(server, "ab", max_new_tokens=9)
    found = client.completions.create(model=MODEL, prompt="ab", max_tokens=9, temperature=0)
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason == "length"
    assert found.usage is not None and found.usage.prompt_tokens == 3 and found.usage.completion_tokens == 9
    assert len(client.completions.create(model=MODEL, prompt="ab", temperature=0).choices[0].text) > 0


def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI, server: Running) -> None:
    expected = alone(server, "abc", max_new_tokens=200)
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="abc", max_tokens=200, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 200 and chunks[0].usage is None


def test_a_chat_goes_through_the_template(client: openai.OpenAI, server: Running) -> None:
    ids = server.session.tokenizer.encode_chat(CHAT)
    expected = alone(server, ids, max_new_tokens=20)
    asked: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_completion_tokens": 20, "temperature": 0}
    found = client.chat.completions.create(**asked)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].message.role == "assistant"
    parts = [CHAT[0], {"role": "user", "content": [{"type": "text", "text": text} for text in "hi"]}]
    assert (
        client.chat.completions.create(**{**asked, "messages": parts}).choices[0].message
        == found.choices[0].message
    )
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text


def test_a_chat_goes_on_as_far_as_the_context(client: openai.OpenAI, server: Running) -> None:
    found = client.chat.completions.create(model=MODEL, messages=CHAT, seed=1)
    assert found.usage is not None and found.choices[0].finish_reason in ("length", "stop")
    assert found.usage.total_tokens == server.session.max_len + 1 or found.choices[0].finish_reason == "stop"


def test_log_probabilities_of_completions(client: openai.OpenAI, server: Running) -> None:
    expected = alone(server, "ab", max_new_tokens=6, logprobs=3).logprobs
    for stream in (False, True):
        answer: Any = client.completions.create(
            model=MODEL, prompt="ab", max_tokens=6, temperature=0, logprobs=3, stream=stream
        )
        found = [chunk.choices[0].logprobs for chunk in (answer if stream else [answer])]
        values = [value for one in found if one for value in one.token_logprobs]
        assert values == pytest.approx([choice.logprob for choice in expected])
        tops = [top for one in found if one for top in one.top_logprobs]
        assert all(len(top) == 3 for top in tops)
        assert [max(top.values()) for top in tops] == pytest.approx([c.top[0][1] for c in expected])
        assert [offset for one in found if one for offset in one.text_offset] == list(range(6))


def test_log_probabilities_of_chats_have_bytes(client: openai.OpenAI, server: Running) -> None:
    ids = server.session.tokenizer.encode_chat(CHAT)
    expected = alone(server, ids, max_new_tokens=6, logprobs=2)
    found = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    assert found.choices[0].logprobs is not None and found.choices[0].logprobs.content is not None
    content = found.choices[0].logprobs.content
    assert [token.logprob for token in content] == pytest.approx([c.logprob for c in expected.logprobs])
    assert b"".join(bytes(token.bytes or []) for token in content).decode("utf-8", "replace") == expected.text
    assert all(len(token.top_logprobs) == 2 for token in content)


def test_samples_stand_beside_each_other(client: openai.OpenAI, server: Running) -> None:
    expected = alone(server, "ab", max_new_tokens=8, temperature=1.0, seed=5, n=3)
    found = client.completions.create(model=MODEL, prompt="ab", max_tokens=8, n=3, seed=5)
    assert [choice.text for choice in found.choices] == [one.text for one in expected]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert found.usage is not None and found.usage.prompt_tokens == 3 and found.usage.completion_tokens == 24
    texts = ["", "", ""]
    for chunk in client.completions.create(model=MODEL, prompt="ab", max_tokens=8, n=3, seed=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [one.text for one in expected]


def test_several_prompts_and_token_ids(client: openai.OpenAI, server: Running) -> None:
    expected = [one.text for one in alone(server, ["ab", "c"], max_new_tokens=5)]
    ids = [server.session.tokenizer.encode(text) for text in ("ab", "c")]
    for prompt in (["ab", "c"], ids):
        found = client.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
        assert [choice.text for choice in found.choices] == expected
    found = client.completions.create(model=MODEL, prompt=ids[0], max_tokens=5, temperature=0)
    assert [choice.text for choice in found.choices] == expected[:1]


def test_a_negative_seed_draws_the_same_twice(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(model=MODEL, prompt="q", max_tokens=12, seed=-3).choices[0].text
        for _ in range(2)
    }
    assert len(texts) == 1


def test_stop_strings_are_left_out_even_across_chunks(client: openai.OpenAI, server: Running) -> None:
    whole = alone(server, "abc", max_new_tokens=60).text
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": "abc",
        "max_tokens": 60,
        "temperature": 0,
        "stop": [stop],
    }
    found = client.completions.create(**asked)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_token_that_ends_a_text_has_no_log_probability(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model=MODEL, prompt="ab", max_tokens=6, temperature=0, logprobs=0, logit_bias={str(EOS): 100}
    )
    assert found.choices[0].finish_reason == "stop" and found.choices[0].text == ""
    assert found.choices[0].logprobs is None


def test_a_bias_of_minus_100_forbids(client: openai.OpenAI, server: Running) -> None:
    token = alone(server, "ab", max_new_tokens=1).token_ids[0]
    found = client.completions.create(
        model=MODEL, prompt="ab", max_tokens=8, temperature=0, logit_bias={str(token): -100}
    )
    expected = alone(server, "ab", max_new_tokens=8, logit_bias={token: float("-inf")})
    assert found.choices[0].text == expected.text


def test_extensions_reach_the_session(client: openai.OpenAI, server: Running) -> None:
    extra = {"top_k": 3, "min_p": 0.01, "repetition_penalty": 1.2, "no_repeat_ngram": 2, "min_tokens": 4}
    found = client.completions.create(model=MODEL, prompt="ab", max_tokens=8, seed=2, extra_body=extra)
    expected = alone(
        server, "ab", max_new_tokens=8, seed=2, temperature=1.0, top_k=3, min_p=0.01, repetition_penalty=1.2,
        no_repeat_ngram=2, min_new_tokens=4,
    )  # fmt: skip
    assert found.choices[0].text == expected.text


def test_json_by_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="schemas need gristmill[constrain]")
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "people": {"type": "integer", "maximum": 99}},
        "required": ["city", "people"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    found = client.chat.completions.create(
        model=MODEL, messages=CHAT, response_format=form, seed=4, max_tokens=60
    )
    value = json.loads(found.choices[0].message.content or "")
    assert value["city"] in ("Rome", "Oslo") and isinstance(value["people"], int)
    assert found.choices[0].finish_reason == "stop"
    chunks = client.completions.create(
        model=MODEL, prompt="x", seed=4, max_tokens=60, stream=True, extra_body={"response_format": form}
    )
    assert set(json.loads("".join(chunk.choices[0].text for chunk in chunks))) == {"city", "people"}
    found_text = client.completions.create(model=MODEL, prompt="x", extra_body={"choices": ["yes", "no"]})
    assert found_text.choices[0].text in ("yes", "no")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "gristmill"
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.models.retrieve("a/b")


BAD = [
    ({"prompt": "a", "model": "other"}, 404, "model", "'tiny'"),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({"prompt": "a", "max_tokens": 600}, 400, "prompt", "context holds 512"),
    ({"prompt": "a" * 600}, 400, "prompt", "has 601"),
    ({"prompt": []}, 400, "prompt", "empty list"),
    ({"prompt": [[]]}, 400, None, "empty"),
    ({"prompt": [1, 99999]}, 400, None, "99999"),
    ({"prompt": [10**30]}, 400, None, "expected"),
    ({"prompt": {"a": 1}}, 400, "prompt", "not as expected"),
    ({"prompt": "\ud800"}, 400, None, "surrogate"),
    ({}, 400, "prompt", "required"),
    ({"prompt": "a", "temperature": "hot"}, 400, "temperature", "number"),
    ({"prompt": "a", "temperature": 1e-9}, 400, None, "greedy"),
    ({"prompt": "a", "temperatur": 1}, 400, "temperatur", "temperature"),
    ({"prompt": "a", "echo": True}, 400, "echo", "not supported"),
    ({"prompt": "a", "best_of": 3}, 400, "best_of", "not supported"),
    ({"prompt": "a", "stream_options": {}}, 400, "stream_options", "stream"),
    ({"prompt": "a", "stop": ["x"] * 17}, 400, "stop", "at most 16"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "token id"),
    ({"prompt": "a", "logit_bias": {"5": 101}}, 400, "logit_bias", "-100 to 100"),
    ({"prompt": "a", "logit_bias": {"5000": 1}}, 400, None, "5000"),
    ({"prompt": "a", "response_format": {"type": "json_schema"}}, 400, "response_format", "json_schema"),
    ({"prompt": "a", "response_format": {"type": "xml"}}, 400, "response_format", "json"),
    ({"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}},
     400, None, "cannot be used"),
    ({"prompt": "a", "regex": "("}, 400, None, "regex"),
    ({"prompt": "a", "n": 100_000}, 400, "n", "at once"),
    (["prompt"], 400, None, "dictionary"),
]  # fmt: skip


@pytest.mark.parametrize("body, status, param, words", BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said(
    server: Running, body: Any, status: int, param: str | None, words: str
) -> None:
    found = server.post("/v1/completions", json.dumps(body))
    error = found.json()["error"]
    assert found.status_code == status and words in error["message"] and error["param"] == param, error
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "system"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool_calls"),
    ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools"),
    ({"messages": CHAT, "top_logprobs": 2}, "logprobs"),
    ({"messages": CHAT, "max_tokens": 2, "max_completion_tokens": 3}, "differ"),
]


@pytest.mark.parametrize("body, words", BAD_CHATS, ids=lambda value: str(value)[:40])
def test_what_is_wrong_with_a_chat_is_said(server: Running, body: Any, words: str) -> None:
    found = server.post("/v1/chat/completions", json.dumps(body))
    assert found.status_code == 400 and words in found.json()["error"]["message"], found.text


def test_what_changes_nothing_is_ignored(server: Running) -> None:
    body = {"user": "me", "store": True, "metadata": {"a": "b"}, "echo": False, "best_of": 1, "suffix": None}
    assert server.complete(max_tokens=3, **body).status_code == 200


def test_malformed_bodies_and_paths(server: Running) -> None:
    found = server.post("/v1/completions", b'{"prompt": "a"')
    assert found.status_code == 400 and found.json()["error"]["code"] == "invalid_json"
    assert server.post("/v1/completions", b"[" * 100_000).status_code == 400
    assert server.post("/v1/completions", b"\xff\xfe").status_code == 400
    plain = server.post("/v1/completions", b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415 and "application/json" in plain.json()["error"]["message"]
    assert server.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert server.get("/v1/completions").status_code == 405


def test_a_model_without_a_template_has_no_chats(tmp_path: Path) -> None:
    session = fake_session(max_len=200)
    assert session.tokenizer.chat_template == CHAT_TEMPLATE
    session.__dict__["tokenizer"] = Tokenizer(byte_tokenizer().to_str().encode())
    with running(session, tmp_path / "log") as server:
        found = server.post("/v1/chat/completions", {"messages": CHAT})
        assert found.status_code == 400 and found.json()["error"]["code"] == "no_chat_template"
        assert "/v1/completions" in found.json()["error"]["message"]


def test_a_log_line_for_each_request_without_its_text(server: Running) -> None:
    assert server.complete("secret-prompt", max_tokens=4).status_code == 200
    assert server.post("/v1/completions", {"prompt": "secret-prompt", "regex": "secret("}).status_code == 400
    server.complete("flush", max_tokens=1)
    lines = [line for line in server.lines() if line["event"] == "request"]
    done = next(line for line in reversed(lines) if line.get("completion_tokens") == 4)
    assert done["status"] == 200 and done["prompt_tokens"] == 14 and done["path"] == "/v1/completions"
    assert done["finish_reasons"] == ["length"] and done["seconds"] > 0
    assert any(line["status"] == 400 and line["code"] for line in lines)
    assert "secret" not in Path(server.log_path).read_text()


def test_metrics_count_what_was_done(server: Running) -> None:
    def value(name: str) -> float:
        text = server.get("/metrics").text
        return sum(
            float(line.split()[-1]) for line in text.splitlines() if line.split("{")[0].split()[0] == name
        )

    names = (
        "gristmill_generated_tokens_total", "gristmill_time_to_first_token_seconds_count",
        "gristmill_prefix_hits_total", "gristmill_batch_rows_sum", "gristmill_inter_token_seconds_count",
    )  # fmt: skip
    before = {name: value(name) for name in names}
    for _ in range(2):
        server.complete("a prompt of its own", max_tokens=11)
    after = {name: value(name) - before[name] for name in names}
    assert after["gristmill_generated_tokens_total"] == 22
    assert after["gristmill_time_to_first_token_seconds_count"] == 2
    assert after["gristmill_inter_token_seconds_count"] <= 20
    assert after["gristmill_prefix_hits_total"] >= 1 and after["gristmill_batch_rows_sum"] >= 22
    assert value("gristmill_kv_rows_in_use") == 0 < value("gristmill_kv_rows_kept")
    assert value("gristmill_ready") == 1 and value("gristmill_queued") == 0

    def has_gaps() -> bool:
        server.complete("a prompt of its own", max_tokens=11)
        return value("gristmill_inter_token_seconds_count") > 0

    assert any(has_gaps() for _ in range(20)), "a busy machine may hand over a short answer as a whole"


def test_many_streams_equal_their_single_runs(tmp_path: Path) -> None:
    artifact = str(tiny_artifact(tmp_path / "a", max_tokens=64, max_len=64))
    load = ["--streams", "14", "--tokens", "24", "--rounds", "1", "--max-slots", "4", "--max-queue", "8"]
    result = CliRunner().invoke(serve_load.main, [artifact, *load], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "answers: 14, other than alone or failed: 0" in result.output
    assert "tried again: 0" not in result.output, "twelve find room, the others come again"


TEXT = "def f(x):\n    return 'h\u00e9, \u20ac, \U0001f600'  # once upon a time\n"


def test_bytes_of_tokens_make_up_the_text(py7m: Path) -> None:
    spelled(Tokenizer.of_files({"tokenizer.json": (py7m / "tokenizer.json").read_bytes()}), TEXT)


def test_bytes_of_sentencepiece_tokens_make_up_the_text(stories260k: Path) -> None:
    tokenizer = Tokenizer.of_files({"tokenizer.json": (stories260k / "tokenizer.json").read_bytes()})
    spelled(tokenizer, " " + TEXT)  # it puts a space before every text


def spelled(tokenizer: Tokenizer, text: str) -> None:
    """The bytes of a text's tokens are the text; special tokens are themselves."""
    bytes_of = TokenBytes(tokenizer)
    ids = tokenizer.encode(text.removeprefix(" "), add_special_tokens=False)
    assert b"".join(bytes_of(token) for token in ids).decode() == text
    added = tokenizer.backend.get_added_tokens_decoder()
    assert all(bytes_of(token).decode() == str(named) for token, named in added.items())
    assert bytes_of(10**9) == b""
