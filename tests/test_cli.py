"""The command line: what it prints where, its exit codes, its one-line errors."""

import json
import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
from tiny import tiny_artifact

import gristmill
from gristmill.cli import cli, run_command
from gristmill.compiler.options import CompileOptions
from gristmill.quant.scheme import FORMATS
from gristmill.runtime.errors import GristmillError


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_artifact(tmp_path_factory.mktemp("cli") / "a"))


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command that ends with exit code `code`."""
    found = run_command(list(arguments))
    out, err = capsys.readouterr()
    assert found == code, (out, err)
    return out, err


def test_run(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = gristmill.load(artifact).generate("abc", max_new_tokens=6)
    out, err = output(capsys, "run", artifact, "--prompt", "abc", "--max-new-tokens", "6")
    assert out == expected.text + "\n" and "4 + 6 tokens" in err
    result = json.loads(
        output(capsys, "run", artifact, "--prompt", "abc", "--max-new-tokens", "6", "--json")[0]
    )
    assert result["text"] == expected.text and result["token_ids"] == expected.token_ids
    assert {"finish_reason", "prompt_tokens", "ttft_s", "decode_tok_s"} <= set(result)


def test_run_samples_by_seed(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "run",
        artifact,
        "--prompt",
        "a",
        "--temperature",
        "2",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
        "--json",
    ]
    texts = [json.loads(output(capsys, *arguments, "--seed", seed)[0])["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_run_chat(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(
        output(capsys, "run", artifact, "--prompt", "hi", "--chat", "--system", "s", "--json")[0]
    )
    assert result["prompt_tokens"] == len("<[system]s[user]hi[assistant]".removeprefix("<")) + 1
    assert "needs --chat" in output(capsys, "run", artifact, "--prompt", "hi", "--system", "s", code=1)[1]


def test_inspect(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output(capsys, "inspect", artifact)
    assert "bits per weight" in out and "perplexity" in out and "weights.safetensors" in out
    program = output(capsys, "inspect", artifact, "--program")[0]
    assert program.startswith("program decoder(") and "attention" in program
    summary = json.loads(output(capsys, "inspect", artifact, "--json")[0])
    assert summary["content_id"] and summary["evaluation"] == {"perplexity": 4.0} and "program" not in summary


def test_verify(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "agree" in output(capsys, "verify", artifact)[0]
    result = json.loads(output(capsys, "verify", artifact, "--selftest", "--json")[0])
    assert result["ok"] and result["selftest"]["largest_difference"] < 1e-4


def test_eval(artifact: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text that is long enough for several windows of the tiny model " * 5)
    result = json.loads(output(capsys, "eval", artifact, "--text", str(text), "--json")[0])
    assert result["tokens"] == len(text.read_text()) and result["ppl"] == pytest.approx(
        2.718281828 ** result["nll"]
    )
    assert "ppl" in output(capsys, "eval", artifact, "--text", str(text), "--max-tokens", "100")[0]


def test_eval_of_last_words(artifact: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "words.jsonl"
    path.write_text('{"text": "one two"}\n\n{"text": "three four five"}\n')
    result = json.loads(output(capsys, "eval", artifact, "--last-word", str(path), "--json")[0])
    assert result["passages"] == 2 and result["tokens"] == 1 + 7 + 1 + 15 and result["tok_s"] > 0
    assert "hits 0 of 2" in output(capsys, "eval", artifact, "--last-word", str(path), "--max-len", "30")[0]
    path.write_text('{"text": "one two"}\n{"text": 1}\n')
    assert "words.jsonl line 2" in output(capsys, "eval", artifact, "--last-word", str(path), code=1)[1]


def test_bench(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "bench",
        artifact,
        "--prompt",
        "20",
        "--tokens",
        "4",
        "--context",
        "8",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    result = json.loads(output(capsys, *arguments, "--json")[0])
    for key in ("decode_tok_s", "prefill_tok_s", "read_gb_s", "bandwidth_share", "load_s", "threads"):
        assert result[key] > 0, key
    assert result["threads"] == 1
    assert "GB/s" in output(capsys, *arguments)[0]
    profiled = json.loads(output(capsys, *arguments, "--profile", "--json")[0])["profile"]
    assert {kind["name"] for kind in profiled["decode"]["kinds"]} >= {"attention f32", "linear qkv f32"}
    assert "phases shared by threads" in output(capsys, *arguments, "--profile")[0]


def test_bench_makes_room_for_its_context(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "bench",
        artifact,
        "--prompt",
        "8",
        "--tokens",
        "4",
        "--context",
        "100",
        "--rounds",
        "1",
        "--json",
    ]
    assert json.loads(output(capsys, *arguments)[0])["context"] == 100
    assert "max_len" in output(capsys, "bench", artifact, "--context", "100000", code=1)[1]


ERRORS = [
    (["run", "{a}/nothing", "--prompt", "x"], "missing"),
    (["run", "{a}", "--prompt", "x" * 100], "max_len"),
    (["run", "{a}", "--prompt", "x", "--top-p", "7"], "top_p"),
    (["run", "{a}", "--prompt", "x", "--max-len", "9999"], "max_len"),
    (["run", "{a}", "--prompt", "x", "--threads", "0"], "threads"),
    (["eval", "{a}", "--text", "{a}/nothing"], "cannot be read"),
    (["eval", "{a}", "--text", "{a}"], "cannot be read"),
    (["eval", "{a}", "--text", "{a}/weights.safetensors"], "UTF-8"),
    (["eval", "{a}", "--text", "/dev/null"], "no text"),
    (["bench", "{a}", "--tokens", "0"], "tokens"),
    (["inspect", "/"], "not a gristmill artifact"),
    (["verify", "/dev/null"], "file"),
    (["compile", "{a}/nothing", "-o", "{a}", "--no-gate", "--max-kl", "1"], "gate"),
    (["compile", "{a}/nothing", "-o", "{a}", "--weights", "f32", "--asymmetric"], "integer weights"),
    (["compile", "{a}/nothing", "-o", "{a}", "--max-ppl-increase", "many"], "percentage"),
    (["compile", "{a}/nothing", "-o", "{a}"], "--force"),
    (["compile", "{a}/nothing", "-o", "{a}/weights.safetensors", "--force"], "is a file"),
    (["compile", "{a}/nothing", "-o", "/", "--force"], "cannot be replaced"),
]


@pytest.mark.parametrize("arguments, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_are_one_line(
    artifact: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out, err = output(capsys, *[part.replace("{a}", artifact) for part in arguments], code=1)
    lines = err.splitlines()
    assert out == "" and lines[-1].startswith("error: ") and message in lines[-1], err
    assert "Traceback" not in err and "defect" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "{a}", "--prompt", "x"],
        ["bench", "{a}", "--tokens", "2"],
        ["verify", "{a}", "--selftest"],
        ["eval", "{a}", "--text", __file__],
        ["compile", "{a}/nothing", "-o", "{a}/new"],
        ["tune", "{a}"],
    ],
)
def test_without_a_gpu_its_absence_is_one_line(
    artifact: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    pytest.importorskip("triton", reason="without it the line is another one")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = [part.replace("{a}", artifact) for part in arguments] + ["--device", "cuda"]
    out, err = output(capsys, *words, code=1)
    assert out == "" and err.count("\n") == 1, err
    assert err.startswith("error: device 'cuda': torch finds no CUDA device, expected an NVIDIA GPU"), err


def test_what_is_not_for_a_gpu_is_refused(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = output(capsys, "bench", artifact, "--device", "cuda", "--threads", "2", code=1)[1]
    assert "threads, hugepages and pin are for device 'cpu'" in err
    err = output(capsys, "compile", "m", "-o", "o", "--device", "cuda", "--no-gate", code=1)[1]
    assert "device is for the gate, which is off" in err
    assert "max_rows is 0" in output(capsys, "tune", artifact, "--max-rows", "0", code=1)[1]


def test_a_warning_is_one_line(
    artifact: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: Any, **named: Any) -> None:
        warnings.warn("something is left out", stacklevel=1)
        raise GristmillError("enough")

    monkeypatch.setattr("gristmill.runtime.session.load", load)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        err = output(capsys, "verify", artifact, code=1)[1]
    assert err.splitlines() == ["warning: something is left out", "error: enough"]


def test_wrong_usage_exits_with_2(artifact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such option" in output(capsys, "run", artifact, "--prompts", "x", code=2)[1]
    assert "Usage" in output(capsys, "run", code=2)[1]
    assert "either --text or" in output(capsys, "eval", artifact, code=2)[1]
    assert "are for --text" in output(
        capsys, "eval", artifact, "--last-word", "x", "--window", "9", code=2
    )[1]
    assert "No such command" in output(capsys, "rum", code=2)[1]


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_help_has_an_example_and_explains_every_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = output(capsys, command, "--help")
    assert f"gristmill {command}" in out
    options = [p for p in cli.commands[command].params if isinstance(p, click.Option)]
    assert all(option.help for option in options)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert gristmill.__version__ in output(capsys, "--version")[0]


def test_a_defect_is_one_line_with_a_hint(
    artifact: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gristmill.runtime.session.load", lambda *a, **k: 1 / 0)
    _, err = output(capsys, "run", artifact, "--prompt", "x", code=1)
    assert len(err.splitlines()) == 1 and "ZeroDivisionError" in err and "--traceback" in err
    monkeypatch.setenv("GRISTMILL_TRACEBACK", "1")
    assert "Traceback" in output(capsys, "run", artifact, "--prompt", "x", code=1)[1]


@pytest.mark.parametrize(
    "error, code, message",
    [
        (OSError(28, "No space left on device", "out"), 1, "error: out: No space left on device"),
        (MemoryError(), 1, "error: not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (GristmillError("two\nlines"), 1, "error: two lines"),
    ],
)
def test_other_ends(
    artifact: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Any,
    code: int,
    message: str,
) -> None:
    def fail(*given: dict[str, Any], **options: Any) -> None:
        raise error

    monkeypatch.setattr("gristmill.runtime.session.load", fail)
    assert message in output(capsys, "run", artifact, "--prompt", "x", code=code)[1]


def start(cwd: Path, *arguments: str, **given: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "gristmill", *arguments]
    return subprocess.Popen(command, env=environment, cwd=cwd, stderr=subprocess.PIPE, text=True, **given)


def test_a_reader_that_goes_away(artifact: str, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = start(tmp_path, "inspect", artifact, "--program", stdout=write)
    os.close(write)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 1


def test_control_c(tmp_path: Path, artifact: str) -> None:
    arguments = ("bench", artifact, "--prompt", "8", "--tokens", "4", "--rounds", "100000")
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = start(tmp_path, *arguments, stdout=subprocess.PIPE, preexec_fn=heard)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted")


# ---- compile's options -------------------------------------------------------------------------------


def test_defaults_follow_from_the_weights() -> None:
    plain, exact = CompileOptions.of(), CompileOptions.of(weights="f32")
    assert (plain.embedding_format, plain.head_format, str(plain.cache_format)) == ("int8", "int8", "f16")
    assert (exact.embedding_format, exact.head_format, str(exact.cache_format)) == ("f32", "f32", "f32")
    groups = {f: CompileOptions.of().group(FORMATS[f]) for f in ("int8", "int2", "fp8", "bf16")}
    assert groups == {"int8": 128, "int2": 128, "fp8": 0, "bf16": 0}
    assert CompileOptions.of(group_size="row").group(FORMATS["int4"]) == 0
    assert CompileOptions.of(weights="fp8", group_size=64).group(FORMATS["fp8"]) == 64
    mixed = CompileOptions.of(kv="int8", kv_v="int4", kv_rotate=True)
    assert (mixed.cache_format.k, mixed.cache_format.v) == ("int8", "int4")
    assert str(mixed.cache_format) == "int8/int4 rotated"
    assert [CompileOptions.of(max_ppl_increase=x).max_ppl_increase for x in ("2%", "0.02", 0.02)] == [
        0.02
    ] * 3


@pytest.mark.parametrize(
    "given, message",
    [
        ({"weights": "int5"}, "expected one of"),
        ({"group_size": 48}, "expected one of"),
        ({"group_size": True}, "expected one of"),
        ({"kv": "int3"}, "expected one of"),
        ({"kv_k": "bf16"}, "kv_k is 'bf16', expected one of"),
        ({"kv_rotate": True}, "kv_rotate needs quantized keys, got f16; use kv_k int4"),
        ({"kv": "int4", "kv_k": "f32", "kv_rotate": True}, "kv_rotate needs quantized keys, got f32"),
        ({"kv": "int4", "kv_rotate": "yes"}, "kv_rotate is 'yes', expected True or False"),
        ({"head": "q4"}, "expected one of"),
        ({"weights": "bf16", "group_size": 32}, "needs weights with scales, got weights bf16"),
        ({"weights": "fp8", "asymmetric": True}, "use int8, int4, int3 or int2"),
        ({"max_len": 0}, "max_len"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"gate": "yes"}, "gate"),
        ({"max_kl": float("nan")}, "max_kl"),
        ({"gate": False, "text": "x"}, "gate"),
        ({"max_ppl_increase": "2"}, "percentage"),
        ({"max_ppl_increase": "-1%"}, "percentage"),
        ({"max_ppl_increase": "nan"}, "percentage"),
        ({"weight": "int4"}, "did you mean weights"),
    ],
)
def test_options_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        CompileOptions.of(**given)
