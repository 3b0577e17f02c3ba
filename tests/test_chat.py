"""`gristmill run` without --prompt: a text on stdin, and conversations at a terminal."""

import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from tiny import fake_session, tiny_artifact

import gristmill
from gristmill.cli import cli
from gristmill.cli_chat import ChatHistory, History, TextHistory, converse
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.session import Session


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With room for an answer that takes longer than a person's patience."""
    return str(tiny_artifact(tmp_path_factory.mktemp("chat") / "a", max_len=100_000))


def run(artifact: str, *arguments: str, stdin: bytes | str = b"") -> Result:
    return CliRunner().invoke(cli, ["run", artifact, *arguments], input=stdin)


# ---- a text on stdin ---------------------------------------------------------------------------------


def test_the_prompt_may_come_from_stdin(artifact: str) -> None:
    expected = gristmill.load(artifact).generate("ab\nc\n", max_new_tokens=6)
    assert run(artifact, "--max-new-tokens", "6", stdin="ab\nc\n\n").stdout == expected.text + "\n"
    result = json.loads(run(artifact, "--max-new-tokens", "6", "--json", stdin="ab\nc\n\n").stdout)
    assert result["token_ids"] == expected.token_ids and result["reused_tokens"] == 0
    assert result["prompt_tokens"] == 1 + len("ab\nc\n"), "one newline at the end is the file's"


def test_a_prompt_is_preferred_to_stdin(artifact: str) -> None:
    result = json.loads(run(artifact, "--prompt", "", "--json", "--max-new-tokens", "2", stdin="abc").stdout)
    assert result["prompt_tokens"] == 1


@pytest.mark.parametrize("stdin, message", [(b"", "stdin is empty"), (b"a\xff", "byte 1 does not fit")])
def test_stdin_that_is_no_text(artifact: str, stdin: bytes, message: str) -> None:
    error = run(artifact, stdin=stdin).exception
    assert isinstance(error, GristmillError) and message in str(error)


def test_timeout_and_lookup(artifact: str) -> None:
    slow = run(artifact, "--prompt", "a", "--max-new-tokens", "90000", "--timeout", "0.05", "--json")
    assert json.loads(slow.stdout)["finish_reason"] == "timeout"
    few = ("--prompt", "abab", "--max-new-tokens", "20", "--json")
    texts = [json.loads(run(artifact, *few, *more).stdout)["text"] for more in ((), ("--no-lookup",))]
    assert texts[0] == texts[1]
    assert "timeout_s" in str(run(artifact, "--prompt", "a", "--timeout", "-1").exception)


# ---- options of generation ---------------------------------------------------------------------------


def texts(artifact: str, *arguments: str) -> list[str]:
    """The texts that `run --json` gives for some prompt."""
    few = () if "--max-new-tokens" in arguments else ("--max-new-tokens", "8")
    result = run(artifact, "--prompt", "ab", "--json", *few, *arguments)
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    return [one["text"] for one in (found if isinstance(found, list) else [found])]


@pytest.mark.parametrize(
    "arguments, options",
    [
        (("--min-p", "0.2"), {"min_p": 0.2}),
        (("--typical-p", "0.5"), {"typical_p": 0.5}),
        (("--presence-penalty", "2"), {"presence_penalty": 2.0}),
        (("--frequency-penalty", "2"), {"frequency_penalty": 2.0}),
        (("--no-repeat-ngram", "1"), {"no_repeat_ngram": 1}),
        (("--logit-bias", "70=30", "--logit-bias", "71=-inf"), {"logit_bias": {70: 30, 71: float("-inf")}}),
        (("--stop-id", "9", "--stop-id", "70"), {"stop_ids": [9, 70]}),
        (("--n", "3"), {"n": 3}),
    ],
)
def test_options_reach_the_session(
    artifact: str, arguments: tuple[str, ...], options: dict[str, Any]
) -> None:
    drawn = ("--temperature", "1.5", "--seed", "3")
    found = gristmill.load(artifact).generate("ab", max_new_tokens=8, temperature=1.5, seed=3, **options)
    expected = [one.text for one in (found if isinstance(found, list) else [found])]
    assert texts(artifact, *drawn, *arguments) == expected


def test_a_draft_changes_no_text(artifact: str) -> None:
    assert texts(artifact, "--draft", artifact) == texts(artifact)


def test_several_answers_as_text(artifact: str) -> None:
    shown = run(artifact, "--prompt", "a", "--n", "2", "--max-new-tokens", "3").stdout
    assert shown.startswith("--- 1 of 2\n") and "\n--- 2 of 2\n" in shown


