"""Adapters merged at compile time: the logits of the merged model, and every adapter that is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import PREFIX, logits_of, merged, random_pairs, save_adapter
from families import save_tiny
from foreign import Kind, gptq_config, gptq_tensors, save_quantized
from models import traced_of

import gristmill
from gristmill.compiler import lora
from gristmill.runtime.errors import GristmillError

IDS = [0, 17, 42, 5, 99, 256, 3, 3, 71]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def compiled(model: Path, out: Path, *adapters: Path, **options: Any) -> np.ndarray:
    """Logits of the artifact."""
    gristmill.compile(model, out, gate=False, lora=adapters, **({"weights": "f32"} | options))
    session = gristmill.load(out, threads=1)
    return session.forward(IDS, range(len(IDS)), [0] * len(IDS))


def assert_same(got: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    difference = np.abs(got - expected).max() / np.abs(expected).max()
    assert difference < tolerance, difference


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", (*ATTENTION, *MLP, "lm_head", "embed_tokens")),
        ("phi3", ("qkv_proj", "gate_up_proj", "o_proj", "down_proj")),
        ("gpt2", ("c_attn", "c_proj", "c_fc")),
        ("gpt_neox", ("query_key_value", "dense", "dense_h_to_4h")),
    ],
)
def test_merged_is_the_merged_model(tmp_path: Path, family: str, kinds: tuple[str, ...]) -> None:
    model = save_tiny(tmp_path / "model", family)
    tensors = random_pairs(model, kinds)
    assert any(f".{kind}." in name for kind in kinds for name in tensors)
    adapter = save_adapter(tmp_path / "adapter", tensors)
    got = compiled(tmp_path / "model", tmp_path / "out", adapter)
    plain = logits_of(model, IDS)
    expected = logits_of(merged(model, tensors), IDS)
    assert_same(got, expected)
    assert np.abs(plain - expected).max() > 0.1 * np.abs(plain).max()  # the adapter matters


def test_two_adapters_add_up_and_are_recorded(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    one, other = random_pairs(model, ("q_proj", "v_proj"), seed=1), random_pairs(model, ("v_proj",), 2, 2)
    first = save_adapter(tmp_path / "first", one)
    second = save_adapter(tmp_path / "second", other, r=2, lora_alpha=2)
    got = compiled(tmp_path / "model", tmp_path / "out", first, second)
    assert_same(got, logits_of(merged(merged(model, one), other, 1.0), IDS))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [a["name"] for a in manifest["adapters"]] == ["first", "second"]
    assert manifest["adapters"][0]["base_model"] == "made/by-hand" and manifest["adapters"][0]["modules"] == 4
    file, sources = "adapter_model.safetensors", manifest["source"]["sha256"]
    assert manifest["adapters"][1]["sha256"][file] == sources[f"lora.1/{file}"] != sources[f"lora.0/{file}"]
    alone = save_tiny(tmp_path / "again", "llama")
    assert_same(
        compiled(tmp_path / "again", tmp_path / "other", second), logits_of(merged(alone, other, 1.0), IDS)
    )


def test_patterns_rslora_and_16_bit_adapters(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    tensors = random_pairs(model, ("q_proj",)) | random_pairs(model, ("up_proj",), 2, 3)
    kinds = {"q_proj": torch.bfloat16, "up_proj": torch.float16}
    tensors = {name: t.to(kinds[name.split(".")[-3]]) for name, t in tensors.items()}
    adapter = save_adapter(
        tmp_path / "adapter", tensors, use_rslora=True, rank_pattern={"mlp.up_proj": 2},
        alpha_pattern={r"layers\.1\..*up_proj": 5, "up_proj": 7},
    )  # fmt: skip
    exact = {name: t.float() for name, t in tensors.items()}
    layers = {"0": 7, "1": 5}
    for layer, alpha in layers.items():
        pick = {n: t for n, t in exact.items() if f"layers.{layer}." in n and "up_proj" in n}
        merged(model, pick, alpha / 2**0.5)
    merged(model, {n: t for n, t in exact.items() if "q_proj" in n}, 12 / 4**0.5)
    assert_same(compiled(tmp_path / "model", tmp_path / "out", adapter), logits_of(model, IDS))


def test_dora(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    tensors = random_pairs(model, ("q_proj", "down_proj"))
    modules, m = dict(model.named_modules()), {}
    for key in [key for key in tensors if "lora_A" in key]:
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        m[name] = torch.linspace(0.5, 2, modules[name].weight.shape[0])
    magnitudes = {f"{PREFIX}{name}.lora_magnitude_vector": vector for name, vector in m.items()}
    adapter = save_adapter(tmp_path / "adapter", tensors | magnitudes, use_dora=True)
    merged(model, tensors)
    for name, vector in m.items():
        w = modules[name].weight.data
        modules[name].weight.data = vector[:, None] * w / w.norm(dim=1, keepdim=True)
    assert_same(compiled(tmp_path / "model", tmp_path / "out", adapter), logits_of(model, IDS))


def test_whole_parameters_and_biases(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama", attention_bias=True)
    tensors = random_pairs(model, ("q_proj",))
    generator = torch.Generator().manual_seed(5)
    head = 0.1 * torch.randn(model.lm_head.weight.shape, generator=generator)
    bias = torch.randn(96, generator=generator)
    added = torch.randn(96, generator=generator)
    whole = {
        f"{PREFIX}lm_head.weight": head,
        f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias": bias,
        f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.bias": added,
    }
    adapter = save_adapter(tmp_path / "a", tensors | whole, modules_to_save=["lm_head"], bias="lora_only")
    merged(model, tensors)
    model.lm_head.weight.data = head
    model.model.layers[0].self_attn.q_proj.bias.data = bias
    model.model.layers[1].self_attn.q_proj.bias.data += 3.0 * added
    assert_same(compiled(tmp_path / "model", tmp_path / "out", adapter), logits_of(model, IDS))


def test_integers_are_those_of_the_merged_model(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    tensors = random_pairs(model, ATTENTION, size=0.25)
    tensors = {name: (t * 16).round() / 16 for name, t in tensors.items()}  # sums without rounding
    adapter = save_adapter(tmp_path / "adapter", tensors)
    got = compiled(tmp_path / "model", tmp_path / "out", adapter, weights="int4", group_size=32)
    merged(model, tensors).save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "tokenizer.json").write_bytes((tmp_path / "model" / "tokenizer.json").read_bytes())
    expected = compiled(tmp_path / "merged", tmp_path / "expected", weights="int4", group_size=32)
    assert np.array_equal(got, expected)


def test_as_peft_merges(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed")
    model = save_tiny(tmp_path / "model", "llama")
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "down_proj", "embed_tokens"], use_dora=False,
        rank_pattern={"down_proj": 2}, use_rslora=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path / "adapter")
    got = compiled(tmp_path / "model", tmp_path / "out", tmp_path / "adapter")
    assert_same(got, logits_of(wrapped.merge_and_unload(), IDS))


Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
FIRST = f"{PREFIX}model.layers.0.self_attn.q_proj"


def with_shape(key: str, *shape: int) -> Edit:
    return lambda tensors: tensors | {key: torch.ones(shape)}


def without(key: str) -> Edit:
    return lambda tensors: {name: t for name, t in tensors.items() if name != key}


@pytest.mark.parametrize(
    ("edit", "config", "says"),
    [
        (with_shape(f"{FIRST}.lora_A.weight", 4, 64), {}, r"shape \[4, 64\], expected \[4, 96\].*base model"),
        (with_shape(f"{FIRST}.lora_B.weight", 80, 4), {}, r"shape \[80, 4\], expected \[96, 4\]"),
        (with_shape(f"{FIRST}.lora_B.weight", 96, 4, 1), {}, "expected a matrix"),
        (with_shape(f"{PREFIX}model.layers.0.wq.lora_A.weight", 4, 96), {}, "has no lora_B"),
        (with_shape(f"{PREFIX}model.layers.9.self_attn.q_proj.weight", 4, 96), {}, "has no model.layers.9"),
        (with_shape(f"{FIRST}.lora_C.weight", 4, 96), {}, "lora_C.weight is not supported"),
        (with_shape(f"{PREFIX}lm_head.weight", 9, 96), {}, r"shape \[9, 96\], expected \[320, 96\]"),
        (without(f"{FIRST}.lora_A.weight"), {}, "has no lora_A"),
        (lambda tensors: {}, {}, "holds no tensor"),
        (None, {"r": 8}, "has ranks 4 .* says 8"),
        (None, {"r": 0}, "r is 0"),
        (None, {"lora_alpha": "x"}, "lora_alpha is 'x'"),
        (None, {"rank_pattern": {"(": 4}}, "rank_pattern has"),
        (None, {"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        (None, {"use_dora": True}, "no lora_magnitude_vector"),
        (None, {"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        (None, {"layer_replication": [[0, 2]]}, "layer_replication"),
        (None, {"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        (lambda tensors: {k: t * float("nan") for k, t in tensors.items()}, {}, "not finite"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, llama: Llama, edit: Edit | None, config: dict[str, Any], says: str) -> None:
    tensors = random_pairs(llama.model, ("q_proj",))
    adapter = save_adapter(tmp_path / "adapter", edit(tensors) if edit else tensors, **config)
    traced = traced_of(llama.model, llama.model.config)
    with pytest.raises(GristmillError, match=says):
        lora.merge(traced, lora.read_adapters([str(adapter)]))
        for lazy in traced.weights.values():
            lazy.load()


@dataclass
class Llama:
    """A random model and its folder."""

    folder: Path
    model: Any


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = tmp_path_factory.mktemp("llama")
    return Llama(folder, save_tiny(folder, "llama"))


def test_refused_files(tmp_path: Path, llama: Llama) -> None:
    adapter = save_adapter(tmp_path / "adapter", random_pairs(llama.model, ("q_proj",)))

    def refused(says: str, *paths: Path) -> None:
        with pytest.raises(GristmillError, match=says):
            compiled(llama.folder, tmp_path / "out", *paths)
        assert not (tmp_path / "out").exists()

    refused("is missing", tmp_path / "none")
    refused("given twice", adapter, tmp_path / "adapter" / ".." / "adapter")
    weights = adapter / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:100])
    refused("truncated", adapter)
    weights.write_bytes(data[:-4])
    refused("does not fit the file", adapter)
    weights.rename(adapter / "adapter_model.bin")
    refused("save it again as safetensors", adapter)
    (adapter / "adapter_config.json").write_text("[")
    refused("not valid JSON", adapter)
    (adapter / "adapter_config.json").unlink()
    refused("no adapter_config.json", adapter)


def test_a_tied_weight_and_two_whole_parameters_are_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    for kind in ("embed_tokens", "lm_head"):
        adapter = save_adapter(tmp_path / kind, random_pairs(model, (kind,)))
        with pytest.raises(GristmillError, match=r"tied embedding and head|has no lm_head"):
            compiled(tmp_path / "model", tmp_path / "out", adapter)
    norm = {f"{PREFIX}model.norm.weight": torch.ones(96)}
    one, other = (save_adapter(tmp_path / name, norm) for name in ("one", "other"))
    with pytest.raises(GristmillError, match="is changed by .*one too"):
        compiled(tmp_path / "model", tmp_path / "out", one, other)
    expected = copy.deepcopy(model)
    expected.model.norm.weight.data = torch.ones(96)
    assert_same(compiled(tmp_path / "model", tmp_path / "out", one), logits_of(expected, IDS))


def test_a_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="lora is for Hugging Face directories"):
        gristmill.compile(
            torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8)), tmp_path / "out",
            lora=tmp_path, gate=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kinds", "layout"),
    [
        ("llama", ("q_proj", "down_proj"), Kind(8, 64, order=True)),
        ("llama", ("q_proj", "down_proj"), Kind(4, 32, symmetric=False)),
        ("gpt2", ("c_attn", "c_fc"), Kind(8, 32)),
    ],
)
def test_a_quantized_checkpoint(tmp_path: Path, family: str, kinds: tuple[str, ...], layout: Kind) -> None:
    """What is merged is rounded anew in the checkpoint's own scheme, the rest kept; at run time all is."""
    from transformers import AutoModelForCausalLM

    layers = save_quantized(
        tmp_path / "m", layout, gptq_config(layout), lambda _, layer: gptq_tensors(layer), family
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m-float", dtype=torch.float32).eval()
    tensors = random_pairs(model, kinds)
    adapter = save_adapter(tmp_path / "adapter", tensors)
    expected = logits_of(merged(model, tensors), IDS)
    exact = {"weights": None, "embedding": "f32", "head": "f32", "kv": "f32"}
    got = compiled(tmp_path / "m", tmp_path / "out", adapter, **exact, activations="f32")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    changed = [name for name in layers if name.rpartition(".")[2] in kinds]
    assert len(changed) == 4
    kept = manifest["quantization"]["checkpoint"]["kept"]
    assert sorted(kept) == sorted(set(layers) - set(changed))
    schemes = manifest["quantization"]["schemes"]
    assert {schemes[name] for name in changed} == {schemes[name] for name in kept}
    assert_same(got, expected, 0.03 if layout.bits == 8 else 0.5)
    assert_same(compiled(tmp_path / "m", tmp_path / "floats", adapter), expected)
    gristmill.compile(tmp_path / "m", tmp_path / "base", gate=False, activations="f32", **exact)
    session = gristmill.load(tmp_path / "base", threads=1, adapters={"a": adapter})
    session.reset(0, "a")
    assert_same(session.forward(IDS, range(len(IDS)), [0] * len(IDS)), expected)
