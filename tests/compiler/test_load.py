"""load and checkpoint: every unusable directory ends with one line that says what is wrong with it."""

import json
import os
import pickle
import struct

import pytest
import torch
from models import config_of, random_model
from safetensors.torch import save_file

from gristmill.compiler.checkpoint import Checkpoint
from gristmill.compiler.load import load_source
from gristmill.runtime.errors import GristmillError


@pytest.fixture(scope="module")
def model():
    return random_model(config_of("llama", num_hidden_layers=1))


@pytest.fixture
def directory(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def refuses(directory, pattern):
    with pytest.raises(GristmillError, match=pattern) as caught:
        load_source(str(directory))
    assert "\n" not in str(caught.value)


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_good_directory_loads(directory, model):
    source = load_source(str(directory))
    assert source.config.model_type == "llama"
    assert source.name == directory.name
    weight = model.state_dict()["model.norm.weight"]
    assert torch.equal(source.checkpoint.read("model.norm.weight"), weight)


def test_missing_config(directory):
    (directory / "config.json").unlink()
    refuses(directory, "no config.json; expected a Hugging Face model directory")


@pytest.mark.parametrize("text", ["{", "\x00", "[" * 100_000, '{"model_type": '])
def test_config_that_is_not_json(directory, text):
    (directory / "config.json").write_text(text)
    refuses(directory, "not valid JSON")


@pytest.mark.parametrize("text", ["[]", "{}", '{"model_type": 3}', "null"])
def test_config_without_model_type(directory, text):
    (directory / "config.json").write_text(text)
    refuses(directory, "no model_type")


@pytest.mark.parametrize("changes, pattern", [
    ({"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "brings its own code"),
    ({"quantization_config": {"quant_method": "hqq"}}, r"not supported \(hqq\)"),
    ({"quantization_config": {"quant_method": "gptq"}}, "bits None"),
    ({"quantization_config": "fp8"}, "is str, expected an object"),
    ({"model_type": "perceptron"}, "model_type 'perceptron' is not a decoder"),
    ({"hidden_size": "wide"}, "transformers refuses it"),
], ids=str)  # fmt: skip
def test_configs_that_are_refused(directory, changes, pattern):
    change_config(directory, **changes)
    refuses(directory, pattern)


def test_no_weights(directory):
    (directory / "model.safetensors").unlink()
    refuses(directory, "no weights found; expected model.safetensors")


def damage(directory, change):
    path = directory / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("change, pattern", [
    (lambda data: data[:4], "truncated or not a safetensors file"),
    (lambda data: data[:200], "truncated or not a safetensors file"),
    (lambda data: data[:-64], "does not fit the file; truncated"),
    (lambda data: b"\xff" * 8 + data[8:], "truncated or not a safetensors file"),
    (lambda data: data[:8] + b"x" + data[9:], "damaged safetensors header"),
    (lambda data: struct.pack("<Q", 90_000) + b"[" * 90_000, "damaged safetensors header"),
    (lambda data: data.replace(b'"F32"', b'"F33"', 1), "dtype F33 is not supported"),
    (lambda data: data.replace(b'"shape":[48', b'"shape":[47', 1), "does not fit the file"),
], ids=range(8))  # fmt: skip
def test_damaged_safetensors(directory, change, pattern):
    damage(directory, change)
    refuses(directory, pattern)


@pytest.fixture
def sharded(model, directory):
    """The same weights in three shards."""
    (directory / "model.safetensors").unlink()
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    table: dict[str, str] = {}
    for n in range(3):
        part = dict(list(tensors.items())[n::3])
        save_file(part, directory / f"part-{n}.safetensors")
        table |= dict.fromkeys(part, f"part-{n}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return directory


def test_shards_read_like_one_file(sharded, model):
    checkpoint = Checkpoint(sharded)
    stored = model.state_dict()
    assert set(checkpoint) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    assert checkpoint.same("model.norm.weight", "model.norm.weight")
    assert not checkpoint.same("model.norm.weight", "model.layers.0.input_layernorm.weight")
    assert set(checkpoint.hashes()) == {f"part-{n}.safetensors" for n in range(3)}


def test_missing_shard(sharded):
    (sharded / "part-1.safetensors").unlink()
    refuses(sharded, "shard part-1.safetensors is missing")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_shards_that_leave_the_directory(sharded, shard):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refuses(sharded, "leaves the directory")


@pytest.mark.parametrize("text, pattern", [
    ("{}", "not a shard index"), ("[", "not a shard index"),
    ('{"weight_map": {"a": 1}}', "must map tensor names"),
])  # fmt: skip
def test_an_index_that_is_none(sharded, text, pattern):
    (sharded / "model.safetensors.index.json").write_text(text)
    refuses(sharded, pattern)


def test_a_single_file_wins_over_an_index(sharded, model):
    model.save_pretrained(sharded)
    assert [f.name for f in Checkpoint(sharded).files] == ["model.safetensors"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_a_pickle_of_tensors_is_read(directory, model, zipped):
    (directory / "model.safetensors").unlink()
    path = directory / "pytorch_model.bin"
    halves = {k: v.half() for k, v in model.state_dict().items()}
    torch.save(halves, path, _use_new_zipfile_serialization=zipped)
    checkpoint = load_source(str(directory)).checkpoint
    assert checkpoint.dtype("model.norm.weight") == torch.float16
    assert checkpoint.read("model.norm.weight").dtype == torch.float32
    assert checkpoint.shape("model.norm.weight") == (48,)


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_with_code_is_refused_and_not_run(directory):
    (directory / "model.safetensors").unlink()
    target = directory / "ran"
    torch.save({"model.norm.weight": Evil(target)}, directory / "pytorch_model.bin")
    refuses(directory, "refused, torch's weights_only loader does not accept it")
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(target)))
    refuses(directory, "refused, torch's weights_only loader does not accept it")
    assert not target.exists()


def test_a_pickle_of_something_else_is_refused(directory):
    (directory / "model.safetensors").unlink()
    torch.save([torch.ones(2)], directory / "pytorch_model.bin")
    refuses(directory, "expected a state dict, got list")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_dtypes_are_widened_to_float32(tmp_path, dtype):
    tensor = torch.arange(-5, 6).to(dtype)
    save_file({"w": tensor, "empty": torch.empty(0, 3, dtype=dtype)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    wanted = tensor.float() if dtype.is_floating_point else tensor
    assert torch.equal(checkpoint.read("w"), wanted)
    assert checkpoint.read("empty").shape == (0, 3)


@pytest.mark.parametrize("name, pattern", [
    ("no/such/model", "no such directory; expected"), ("nonsense", "no such directory; expected"),
    ("owner/model", "no such directory, and the hub download failed"),
])  # fmt: skip
def test_names_without_a_directory(name, pattern, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    refuses(name, pattern)


def test_a_file_is_no_model(directory):
    refuses(directory / "config.json", "is a file; expected")
