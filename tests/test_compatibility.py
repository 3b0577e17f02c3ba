"""Artifacts of format 1 load for ever and compute what they did when they were written (2026-11-27).

`tests/golden/v1` was written by `python tests/test_compatibility.py`, once, from tiny random models. It is
never written again: where a change makes these tests fail, the change breaks artifacts that people have.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import resign

import gristmill
from gristmill.cli import run_command
from gristmill.runtime.artifact import BLANK_HASH, FORMAT_VERSION, content_id
from gristmill.runtime.cpu._native import isas
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.session import native

GOLDEN = Path(__file__).parent / "golden" / "v1"
# name -> family, what differs from the tests' tiny models, how it was compiled
MADE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "integers": (
        "llama", {"attention_bias": True},
        {"weights": "int4", "group_size": 32, "kv": "int8", "keep": ("int8:*.o_proj", "int3:*.down_proj")},
    ),
    "windows": (
        "gemma2", {},
        {"weights": "int8", "group_size": 32, "kv": "fp8", "keep": ("int2:*.up_proj", "fp8:*.q_proj")},
    ),
    "floats": (
        "gpt2", {"n_embd": 48, "n_head": 3},
        {"weights": "bf16", "kv": "f16", "keep": ("f16:*.c_attn", "f32:*.c_proj")},
    ),
}  # fmt: skip
PROMPT = [5, 250, 17, 3, 99, 42, 42, 7, 201, 8, 64, 300, 11]
TEXT = "Stones remember"
TOKENS = 20
# Floats are summed in one order everywhere; what may differ is the last bit of a libm of another platform.
TOLERANCE = 1e-5


def logits(session: gristmill.Session) -> np.ndarray:
    """Of every row of the prompt, in two chunks, then of one that goes on."""
    found = []
    for first, last in ((0, 8), (8, len(PROMPT))):
        rows = last - first
        found.append(session.forward(PROMPT[first:last], range(first, last), [1] * rows, range(rows)))
    found.append(session.forward([9], [len(PROMPT)], [1], [0]))
    return np.concatenate(found)


def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {key: data[key] for key in data.files}


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("name", MADE)
def test_golden_artifacts_compute_what_they_did(name: str, isa: str) -> None:
    session = gristmill.load(GOLDEN / name)
    session.executor = native().Executor(
        (GOLDEN / name / "program.json").read_bytes(), str(GOLDEN / name / "weights.safetensors"),
        threads=2, max_len=session.max_len, max_slots=session.max_slots, isa=isa,
    )  # fmt: skip
    wanted = expected(name)
    got = logits(session)
    assert got.shape == wanted["logits"].shape
    assert np.abs(got - wanted["logits"]).max() <= TOLERANCE * np.abs(wanted["logits"]).max()


@pytest.mark.parametrize("name", MADE)
def test_golden_artifacts_say_what_they_did(name: str) -> None:
    session, wanted = gristmill.load(GOLDEN / name), expected(name)
    greedy = session.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True)
    assert greedy.token_ids == wanted["greedy"].tolist()
    drawn = session.generate(TEXT, max_new_tokens=TOKENS, ignore_eos=True, temperature=0.8, top_k=20, seed=7)
    assert drawn.token_ids == wanted["drawn"].tolist()
    assert session.tokenizer.encode(TEXT) == wanted["text_ids"].tolist()


@pytest.mark.parametrize("name", MADE)
def test_golden_artifacts_are_whole(name: str) -> None:
    """No file of theirs was touched since, and their own self-test passes."""
    assert run_command(["verify", str(GOLDEN / name), "--selftest"]) == 0


def copied(tmp_path: Path, name: str = "integers") -> Path:
    out = tmp_path / name
    shutil.copytree(GOLDEN / name, out)
    return out


def test_a_newer_format_is_refused_with_the_version_it_needs(tmp_path: Path) -> None:
    artifact = copied(tmp_path)
    resign(artifact, format=FORMAT_VERSION + 1)
    said = f"has format {FORMAT_VERSION + 1}, this gristmill reads up to {FORMAT_VERSION}; install a newer"
    with pytest.raises(GristmillError, match=re.escape(said)):
        gristmill.load(artifact)


def with_program(artifact: Path, program: dict[str, Any]) -> None:
    """Another program, with hashes that fit."""
    import hashlib

    data = json.dumps(program).encode()
    (artifact / "program.json").write_bytes(data)
    manifest = json.loads((artifact / "manifest.json").read_text())
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"]["program.json"] = manifest["files"]["program.json"] | entry
    resign(artifact, files=manifest["files"])
    opened = gristmill.runtime.artifact
    table = opened._file_table(artifact, manifest | {"manifest_sha256": BLANK_HASH})
    resign(artifact, content_id=content_id(table, manifest["quantization"]))


def test_what_a_newer_gristmill_would_write_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = copied(tmp_path)
    program = json.loads((artifact / "program.json").read_text())
    program["instructions"][1]["op"] = "state_space"
    with_program(artifact, program)
    with pytest.raises(GristmillError, match="state_space.*unknown op.*install a newer gristmill"):
        gristmill.load(artifact)
    assert run_command(["run", str(artifact), "--prompt", "x"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_what_this_machine_lacks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = str(GOLDEN / "integers")

    def checked(*options: str) -> tuple[int, dict[str, Any]]:
        code = run_command(["inspect", artifact, "--check-machine", "--json", *options])
        result = json.loads(capsys.readouterr().out)
        return code, {r["what"]: r for r in result["requirements"]} | {"ok": result["ok"]}

    code, found = checked()
    assert code == 0 and found["ok"] and found["format"]["verdict"] == "ok"
    monkeypatch.setattr("gristmill.runtime.machine.available_memory_bytes", lambda: 1 << 20)
    code, found = checked()
    memory = found["memory for caches and values"]
    assert code == 1 and not found["ok"] and memory["verdict"] == "missing" and memory["found"] == "1 MiB"
    assert "max_slots 2" in memory["remedy"]
    assert run_command(["inspect", artifact, "--check-machine"]) == 1
    assert "load with less than max_len 128 or max_slots 2" in capsys.readouterr().out
    assert run_command(["inspect", artifact, "--check-machine", "--device", "tpu"]) == 1
    assert capsys.readouterr().err == (
        "error: device is 'tpu', expected cpu or cuda: others run exported folders\n"
    )


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run_command(["inspect", str(GOLDEN / "floats"), "--check-machine", "--device", "cuda"]) == 1
    out = capsys.readouterr().out
    assert "missing" in out and "device 'cuda'" in out


def write() -> None:
    """Once."""
    import tempfile

    from families import save_tiny

    if GOLDEN.exists():
        raise SystemExit(f"{GOLDEN} exists: it is never written again")
    for name, (family, changes, options) in MADE.items():
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / name
            save_tiny(model, family, **changes)
            gristmill.compile(model, GOLDEN / name, gate=False, max_slots=2, max_len=128, **options)
        session = gristmill.load(GOLDEN / name)
        ids = session.tokenizer.encode(TEXT)
        draw = {"temperature": 0.8, "top_k": 20, "seed": 7}
        np.savez_compressed(
            GOLDEN / f"{name}.npz", logits=logits(session), text_ids=ids,
            greedy=session.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True).token_ids,
            drawn=session.generate(TEXT, max_new_tokens=TOKENS, ignore_eos=True, **draw).token_ids,
        )  # fmt: skip


if __name__ == "__main__":
    write()