def test_logprobs(artifact: str) -> None:
    arguments = ("--prompt", "a", "--json", "--logprobs", "2", "--max-new-tokens", "3")
    found = json.loads(run(artifact, *arguments).stdout)["logprobs"]
    assert len(found) == 3 and all(one["top"][0] == [one["token"], one["logprob"]] for one in found)


def test_beams(artifact: str) -> None:
    session = gristmill.load(artifact, max_slots=3)
    expected = session.beam_search(
        "ab", num_beams=3, num_return_sequences=2, length_penalty=0.5, max_new_tokens=8
    )
    beams = ("--beams", "3", "--length-penalty", "0.5")
    assert texts(artifact, *beams, "--n", "2") == [beam.text for beam in expected]
    assert texts(artifact, *beams) == [expected[0].text]
    error = run(artifact, "--prompt", "a", "--beams", "2", "--temperature", "1").exception
    assert isinstance(error, GristmillError) and "beam search has no option 'temperature'" in str(error)


def test_contrastive_search(artifact: str) -> None:
    session = gristmill.load(artifact)
    expected = [
        session.contrastive_search("ab", max_new_tokens=8, top_k=k, penalty_alpha=0.6).text for k in (4, 2)
    ]
    found = [texts(artifact, "--penalty-alpha", "0.6", *more)[0] for more in ((), ("--top-k", "2"))]
    assert found == expected


