"""Checkpoints of other quantizers come in without being rounded again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, save_tiny
from foreign import (
    LLAMA,
    WIDE,
    Kind,
    Layer,
    Pack,
    awq_config,
    awq_tensors,
    compressed_config,
    compressed_tensors,
    gptq_config,
    gptq_tensors,
    packed,
    save_quantized,
    write_model,
)
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

import gristmill
from gristmill.compiler.load import load_source
from gristmill.compiler.quantized import QuantizedCheckpoint
from gristmill.quant import pack as packing
from gristmill.quant.formats import gptq
from gristmill.quant.formats.words import pack_words, unpack_words
from gristmill.quant.scheme import Scheme
from gristmill.quant.tensor import dequantize_tensor
from gristmill.runtime.artifact import open_artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program, Segment

EXACT = {"embedding": "f32", "head": "f32", "kv": "f32", "max_slots": 2, "max_tokens": 32, "gate": False}
FLOAT_TOLERANCE = 2e-5  # of the largest logit: f32 sums in another order, two layers
INTEGER_TOLERANCE = 0.1  # activations rounded to int8 beside weights that are pure noise; a wrong order: 1

CASES: dict[str, tuple[Kind, dict[str, Any], Pack]] = {}


def case(name: str, kind: Kind, settings: dict[str, Any], pack: Any) -> None:
    CASES[name] = (kind, settings, lambda layer_name, layer: pack(layer))


for bits in (2, 3, 4, 8):
    for symmetric in (True, False):
        kind = Kind(bits, 32, symmetric)
        text = f"{bits}bit-{'sym' if symmetric else 'asym'}"
        case(f"gptq-{text}", kind, gptq_config(kind), gptq_tensors)
        v2 = gptq_config(kind, checkpoint_format="gptq_v2")
        case(f"gptq_v2-{text}", kind, v2, partial(gptq_tensors, v1=False))
        if bits in (4, 8):
            compressed = partial(compressed_tensors, symmetric=symmetric)
            case(f"compressed-{text}", kind, compressed_config(kind), compressed)
for kind in (Kind(4, 32, False, True), Kind(8, 64, True, True)):
    case(f"gptq-order-{kind.bits}bit", kind, gptq_config(kind), gptq_tensors)
    compressed = partial(compressed_tensors, symmetric=kind.symmetric)
    case(f"compressed-order-{kind.bits}bit", kind, compressed_config(kind), compressed)
for kind in (Kind(4, 0), Kind(4, 0, False), Kind(4, 128), Kind(4, 96, False)):
    case(f"gptq-group{kind.group}-{kind.symmetric}", kind, gptq_config(kind), gptq_tensors)
case(
    "compressed-channel",
    Kind(4, 0),
    compressed_config(Kind(4, 0)),
    partial(compressed_tensors, symmetric=True),
)
for kind in (Kind(4, 32, False), Kind(4, 0, False), Kind(4, 32)):
    case(f"awq-group{kind.group}-{kind.symmetric}", kind, awq_config(kind), awq_tensors)


def segments(path: Path) -> dict[str, Segment]:
    program = Program.from_json(open_artifact(path).json("program.json"))
    return {segment.name: segment for parts in program.weights.values() for segment in parts}


def reference_logits(directory: Path, ids: list[int]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def artifact_logits(path: Path, ids: list[int]) -> np.ndarray:
    session = gristmill.load(path, threads=2)
    count = np.arange(len(ids), dtype=np.int32)
    return np.asarray(session.executor.forward(np.array(ids, np.int32), count, np.zeros_like(count), count))


def prompt(count: int = 24) -> list[int]:
    return np.random.default_rng(5).integers(2, VOCABULARY, count).tolist()


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", CASES)
def test_values_and_integers_are_the_checkpoints(name: str, tmp_path: Path) -> None:
    kind, settings, pack = CASES[name]
    layers = save_quantized(tmp_path / "m", kind, settings, pack)
    checkpoint = load_source(str(tmp_path / "m")).checkpoint
    assert isinstance(checkpoint, QuantizedCheckpoint)
    for layer_name, layer in layers.items():
        np.testing.assert_array_equal(checkpoint.read(f"{layer_name}.weight").numpy(), layer.values())
        found = checkpoint.quantized(f"{layer_name}.weight")
        assert found is not None
        tensors = {t.name: t.array for t in found.stored(layer_name).tensors}
        assert_stored(tensors, Segment(**found.stored(layer_name).segment()), layer, kind)


def assert_stored(tensors: dict[str, Any], segment: Segment, layer: Layer, kind: Kind) -> None:
    """The stored integers, scales and zeros are the layer's, columns sorted by group."""
    suffixes = [s for s in ("weight", "scale", "zero") if f"{segment.name}.{s}" in tensors]
    scheme = Scheme(segment.format, segment.group, segment.symmetric)
    quantized = packing.unpack({s: tensors[f"{segment.name}.{s}"] for s in suffixes}, scheme, segment.k)
    low = 128 if segment.format == "int8" else 0
    order = np.argsort(layer.g_idx, kind="stable")
    np.testing.assert_array_equal(quantized.q.astype(int) + low, layer.q[:, order])
    assert segment.symmetric == bool((layer.zero == 1 << (kind.bits - 1)).all())
    width = segment.group or segment.k
    groups = layer.g_idx[order][::width]
    np.testing.assert_array_equal(quantized.scale, layer.scale[:, groups])
    if quantized.zero is not None:
        np.testing.assert_array_equal(quantized.zero.astype(int) + low, layer.zero[:, groups])


