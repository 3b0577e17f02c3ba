"""GGUF files as sources: what was exported comes back bit by bit, other files as what they mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from adapters import save_adapter
from families import LLAMA3
from gguf_cases import OPTIONS, SMALL, WIDE, byte_pairs, changed, made
from safetensors.numpy import load_file
from test_formats_in import artifact_logits, difference, prompt
from test_gguf_out import export, sentencepiece

import gristmill
from gristmill.cli import run_command
from gristmill.compiler.gguf_checkpoint import read_header
from gristmill.compiler.gguf_tokenizer import tokenizer_files
from gristmill.compiler.load import load_source
from gristmill.export import gguf_file
from gristmill.export.gguf_tokenizer import vocabulary
from gristmill.runtime.artifact import open_artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.tokenizer import Tokenizer

TEXTS = ["def f(x): return 12,345", "  two  spaces\n\n\tit's", "unseen: žluť 漢字 🙂", "<s> inside</s>", ""]
TOLERANCE = 2e-6  # of the largest logit: frequencies divided in another order


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with integers in groups of 128, 64 and 32 and in rows, with zero points and without."""
    keep = ["int8-g32:*layers.0.mlp*", "int4-g64-asym:*v_proj", "int8-row:*o_proj", "int4-g32:*layers.1.mlp*"]
    options = {"keep": keep, "head": "int4"}
    return made(tmp_path_factory.mktemp("integers"), options=options, **WIDE, attention_bias=True)


