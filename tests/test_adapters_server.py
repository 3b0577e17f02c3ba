"""Adapters chosen by a request's `model`, over HTTP and on the command line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adapters import PREFIX, save_adapter
from serving import MODEL, Running, openai, running
from tiny import tiny_artifact

import gristmill
from gristmill.cli import run_command
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server.settings import Settings


def tiny_adapter(folder: Path, seed: int) -> Path:
    """For tiny_artifact, whose linears are qkv, out and head."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, n, k in (("qkv", 32, 16), ("out", 16, 16), ("head", 258, 16)):
        for part, shape in (("A", (4, k)), ("B", (n, 4))):
            tensors[f"{PREFIX}{name}.lora_{part}.weight"] = torch.randn(shape, generator=generator) / 2
    return save_adapter(folder, tensors)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny_artifact(folder / "artifact", max_tokens=64, max_len=512)
    for seed, name in enumerate(("sql", "law")):
        tiny_adapter(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    adapters = {name: folder / name for name in ("sql", "law")}
    session = gristmill.load(folder / "artifact", threads=1, adapters=adapters)
    with running(session, folder / "log") as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


def test_models_of_adapters_are_listed(client: openai.OpenAI) -> None:
    found = {model.id: model.model_dump() for model in client.models.list()}
    assert list(found) == [MODEL, "sql", "law"]
    assert "parent" not in found[MODEL] and found["sql"]["parent"] == found["law"]["parent"] == MODEL
    assert client.models.retrieve("law").model_dump() == found["law"]


def test_requests_of_several_models_run_in_one_batch(server: Running, client: openai.OpenAI) -> None:
    alone = gristmill.load(server.session.artifact.path, threads=1)  # type: ignore[union-attr]
    for name, held in server.session.adapters.all.items():
        alone.load_adapter(name, held.path)
    names = [MODEL, "sql", "law", "sql"]
    expected = {
        name: alone.generate("ab", max_new_tokens=150, adapter=None if name == MODEL else name).text
        for name in names
    }
    assert len(set(expected.values())) == 3
    before = server.session.statistics
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        answer = client.completions.create(
            model=names[number], prompt="ab", max_tokens=150, temperature=0, extra_body={"ignore_eos": False}
        )
        assert answer.model == names[number]
        found[number] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(names))] == [expected[name] for name in names]
    after = server.session.statistics
    assert after.rows - before.rows > after.steps - before.steps, "some steps had rows of several"


def test_streams_and_chats_of_an_adapter(server: Running, client: openai.OpenAI) -> None:
    expected = server.session.generate("abc", max_new_tokens=40, adapter="law").text
    chunks = list(
        client.completions.create(model="law", prompt="abc", max_tokens=40, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert {chunk.model for chunk in chunks} == {"law"}
    chat = client.chat.completions.create(
        model="sql", messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=9
    )
    ids = server.session.tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    expected = server.session.generate(ids, max_new_tokens=9, adapter="sql").text
    assert chat.choices[0].message.content == expected
    asked = [line.get("adapter") for line in server.lines() if line.get("status") == 200]
    assert asked[-1] == "sql"


def test_an_unknown_model_is_named_with_those_there_are(server: Running) -> None:
    answer = server.complete(model="sq")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found" and "'tiny', 'sql', 'law'" in error["message"]
    assert server.get("/v1/models/sq").status_code == 404


def test_an_adapter_is_loaded_and_unloaded_while_serving(server: Running, folder: Path) -> None:
    server.session.load_adapter("late", folder / "law")
    assert server.complete(model="late").json()["model"] == "late"
    server.session.unload_adapter("late")
    assert server.complete(model="late").status_code == 404


def test_an_adapter_with_the_models_name_is_refused(folder: Path) -> None:
    from gristmill.runtime.server.logs import Log
    from gristmill.runtime.server.serve import make_server

    session = gristmill.load(folder / "artifact", threads=1, adapters={MODEL: folder / "sql"})
    log = Log(str(folder / "other-log"))
    with pytest.raises(GristmillError, match="an adapter has the model's name, 'tiny'"):
        make_server(session, Settings(model=MODEL), log, lambda: None)
    log.close()


# ---- the command line


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    found = run_command(list(arguments))
    out, err = capsys.readouterr()
    assert found == code, (out, err)
    return out if code == 0 else err


def test_run_and_eval_with_an_adapter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = gristmill.load(folder / "artifact", threads=1, adapters={"x": folder / "sql"})
    expected = [session.generate("abc", max_new_tokens=8, adapter=name).token_ids for name in ("x", None)]
    assert expected[0] != expected[1]
    run = ("run", str(folder / "artifact"), "--prompt", "abc", "--max-new-tokens", "8", "--json")
    for given, ids in ((f"x={folder / 'sql'}", 0), (str(folder / "sql"), 0), ("", 1)):
        option = ("--adapter", given) if given else ()
        assert json.loads(output(capsys, *run, *option))["token_ids"] == expected[ids]
    beams = json.loads(output(capsys, *run, "--beams", "2", "--adapter", str(folder / "sql")))
    found = session.beam_search("abc", num_beams=2, max_new_tokens=8, adapter="x")
    assert beams["token_ids"] == found[0].token_ids
    text = folder / "text"
    text.write_text("some text to score, some text to score")
    measured = ("eval", str(folder / "artifact"), "--text", str(text), "--json")
    with_adapter, without = (
        json.loads(output(capsys, *measured, *given))["nll"]
        for given in (("--adapter", f"x={folder / 'sql'}"), ())
    )
    assert with_adapter != without


def test_what_is_wrong_on_the_command_line_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("run", str(folder / "artifact"), "--prompt", "abc")
    assert "expected a folder that PEFT saved" in output(capsys, *run, "--adapter", "x=nowhere", code=1)
    assert "is not NAME=DIR" in output(capsys, *run, "--adapter", "=nowhere", code=2)
    device = ("--device", "onnx:cpu", "--adapter", str(folder / "sql"))
    assert "for device 'cpu'" in output(capsys, *run, *device, code=1)
    serve = ("serve", str(folder / "artifact"), "--port", "0")
    twice = ("--adapter", f"x={folder / 'sql'}", "--adapter", f"x={folder / 'law'}")
    assert "'x' is given twice" in output(capsys, *serve, *twice, code=2)
    same = ("--model-name", "x", "--adapter", f"x={folder / 'sql'}")
    assert "an adapter has the model's name" in output(capsys, *serve, *same, code=1)
    auto = ("compile", "nowhere", "-o", "out", "--auto", "--max-ppl-increase", "1%", "--lora", "x")
    assert "--lora does not go with --auto" in output(capsys, *auto, code=2)