@pytest.mark.parametrize(
    "name",
    [
        "gptq-2bit-asym",
        "gptq-3bit-sym",
        "gptq-4bit-asym",
        "gptq-order-4bit",
        "compressed-order-8bit",
        "awq-group32-False",
    ],
)
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_logits_are_those_of_the_dequantized_model(name: str, wide: bool, tmp_path: Path) -> None:
    kind, settings, pack = CASES[name]
    layers = save_quantized(tmp_path / "m", kind, settings, pack, **(WIDE if wide else {}))
    result = gristmill.compile(tmp_path / "m", tmp_path / "a", **EXACT)
    assert result.summary["checkpoint"].endswith("14 of 14 quantized matrices kept as they are")
    found, tensors = segments(tmp_path / "a"), load_file(tmp_path / "a" / "weights.safetensors")
    for layer_name, layer in layers.items():
        assert_stored(tensors, found[layer_name], layer, kind)
    wanted = reference_logits(tmp_path / "m-float", prompt())
    tolerance = INTEGER_TOLERANCE if wide else FLOAT_TOLERANCE
    assert difference(artifact_logits(tmp_path / "a", prompt()), wanted) < tolerance


@pytest.mark.parametrize("name", ["gptq-4bit-sym", "gptq-order-4bit"])
def test_formats_asked_for_by_name_win(name: str, tmp_path: Path) -> None:
    """Linears that were merged with it for their common column order keep theirs."""
    kind, settings, pack = CASES[name]
    save_quantized(tmp_path / "m", kind, settings, pack)
    asked = ["f32:*.q_proj", "int8:*.layers.1.mlp.down_proj"]
    result = gristmill.compile(
        tmp_path / "m", tmp_path / "a", **EXACT | {"keep": asked, "activations": "f32"}
    )
    assert "11 of 14 quantized matrices kept as they are" in result.summary["checkpoint"]
    found = segments(tmp_path / "a")
    for layer in ("model.layers.0", "model.layers.1"):
        assert found[f"{layer}.self_attn.q_proj"].format == "f32"
        assert found[f"{layer}.self_attn.k_proj"].format == "int4"
    assert found["model.layers.1.mlp.down_proj"].format == "int8"
    wanted = reference_logits(tmp_path / "m-float", prompt())
    assert difference(artifact_logits(tmp_path / "a", prompt()), wanted) < 0.02  # one linear's int8


