"""An artifact with another cache is what a compile with that cache gives."""

from __future__ import annotations

import hashlib
from pathlib import Path

import models
import pytest
from tiny import byte_tokenizer

import gristmill
from gristmill.compiler.change_cache import change_cache
from gristmill.compiler.options import CompileOptions
from gristmill.runtime.errors import GristmillError

GIVEN = {
    "weights": "int4",
    "group_size": 32,
    "method": "gptq",
    "samples": 4,
    "sample_length": 16,
    "gate_tokens": 64,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), seed=0)


def saved(path: Path, seed: int) -> Path:
    config = models.config_of("llama", vocab_size=300, bos_token_id=0)
    net = models.random_model(config)
    net.model.norm.weight.data += seed
    net.save_pretrained(path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def hashes(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def test_it_is_what_a_compile_gives(model: Path, tmp_path: Path, text: Path) -> None:
    given = {**GIVEN, "calibration": str(text), "text": str(text)}
    gristmill.compile(model, tmp_path / "f16", **given)
    gristmill.compile(model, tmp_path / "both", kv_k="int8", kv_v="int4", **given)
    stages = []
    options = CompileOptions.of(kv_k="int8", kv_v="int4", **given)
    made = change_cache(
        str(model),
        tmp_path / "f16",
        tmp_path / "changed",
        options,
        lambda stage, fraction: stages.append(stage),
    )
    assert made == tmp_path / "changed" and "gate" in stages and "quantize" not in stages
    expected, found = hashes(tmp_path / "both"), hashes(made)
    assert expected.keys() == found.keys()
    differ = {name for name in expected if expected[name] != found[name]}
    assert differ <= {"manifest.json"}, "seconds of the calibration stand there"
    ids = [
        gristmill.runtime.artifact.open_artifact(tmp_path / name).content_id for name in ("both", "changed")
    ]
    assert ids[0] == ids[1]


def test_the_model_must_be_the_same(model: Path, tmp_path: Path) -> None:
    gristmill.compile(model, tmp_path / "a", weights="int8", gate=False)
    other = saved(tmp_path / "other", seed=1)
    options = CompileOptions.of(weights="int8", kv="int8", gate=False)
    with pytest.raises(GristmillError, match="was compiled from another model"):
        change_cache(str(other), tmp_path / "a", tmp_path / "b", options)
    assert not (tmp_path / "b").exists()
    weights = tmp_path / "a" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(GristmillError, match="does not agree with its hash"):
        change_cache(str(model), tmp_path / "a", tmp_path / "b", options)
    assert not (tmp_path / "b").exists()