def test_constraints(artifact: str, tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance (`pip install 'gristmill[constrain]'`)")
    assert texts(artifact, "--regex", "[xy]{3}z")[0][3:] == "z"
    assert texts(artifact, "--choice", "yes", "--choice", "no")[0] in ("yes", "no")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["left", "right"]}')
    assert json.loads(texts(artifact, "--schema", str(schema))[0]) in ("left", "right")


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("--logit-bias", "a=1"), 2, "is not ID=BIAS"),
        (("--logprobs", "1"), 2, "--logprobs needs --json"),
        (("--length-penalty", "1"), 2, "--length-penalty needs --beams"),
        (("--beams", "2", "--draft", "x"), 2, "--beams does not go with --draft"),
        (("--beams", "2", "--penalty-alpha", "0.5"), 2, "does not go with --penalty-alpha"),
        (("--penalty-alpha", "7"), 1, "penalty_alpha is 7"),
        (("--penalty-alpha", "0.6", "--top-p", "0.5"), 1, "contrastive search has no option 'top_p'"),
        (("--schema", "/nowhere"), 1, "schema /nowhere cannot be read"),
        (("--regex", "a", "--choice", "b"), 1, "exclude each other"),
        (("--n", "0"), 1, "n is 0"),
        (("--beams", "0"), 1, "num_beams is 0"),
    ],
)
def test_options_that_do_not_go_together(
    artifact: str, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run(artifact, "--prompt", "a", *arguments)
    assert result.exit_code == code and message in f"{result.stderr} {result.exception}"


def test_conversations_are_of_one_text(artifact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    for option in (("--n", "2"), ("--beams", "2"), ("--penalty-alpha", "1"), ("--json",)):
        assert "needs --prompt" in run(artifact, *option).stderr


# ---- conversations -----------------------------------------------------------------------------------


class Typist:
    """What a person types, one line for each call; an exception is raised."""

    def __init__(self, *lines: str | type[BaseException]):
        self._lines = iter([*lines, EOFError])

    def __call__(self) -> str:
        line = next(self._lines)
        if isinstance(line, str):
            return line
        raise line


def talk(
    session: Session, history: History, *lines: str | type[BaseException], max_new_tokens: int = 4
) -> list[str]:
    """The prompts that reached the session, as text."""
    prompts, stream = [], session.stream

    def watched(ids: list[int], **options: object) -> object:
        prompts.append(session.tokenizer.decode(ids, skip_special_tokens=False))
        return stream(ids, **options)

    session.stream = watched  # type: ignore[method-assign, assignment]
    converse(session, history, {"max_new_tokens": max_new_tokens}, Typist(*lines))
    return prompts


def answers(session: Session, prompts: list[str]) -> list[str]:
    return [
        session.generate(session.tokenizer.encode(p, add_special_tokens=False), max_new_tokens=4).text
        for p in prompts
    ]


def test_a_chat_keeps_its_history() -> None:
    session = fake_session(max_len=200)
    prompts = talk(session, ChatHistory(session, "be brief"), "hi", "  ", "and?", "/reset", "new")
    first, second, _ = answers(fake_session(max_len=200), prompts)
    begin = "<s>[system]be brief[user]"
    assert prompts == [
        f"{begin}hi[assistant]",
        f"{begin}hi[assistant]{first}[user]and?[assistant]",
        f"{begin}new[assistant]",
    ]
    assert second


def test_a_text_goes_on() -> None:
    session = fake_session(max_len=200)
    prompts = talk(session, TextHistory(session), "", "ab", "", "cd")
    said = answers(fake_session(max_len=200), prompts)
    assert prompts[0] == "<s>ab" and len(prompts) == 3
    assert session.statistics.reused_tokens == (3 + 3) + (3 + 4 + 3), "each begins where the last one ended"
    assert all(said)


def test_a_stop_string_is_not_part_of_the_text() -> None:
    session = fake_session(max_len=200)
    text = session.generate("ab", max_new_tokens=4).text
    history = TextHistory(session)
    ids = history.prompt("ab")
    assert ids is not None
    history.add("ab", ids, session.generate(ids, max_new_tokens=4, stop=text[-1]))
    found = history.prompt("")
    assert found is not None and session.tokenizer.decode(found) == "ab" + text[: text.index(text[-1])]


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    session = fake_session()
    assert talk(session, TextHistory(session), "/help", "/reset", "/what", "/exit", "never said") == []
    err = capsys.readouterr().err
    for expected in ("/reset  forget", "history is forgotten", "no command /what"):
        assert expected in err
    assert talk(session, TextHistory(session), "/usr/bin", "// no") != [], "these are text"


def test_a_history_that_is_too_long_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    session = fake_session(max_len=40)
    assert len(talk(session, ChatHistory(session, None), "a" * 50, "b", "c" * 30, "/reset", "d")) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "max_len is 40" in line]
    assert len(lines) == 2 and all("/reset forgets it" in line for line in lines)
    assert len(talk(session, ChatHistory(session, None), "d", max_new_tokens=40)) == 1
    assert "fills max_len = 40" in capsys.readouterr().err


def test_an_error_leaves_the_history_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    session = fake_session()
    prompts = talk(session, TextHistory(session), "a\udc80", "b")
    assert prompts == ["<s>b"] and "error: the text holds a lone surrogate" in capsys.readouterr().err


def test_control_c_at_the_line() -> None:
    session = fake_session()
    talk(session, TextHistory(session), KeyboardInterrupt, "a", KeyboardInterrupt)
    with pytest.raises(click.exceptions.Exit) as ended:
        talk(session, TextHistory(session), KeyboardInterrupt, KeyboardInterrupt)
    assert ended.value.exit_code == 130


def test_a_system_message_needs_a_chat(artifact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    assert run(artifact, "--json").exit_code == 2
    assert "--system needs a chat" in str(run(artifact, "--no-chat", "--system", "x").exception)
    assert "A chat;" in run(artifact, stdin="").stderr
    assert "A text that goes on" in run(artifact, "--no-chat", stdin="").stderr


# ---- at a real terminal ------------------------------------------------------------------------------


@pytest.fixture
def terminal(artifact: str) -> Iterator[tuple[Callable[[str, str], str], int]]:
    """Types at `gristmill run`, returns what came until a text appears; and the process id."""
    process, screen = pty.fork()
    if process == 0:
        path = os.pathsep.join(part for part in sys.path if part)
        environment = {**os.environ, "PYTHONPATH": path, "TERM": "dumb"}
        long = ["--max-new-tokens", "90000", "--ignore-eos", "--no-lookup"]
        os.chdir("/")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        os.execve(sys.executable, [sys.executable, "-m", "gristmill", "run", artifact, *long], environment)
    shown = ""

    def type_and_wait(keys: str, expected: str) -> str:
        nonlocal shown
        os.write(screen, keys.encode())
        end = time.monotonic() + 60
        while expected not in shown:
            ready, _, _ = select.select([screen], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{expected!r} did not come, but {shown[-2000:]!r}"
            shown += os.read(screen, 1 << 16).decode("utf-8", "replace")
        found, _, shown = shown.partition(expected)
        return found

    try:
        yield type_and_wait, process
    finally:
        os.close(screen)


def test_control_c_stops_the_answer_and_not_the_program(
    terminal: tuple[Callable[[str, str], str], int],
) -> None:
    type_and_wait, process = terminal
    type_and_wait("", "\n> ")
    type_and_wait("hello\n", "hello")
    time.sleep(0.5)  # into the answer
    assert "tokens" in type_and_wait("\x03", "ended by cancelled")
    type_and_wait("", "> ")
    type_and_wait("again\n", "again")
    time.sleep(0.5)
    assert "reused" in type_and_wait("\x03", "ended by cancelled"), "the first turn is part of the second"
    type_and_wait("", "> ")
    time.sleep(0.5)  # readline shows the prompt before it waits, and misses a signal in between
    type_and_wait("\x03", "\n")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