def test_a_format_asked_for_a_role_wins(tmp_path: Path) -> None:
    kind, settings, pack = CASES["gptq-order-4bit"]
    save_quantized(tmp_path / "m", kind, settings, pack)
    gristmill.compile(tmp_path / "m", tmp_path / "a", **EXACT | {"keep": ["f32:linear"]})
    wanted = reference_logits(tmp_path / "m-float", prompt())
    assert difference(artifact_logits(tmp_path / "a", prompt()), wanted) < FLOAT_TOLERANCE


def test_conv1d(tmp_path: Path) -> None:
    """GPT-2's own weights are [inputs, outputs]; a quantizer's are packed as for any linear."""
    kind, settings, pack = CASES["gptq-4bit-asym"]
    save_quantized(tmp_path / "m", kind, settings, pack, "gpt2")
    result = gristmill.compile(tmp_path / "m", tmp_path / "a", **EXACT | {"activations": "f32"})
    assert result.summary["checkpoint"].endswith("8 of 8 quantized matrices kept as they are")
    wanted = reference_logits(tmp_path / "m-float", prompt())
    assert difference(artifact_logits(tmp_path / "a", prompt()), wanted) < FLOAT_TOLERANCE


# ---- fp8: the values now, the format once there is one


def fp8_checkpoint(folder: Path, scale_of: Any, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """A llama whose linears are fp8; scale_of(n, k) gives the scale's suffix, tensor, values [n, k]."""
    save_tiny(folder, "llama", **LLAMA)
    tensors = load_torch(folder / "model.safetensors")
    expected = {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        n, k = tensors[name].shape
        suffix, scale, full = scale_of(n, k)
        codes = (tensors[name] * 100).to(torch.float8_e4m3fn)
        tensors[name], tensors[name.removesuffix("weight") + suffix] = codes, scale
        expected[name] = codes.float().numpy() * full
    write_model(folder, tensors, settings)
    return expected


def block_scale(n: int, k: int) -> Any:
    scale = torch.rand(-(-n // 128), -(-k // 128)) + 0.5
    full = [[float(scale[i // 128, j // 128]) for j in range(k)] for i in range(n)]
    return "weight_scale_inv", scale, np.array(full, np.float32)


def row_scale(n: int, k: int) -> Any:
    scale = torch.rand(n, 1) + 0.5
    return "weight_scale", scale, np.repeat(scale.numpy(), k, 1)


def one_scale(n: int, k: int) -> Any:
    return "weight_scale", torch.tensor(0.75), np.full((n, k), 0.75, np.float32)


FLOAT_GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
FP8: dict[str, tuple[Any, dict[str, Any]]] = {
    "blocks": (block_scale, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "tensor": (one_scale, {"quant_method": "fp8"}),
    "rows": (row_scale, {"quant_method": "fbgemm_fp8"}),
    "compressed": (
        row_scale,
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"g": FLOAT_GROUP},
        },
    ),
}


@pytest.mark.parametrize("name", FP8)
def test_fp8_values(name: str, tmp_path: Path) -> None:
    expected = fp8_checkpoint(tmp_path / "m", *FP8[name])
    checkpoint = load_source(str(tmp_path / "m")).checkpoint
    for tensor, values in expected.items():
        np.testing.assert_array_equal(checkpoint.read(tensor).numpy(), values)


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_kept(name: str, tmp_path: Path) -> None:
    fp8_checkpoint(tmp_path / "m", *FP8[name])
    checkpoint = load_source(str(tmp_path / "m")).checkpoint
    assert isinstance(checkpoint, QuantizedCheckpoint)
    for tensor in sorted(checkpoint.layers):
        found = checkpoint.quantized(f"{tensor}.weight")
        assert found is not None
        np.testing.assert_array_equal(dequantize_tensor(found.stored(tensor)), found.dequantize())


def test_fp8_is_rounded_anew_on_request(tmp_path: Path) -> None:
    fp8_checkpoint(tmp_path / "m", *FP8["blocks"])
    result = gristmill.compile(tmp_path / "m", tmp_path / "a", **EXACT | {"weights": "f32"})
    assert "the others rounded anew" in result.summary["checkpoint"]


# ---- what is refused


def refuses(folder: Path, message: str) -> None:
    with pytest.raises(GristmillError, match=message) as caught:
        gristmill.compile(folder, folder.parent / "a", **EXACT)
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "a").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quant_method": "mxfp4"}, r"not supported \(mxfp4\)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"not supported \(modelopt, nvfp4\)"),
        ({"quant_method": "bitsandbytes"}, r"not supported \(bitsandbytes\)"),
        ({"quant_method": "awq", "version": "gemv"}, "awq version 'gemv' is not supported; expected gemm"),
        (gptq_config(Kind(), checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported"),
        (gptq_config(Kind(5)), "bits 5"),
        ({"bits": 4}, r"not supported \(missing\)"),
        (compressed_config(Kind(), format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized' is not supported"),
        ({"quant_method": "compressed-tensors"}, "no config_groups"),
    ],
    ids=str,
)
def test_configs_that_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", "llama", **LLAMA)
    write_model(tmp_path / "m", load_torch(tmp_path / "m" / "model.safetensors"), settings)
    refuses(tmp_path / "m", message)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{Q}.scales"), f"no tensor '{Q}.scales'; is a shard missing"),
        (lambda t: t.pop(f"{Q}.qweight"), f"no tensor '{Q}.qweight'"),
        (lambda t: t[f"{Q}.scales"].fill_(torch.nan), f"{Q}: its scales hold NaN"),
        (lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:1].clone()}), r"qzeros' has shape \[1, 16\]"),
        (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"][:8].clone()}), "qweight' has shape"),
        (lambda t: t[f"{Q}.g_idx"].fill_(7), "g_idx has shape"),
        (lambda t: t[f"{Q}.g_idx"].__setitem__(0, 3), "g_idx puts 31 to 33 columns into a group"),
    ],
    ids=["no scales", "no weights", "nan", "zeros", "short", "beyond", "uneven"],
)
def test_damaged_checkpoints(change: Any, message: str, tmp_path: Path) -> None:
    kind = Kind(4, 32, False)
    save_quantized(tmp_path / "m", kind, gptq_config(kind), lambda name, layer: gptq_tensors(layer))
    tensors = load_torch(tmp_path / "m" / "model.safetensors")
    change(tensors)
    write_model(tmp_path / "m", tensors, None)
    refuses(tmp_path / "m", message)


def test_groups_that_cannot_be_stored(tmp_path: Path) -> None:
    kind = Kind(4, 16)
    save_quantized(tmp_path / "m", kind, gptq_config(kind), lambda name, layer: gptq_tensors(layer))
    refuses(tmp_path / "m", "groups of 16 columns cannot be stored; expected a multiple of 32")


def test_v1_zeros_of_0_by_who_wrote_them() -> None:
    """AutoGPTQ lets each value wrap, GPTQModel borrows from the neighbour."""
    zeros = np.array([[0, 3, 8, 0, 15, 1, 0, 7]])
    wrapped = pack_words((zeros - 1) & 15, 4)
    borrowed = (pack_words(zeros, 4).view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    config = gptq.GptqConfig(4, 32, symmetric=False)
    np.testing.assert_array_equal(gptq.decode_zeros(wrapped, 4, config), zeros)
    model = gptq.GptqConfig(4, 32, symmetric=False, quantizer="['gptqmodel:2.0.0']")
    np.testing.assert_array_equal(gptq.decode_zeros(borrowed, 4, model), zeros)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [32, 96, 160])
def test_words_are_packed_by_the_book(bits: int, count: int) -> None:
    values = np.random.default_rng(count).integers(0, 1 << bits, (5, count))
    np.testing.assert_array_equal(pack_words(values, bits), packed(values, bits).numpy())
    np.testing.assert_array_equal(unpack_words(pack_words(values, bits), bits), values)