@pytest.fixture(scope="module")
def integers_gguf(integers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(integers, tmp_path_factory.mktemp("gguf"))[0]


def compiled(source: Path, folder: Path, **options: Any) -> tuple[Path, str]:
    """The artifact, and what its summary says of the checkpoint."""
    result = gristmill.compile(source, folder / "again", **OPTIONS | options)
    return result.path, result.summary.get("checkpoint", "")


def same_texts(first: Path, second: Path) -> None:
    one, other = (Tokenizer.of(open_artifact(path)) for path in (first, second))
    for text in TEXTS:
        ids = one.encode(text)
        assert other.encode(text) == ids and other.decode(ids) == one.decode(ids), text
    assert other.special_tokens == one.special_tokens


def test_integers_come_back(integers: Path, integers_gguf: Path, tmp_path: Path) -> None:
    again, said = compiled(integers_gguf, tmp_path)
    assert said == "gguf: 16 of 16 quantized matrices kept as they are"
    before, after = (load_file(path / "weights.safetensors") for path in (integers, again))
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    assert np.array_equal(artifact_logits(again, prompt()), artifact_logits(integers, prompt()))
    same_texts(integers, again)
    manifest = open_artifact(again).manifest
    assert manifest["source"]["sha256"].keys() == {"config.json", "out.gguf"}
    assert manifest["quantization"]["checkpoint"]["method"] == "gguf"


@pytest.mark.parametrize(
    "family, changes, exact",
    [
        ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}, True),
        ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}, False),
        ("qwen2", {}, True),
    ],
    ids=["qwen3", "llama3-biases", "qwen2"],
)
def test_models_come_back(
    family: str, changes: dict[str, Any], exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = made(tmp_path, family, {"weights": "f32"}, **SMALL | changes)
    out, _ = export(artifact, tmp_path)
    again, _ = compiled(out, tmp_path, weights="f32")
    wanted, got = artifact_logits(artifact, prompt()), artifact_logits(again, prompt())
    assert np.array_equal(got, wanted) if exact else difference(got, wanted) < TOLERANCE
    assert open_artifact(again).manifest["source"]["model_type"] == family
    if family == "qwen3":  # whose frequencies llama.cpp does not divide one by one
        monkeypatch.setattr(gguf_file, "_rope_factors", lambda weights, shape: np.full(12, 2.0, np.float32))
        with pytest.raises(GristmillError, match="llama.cpp's qwen3 cannot scale rotary frequencies"):
            export(artifact, tmp_path, force=True)


def test_formats_that_are_asked_for_win(integers_gguf: Path, tmp_path: Path) -> None:
    keep = ("f16:*layers.0.self_attn.q_proj",)
    again, said = compiled(integers_gguf, tmp_path, keep=keep, embedding="f32")
    schemes = open_artifact(again).manifest["quantization"]["schemes"]
    assert (
        said
        == "gguf: 14 of 16 quantized matrices kept as they are, the others rounded anew from their values"
    )
    assert schemes["model.layers.0.self_attn.q_proj"] == "f16" and schemes["lm_head"] == "int4-g128"
    assert schemes["model.embed_tokens"] == "f32"


def test_weights_round_anew(integers_gguf: Path, tmp_path: Path) -> None:
    again, said = compiled(integers_gguf, tmp_path, weights="int3", group_size=32)
    assert (
        said == "gguf: 0 of 16 quantized matrices kept as they are, the others rounded anew from their values"
    )
    schemes = open_artifact(again).manifest["quantization"]["schemes"]
    assert {s for n, s in schemes.items() if n.endswith("_proj")} == {"int3-g32"}


# ---- types that fit no format


def test_an_adapter_is_merged_or_run_beside(integers_gguf: Path, tmp_path: Path) -> None:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in (0, 1):
        for name, n, k in (("self_attn.q_proj", 256, 256), ("mlp.down_proj", 256, 320)):
            for part, shape in (("A", (4, k)), ("B", (n, 4))):
                key = f"base_model.model.model.layers.{layer}.{name}.lora_{part}.weight"
                tensors[key] = 0.1 * torch.randn(shape, generator=generator)
    adapter = save_adapter(tmp_path / "adapter", tensors)
    options = {"weights": "f32", "kv": "f32"}
    merged, _ = compiled(integers_gguf, tmp_path / "merged", lora=adapter, **options)
    plain, _ = compiled(integers_gguf, tmp_path / "plain", **options)
    session = gristmill.load(plain, threads=1, adapters={"a": adapter})
    ids = list(range(2, 20))
    without = session.forward(ids, range(18), [0] * 18)
    session.reset(0, "a")
    got = session.forward(ids, range(18), [0] * 18)
    expected = gristmill.load(merged, threads=1).forward(ids, range(18), [0] * 18)
    assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(got - without).max() > 0.01 * np.abs(without).max()


def random_blocks(kind: str, n: int, k: int) -> Any:
    """Random bytes with halves that are small numbers: every block of these types means something."""
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = np.random.default_rng(3).integers(0, 256, (n, k // size, nbytes), np.uint8)
    half = np.frombuffer(np.float16(0.0123).tobytes(), np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]:
        blocks[..., at : at + 2] = half
    return blocks.reshape(n, -1)


KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(scope="module")
def k_types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose matrices are of K types, one after the other."""
    folder = tmp_path_factory.mktemp("k")
    source, _ = export(made(folder, options={"weights": "f32"}, **WIDE | {"intermediate_size": 256}), folder)
    reader, n = gguf.GGUFReader(source), 0
    writer = gguf.GGUFWriter(folder / "k.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            kind, n = KINDS[n % len(KINDS)], n + 1
            packed = random_blocks(kind, int(tensor.shape[1]), int(tensor.shape[0]))
            writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "k.gguf"


def test_k_types_read_as_their_values(k_types: Path) -> None:
    checkpoint = load_source(str(k_types)).checkpoint
    for tensor in gguf.GGUFReader(k_types).tensors:
        if tensor.name in ("token_embd.weight", "blk.0.ffn_up.weight", "blk.1.attn_v.weight"):
            name = {"token_embd.weight": "model.embed_tokens.weight",
                    "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
                    "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight"}[tensor.name]  # fmt: skip
            wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(checkpoint.read(name).numpy(), wanted)
    q = gguf.dequantize(gguf.GGUFReader(k_types).tensors[1].data, gguf.GGMLQuantizationType.Q3_K)
    got = checkpoint.read("model.layers.0.self_attn.q_proj.weight").numpy()
    heads, half = 4, 32  # llama.cpp's row 2i + j of a head is our row i + 32 j
    np.testing.assert_array_equal(
        got.reshape(heads, 2, half, -1), q.reshape(heads, half, 2, -1).swapaxes(1, 2)
    )


def test_k_types_compile_to_f16(k_types: Path, tmp_path: Path) -> None:
    again, said = compiled(k_types, tmp_path)
    assert said.startswith("gguf: 0 of 16 quantized matrices kept as they are; ")
    assert "4 q2_k, 3 q3_k" in said and "dequantized to f16" in said
    record = open_artifact(again).manifest["quantization"]
    assert set(record["schemes"].values()) == {"f16"}
    assert sum(record["checkpoint"]["dequantized"].values()) == 16


# ---- what is refused


def refuses(path: Path | str, message: str) -> None:
    with pytest.raises(GristmillError, match=message) as caught:
        load_source(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, drop, message",
    [
        ({"general__architecture": "gemma2"}, (), "architecture 'gemma2' is not read from GGUF; expected"),
        ({"llama__expert_count": 8}, (), "mixture-of-experts models are not supported; expected a dense"),
        ({"split__count": 3}, (), "is one of 3 parts of a model; join them with `llama-gguf-split --merge`"),
        ({"general__type": "adapter"}, (), "holds a 'adapter', expected a model"),
        ({}, ("llama.embedding_length",), "llama.embedding_length is None, expected a number above 0"),
        ({"llama__attention__head_count_kv": [2, 1]}, (), "head_count_kv differs between layers"),
        ({"llama__rope__dimension_count": 32}, (), "rope.dimension_count differs from the head size of 64"),
        ({"llama__rope__scaling__type": "longrope"}, (), "rope scaling 'longrope' is not supported"),
        ({}, ("blk.0.attn_q.bias", "blk.1.attn_q.bias"), "an llama with biases at self_attn.k_proj"),
        ({"tokenizer__ggml__model": "t5"}, (), "tokenizer 't5' is not supported; expected llama or gpt2"),
        ({"tokenizer__ggml__pre": "bloom"}, (), "pre-tokenizer 'bloom' is not known; expected one of gpt-2"),
        ({}, ("tokenizer.ggml.tokens",), "its tokenizer has no tokens"),
        ({"tokenizer__ggml__token_type": [1, 1]}, (), "its tokenizer's token_type do not fit its tokens"),
    ],
    ids=["architecture", "experts", "split", "adapter", "no width", "layers", "partial", "longrope", "biases",
         "t5", "pre", "no tokens", "types"],
)  # fmt: skip
def test_files_that_are_refused(
    changes: dict[str, Any], drop: tuple[str, ...], message: str, integers_gguf: Path, tmp_path: Path
) -> None:
    refuses(changed(integers_gguf, tmp_path / "x.gguf", drop, **changes), message)


def test_files_that_are_not_whole(integers_gguf: Path, tmp_path: Path) -> None:
    data, path = integers_gguf.read_bytes(), tmp_path / "x.gguf"
    for length in (0, 3, 20, 500, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:length])
        refuses(path, "x.gguf: damaged, truncated or not a GGUF file|cannot be read")
    path.write_bytes(b"PK" + data[2:])
    refuses(path, "magic invalid")
    at = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    path.write_bytes(data[:at] + b"\xff" * 7 + data[at + 7 :])
    refuses(path, "an array of its metadata is too long")
    refuses(tmp_path / "none.gguf", "no such file; expected a GGUF file")
    (tmp_path / "folder.gguf").mkdir()
    refuses(tmp_path / "folder.gguf", "not a file; expected a GGUF file")


def test_tensors_of_other_models_are_refused(integers_gguf: Path, tmp_path: Path) -> None:
    for name, message in (
        (b"blk.0.attn_q_norm.we", "is not one of a plain llama"),
        (b"blk.0.attn_sinks.wei", ""),
    ):
        data = integers_gguf.read_bytes()
        path = tmp_path / "x.gguf"
        path.write_bytes(data.replace(b"blk.0.attn_norm.weig", name, 1))
        refuses(path, message or "is not one of a plain llama")


def test_a_missing_tensor(integers_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed(integers_gguf, tmp_path / "x.gguf", ("blk.1.ffn_up.weight",))
    assert run_command(["compile", str(path), "-o", str(tmp_path / "a"), "--no-gate"]) == 1
    assert "no tensor 'model.layers.1.mlp.up_proj.weight'" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


# ---- tokenizers


@pytest.mark.parametrize("kind", ["bytes", "digits", "sentencepiece"])
def test_tokenizers_come_back(kind: str, tmp_path: Path) -> None:
    merges = [("a", "b"), ("▁", "a"), ("▁a", "b"), ("▁", "ab"), ("▁", "▁"), ("c", "c")]
    if kind == "sentencepiece":
        document = sentencepiece(merges, "▁abcdefx12")
    else:
        document = json.loads(byte_pairs(digits=kind == "digits").to_str())
    config = {"eos_token": "</s>", "chat_template": "{{ messages }}"}
    files = {"tokenizer.json": json.dumps(document).encode()}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    size = 320
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    vocabulary(files, size).write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = Tokenizer.of_files(tokenizer_files(read_header(tmp_path / "t.gguf")))
    before = Tokenizer.of_files(files)
    for text in (*TEXTS, "ab aab  cc ▁ab", " ab"):
        assert again.encode(text) == before.encode(text), text
        assert again.decode(again.encode(text)) == before.decode(before.encode(text)), text
    assert again.chat_template == "{{ messages }}" and again.special_tokens["eos_token"] == "</s>"


def test_a_file_stays_where_it_is(integers_gguf: Path, tmp_path: Path) -> None:
    """The settings live in a temporary folder that goes with the source."""
    shutil.copy(integers_gguf, tmp_path / "x.gguf")
    source = load_source(str(tmp_path / "x.gguf"))
    folder = source.directory
    assert (folder / "config.json").is_file() and [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    del source
    assert not folder.exists()
