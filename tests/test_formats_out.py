"""Artifacts go out to other formats and come back: the same integers, scales and logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import save_tiny
from foreign import LLAMA, Kind, gptq_config, gptq_tensors, save_quantized
from safetensors.numpy import load_file
from test_formats_in import EXACT, artifact_logits, prompt, segments

import gristmill
from gristmill.cli import run_command
from gristmill.runtime.errors import GristmillError

INT4: dict[str, Any] = {"group_size": 32, "max_slots": 2, "max_tokens": 32, "gate": False}
ASYMMETRIC: dict[str, Any] = INT4 | {"asymmetric": True}


def made(folder: Path, family: str = "llama", options: dict[str, Any] = ASYMMETRIC, **changes: Any) -> Path:
    """An artifact of a small random model."""
    save_tiny(folder / "m", family, **changes)
    gristmill.compile(folder / "m", folder / "a", **options)
    return folder / "a"


def round_trip(artifact: Path, to: str, options: dict[str, Any], **export: Any) -> Path:
    """Export, compile what came out, and hold the two artifacts against each other, bit by bit."""
    out, again = artifact.parent / "out", artifact.parent / "again"
    gristmill.export_checkpoint(artifact, out, to, **export)
    ends = {
        k: v
        for k, v in options.items()
        if k in ("embedding", "head", "kv", "max_slots", "max_tokens", "gate")
    }
    result = gristmill.compile(out, again, **ends)
    assert "kept as they are" in result.summary["checkpoint"]
    before, after = (load_file(path / "weights.safetensors") for path in (artifact, again))
    assert segments(again) == segments(artifact)
    for name, tensor in before.items():
        if not name.startswith("__"):
            np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    assert np.array_equal(artifact_logits(again, prompt()), artifact_logits(artifact, prompt()))
    return out


@pytest.mark.parametrize(
    "to, export",
    [
        ("gptq", {}),
        ("gptq", {"checkpoint_format": "gptq_v2"}),
        ("awq", {}),
        ("compressed-tensors", {}),
    ],
    ids=["gptq", "gptq_v2", "awq", "compressed-tensors"],
)
def test_asymmetric_int4(to: str, export: dict[str, Any], tmp_path: Path) -> None:
    out = round_trip(made(tmp_path, **LLAMA), to, ASYMMETRIC, **export)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == to
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "m" / "tokenizer.json").read_bytes()
    assert not [p for p in tmp_path.iterdir() if ".tmp-" in p.name]


@pytest.mark.parametrize(
    "to, options",
    [
        ("gptq", INT4),
        ("awq", INT4),
        ("compressed-tensors", INT4 | {"weights": "int8", "asymmetric": True}),
        ("gptq", INT4 | {"weights": "int8", "group_size": "row"}),
    ],
    ids=["gptq-int4", "awq-int4", "compressed-int8", "gptq-int8-row"],
)
def test_symmetric_and_int8(to: str, options: dict[str, Any], tmp_path: Path) -> None:
    artifact = made(tmp_path, options=options, **LLAMA)
    if "weights" not in options:  # a negative scale is what this is about
        assert any(
            (t < 0).any() for n, t in load_file(artifact / "weights.safetensors").items() if "scale" in n
        )
    round_trip(artifact, to, options)


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors"])
def test_column_orders(to: str, tmp_path: Path) -> None:
    kind = Kind(4, 32, False, True)
    save_quantized(tmp_path / "m", kind, gptq_config(kind), lambda name, layer: gptq_tensors(layer))
    gristmill.compile(tmp_path / "m", tmp_path / "a", **EXACT)
    out = round_trip(tmp_path / "a", to, EXACT)
    if to == "gptq":  # the very bytes that came in
        before, after = (load_file(p / "model.safetensors") for p in (tmp_path / "m", out))
        assert set(before) == set(after)
        for name, tensor in before.items():
            np.testing.assert_array_equal(after[name], tensor.astype(after[name].dtype), err_msg=name)


def test_rows_and_biases_are_put_back(tmp_path: Path) -> None:
    """GPT-NeoX keeps q, k and v of a head together; the artifact does not."""
    changes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 224,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    artifact = made(tmp_path, "gpt_neox", **changes)
    assert any(name.endswith(".rows") for name in load_file(artifact / "weights.safetensors"))
    out = round_trip(artifact, "gptq", ASYMMETRIC)
    source, written = (load_file(p / "model.safetensors") for p in (tmp_path / "m", out))
    biases = [name for name in source if name.endswith("query_key_value.bias")]
    assert biases
    for name in biases:
        np.testing.assert_array_equal(written[name], source[name])


def test_merged_biases_come_apart(tmp_path: Path) -> None:
    artifact = made(tmp_path, "llama", **LLAMA, attention_bias=True)
    out = round_trip(artifact, "awq", ASYMMETRIC)
    source, written = (load_file(p / "model.safetensors") for p in (tmp_path / "m", out))
    for name in (n for n in source if n.endswith("_proj.bias")):
        np.testing.assert_array_equal(written[name], source[name], err_msg=name)


@pytest.mark.parametrize(
    "to, options, message",
    [
        ("awq", INT4 | {"group_size": "row"}, "one scale per row"),
        ("awq", INT4 | {"weights": "int8"}, "format int8; expected 4 bits"),
        ("awq", INT4 | {"group_size": 64}, "groups of 64; expected groups that divide it"),
        ("compressed-tensors", INT4 | {"group_size": 64}, "224 columns, which groups of 64 do not divide"),
        ("gptq", INT4 | {"weights": "f16", "group_size": None}, "has no integer linears"),
        ("exl2", INT4, "'exl2' is not supported; expected gptq, awq"),
    ],
)
def test_what_a_format_cannot_express(to: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    artifact = made(tmp_path, options=options, **LLAMA)
    with pytest.raises(GristmillError, match=message) as caught:
        gristmill.export_checkpoint(artifact, tmp_path / "out", to)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "m"]


def test_folded_weights_are_refused(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 224,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    artifact = made(tmp_path, "gemma2", **changes)
    with pytest.raises(GristmillError, match="was computed from several tensors"):
        gristmill.export_checkpoint(artifact, tmp_path / "out", "gptq")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, out = made(tmp_path, **LLAMA), tmp_path / "out"
    command = ["export", str(artifact), "--to", "gptq", "-o", str(out)]
    assert run_command([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(out)
    assert run_command(command) == 1
    assert "exists; use --force" in capsys.readouterr().err
    assert run_command([*command, "--force"]) == 0
    (out / "notes.txt").write_text("mine")
    assert run_command([*command, "--force"]) == 1
    assert "is not an export" in capsys.readouterr().err
