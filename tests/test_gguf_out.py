"""Artifacts as GGUF files: read back by the gguf package and by transformers, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_cases import SMALL, byte_pairs, made
from tokenizers import Tokenizer

import gristmill
from gristmill.cli import run_command
from gristmill.cli_export import GGUF_TYPES
from gristmill.export.gguf_tensors import TYPES
from gristmill.export.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, vocabulary
from gristmill.export.llama_shape import llama_shape
from gristmill.export.stored import StoredWeights
from gristmill.quant.formats.gguf_names import interleaved_rows, transformers_name
from gristmill.runtime.artifact import open_artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program

Array = Any
ROTATED = {"q_proj": 4, "k_proj": 2}  # heads of the rows that llama.cpp orders its own way


# Formats by matrix, what GGUF types hold them, and whether exactly. 172 columns are no whole blocks.
CHANGES: dict[str, Any] = SMALL | {"intermediate_size": 172, "sliding_window": 7}
FORMATS = {
    "layers.0.self_attn.q_proj": ("int8-g32", "q8_0"), "layers.0.self_attn.k_proj": ("int8-row", "q8_0"),
    "layers.0.self_attn.v_proj": ("int4-g64", "q4_0"), "layers.0.self_attn.o_proj": ("int3-g64-asym", "q4_0"),
    "layers.0.mlp.gate_proj": ("int2-g128", "q4_0"), "layers.0.mlp.up_proj": ("int4-g32-asym", "q5_0"),
    "layers.0.mlp.down_proj": ("int4-g32", "f32"), "layers.1.self_attn.q_proj": ("f16", "f16"),
    "layers.1.self_attn.k_proj": ("bf16", "bf16"), "layers.1.self_attn.v_proj": ("f32", "f32"),
    "layers.1.self_attn.o_proj": ("int2-g32-asym", "q4_0"), "layers.1.mlp.gate_proj": ("fp8", "f16"),
    "layers.1.mlp.up_proj": ("fp8", "f16"), "layers.1.mlp.down_proj": ("f16", "f16"),
    "embed_tokens": ("int4-g32", "q4_0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in f32; its model lies beside it."""
    return made(tmp_path_factory.mktemp("plain"), options={"weights": "f32"}, **SMALL)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral with a matrix of every format."""
    keep = [f"{scheme}:*{name}" for name, (scheme, _) in FORMATS.items()]
    return made(tmp_path_factory.mktemp("mixed"), "mistral", {"keep": keep, "head": "bf16"}, **CHANGES)


def export(artifact: Path, folder: Path, **options: Any) -> tuple[Path, list[str]]:
    """The GGUF file and what was told."""
    notes: list[str] = []
    out = folder / "out.gguf"
    gristmill.export_checkpoint(artifact, out, "gguf", note=notes.append, **options)
    return out, notes


def read(path: Path) -> dict[str, tuple[str, Array]]:
    """Type and values of every tensor by transformers' names, q and k put back."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = transformers_name(tensor.name)
        assert name is not None
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(*reversed(tensor.shape.tolist()))
        heads = ROTATED.get(name.split(".")[-2])
        if heads:
            values = values[np.argsort(interleaved_rows(heads, len(values) // heads))]
        found[name] = (tensor.tensor_type.name.lower(), values)
    return found


def matrices(artifact: Path) -> dict[str, Array]:
    """The artifact's own weights by the checkpoint's names."""
    stored = StoredWeights(open_artifact(artifact))
    return {f"{s.name}.weight": stored.values(s) for parts in stored.program.weights.values() for s in parts}


def test_every_matrix_is_the_artifacts_own(mixed: Path, tmp_path: Path) -> None:
    out, notes = export(mixed, tmp_path)
    found, own = read(out), matrices(mixed)
    assert len(own) == len(FORMATS) + 1
    for name, values in own.items():
        kind, stored = found[name]
        short = name.removeprefix("model.").removesuffix(".weight")
        assert kind == FORMATS.get(short, ("", "bf16"))[1], name
        if FORMATS.get(short, ("",))[0] == "fp8":  # eight bits times an f16 scale, rounded to f16
            np.testing.assert_allclose(stored, values, rtol=2**-11, atol=2**-25, err_msg=name)
        else:
            np.testing.assert_array_equal(stored, values, err_msg=name)
    assert "2 of 16 matrices were rounded anew (f16)" in notes[-1]
    assert "no sliding window for llama: the file's context is 7" in notes[0]
    assert gguf.GGUFReader(out).fields["llama.context_length"].contents() == 7
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_transformers_reads_the_model(plain: Path, tmp_path: Path) -> None:
    """Its own names, orders of rows and settings, from the file alone."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    out, notes = export(plain, tmp_path)
    assert notes[-1] == "every matrix holds the artifact's values exactly"
    original = AutoModelForCausalLM.from_pretrained(plain.parent / "m").eval()
    again = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, gguf_file=out.name)).eval()
    again.load_state_dict(load_gguf_checkpoint(out, return_tensors=True, model_to_load=again)["tensors"])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, original(ids).logits)


@pytest.mark.parametrize("kind, bound", [("q8_0", 1e-4), ("q5_0", 6e-3), ("q4_1", 2e-2), ("q4_0", 2e-2)])
def test_rounded_anew_at_a_loss_that_is_told(kind: str, bound: float, plain: Path, tmp_path: Path) -> None:
    out, notes = export(plain, tmp_path, type=kind)
    found, losses = read(out), []
    for name, values in matrices(plain).items():
        got, stored = found[name]
        end = "embed" in name or "lm_head" in name
        assert got == ("q8_0" if end else kind)
        losses.append(float(np.square(stored - values).sum() / np.square(values).sum()))
    assert 0 < max(losses) < bound
    count = len(losses)
    assert f"{count} of {count} matrices were rounded anew" in notes[-1]
    assert f"{sum(losses) / count:.2g} on average, at most {max(losses):.2g}" in notes[-1]


def _first(document: dict[str, Any], op: str) -> dict[str, Any]:
    found: dict[str, Any] = next(i for i in document["instructions"] if i["op"] == op)
    return found


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: _first(d, "embedding").update(scale=2.0), "scales or shifts its embeddings"),
        (lambda d: _first(d, "rms_norm").update(op="layer_norm"), "has layer_norm where"),
        (lambda d: _first(d, "rms_norm").update(eps=0.5), "has norms of different epsilons"),
        (lambda d: _first(d, "attention").update(scale=0.5), "has layers of different attention"),
        (lambda d: [i.update(scale=0.5) for i in d["instructions"] if i["op"] == "attention"],
         "scales its attention by 0.5"),
        (lambda d: _first(d, "attention").update(softcap=5.0), "has attention sinks or caps its scores"),
        (lambda d: _first(d, "linear").update(scale=3.0), "has a linear with an activation or a scale"),
        (lambda d: [i.pop("residual", None) for i in d["instructions"]], "another order of norms"),
        (lambda d: [i.update(activation="gelu") for i in d["instructions"] if i.get("glu")],
         "has no silu gate"),
        (lambda d: d["ropes"][0].update(dims=16), "does not rotate whole heads"),
    ],
    ids=["embedding", "norm", "eps", "layers", "attention", "cap", "linear", "residual", "gate", "rope"],
)  # fmt: skip
def test_other_programs_are_refused(change: Any, message: str, plain: Path) -> None:
    document = open_artifact(plain).json("program.json")
    assert llama_shape(Program.from_json(document)).head_dim == 32
    change(document)
    with pytest.raises(GristmillError, match=message) as caught:
        llama_shape(Program.from_json(document))
    assert "\n" not in str(caught.value)


def test_the_command_knows_the_types() -> None:
    assert GGUF_TYPES == TYPES


def test_the_command(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    command = ["export", str(mixed), "--to", "gguf", "-o", str(out)]
    assert run_command([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["path"] == str(out) and result["notes"][1].startswith("matrices: 5 q4_0, 4 f16, ")
    assert run_command(command) == 1
    assert "exists; use --force" in capsys.readouterr().err
    assert run_command([*command, "--force", "--type", "q8_0"]) == 0
    assert "matrices: 14 q8_0, 2 f32" in capsys.readouterr().err
    out.write_text("mine")
    assert run_command([*command, "--force"]) == 1
    assert "is not a GGUF file" in capsys.readouterr().err and out.read_text() == "mine"
    assert run_command([*command[:-1], str(tmp_path)]) == 1
    assert "is a directory; give the name of a file" in capsys.readouterr().err
    assert run_command(["export", str(mixed), "--to", "awq", "--type", "q8_0", "-o", str(out)]) == 2
    assert "--type is for --to gguf, got --to awq" in capsys.readouterr().err
    with pytest.raises(GristmillError, match="GGUF type 'q4_k' is not written; expected one of f32, f16"):
        gristmill.export_checkpoint(mixed, tmp_path / "new.gguf", "gguf", type="q4_k")
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


# ---- tokenizers


def sentencepiece(merges: list[tuple[str, str]], pieces: str = "▁abc") -> dict[str, Any]:
    """A tokenizer.json of byte fallback with these merges."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    names += dict.fromkeys(left + right for left, right in merges)
    tokenizer = byte_pairs()
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    document["model"] |= {
        "vocab": {n: i for i, n in enumerate(names)},
        "merges": merges,
        "byte_fallback": True,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    document |= {
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}, "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            replace | {"pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "added_tokens": [entry | {"id": i, "content": names[i]} for i in range(3)
                         for entry in document["added_tokens"][:1]],
    }  # fmt: skip
    return document


def files(document: dict[str, Any], **config: Any) -> dict[str, bytes]:
    return {
        "tokenizer.json": json.dumps(document).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def test_ranks_become_scores() -> None:
    document = sentencepiece([("a", "b"), ("▁", "a"), ("▁a", "b"), ("▁", "ab")])
    found = vocabulary(files(document, unk_token="<unk>", eos_token="</s>"), 270)
    at = {text: i for i, text in enumerate(found.tokens)}
    assert found.model == "llama" and found.space_prefix
    assert [found.scores[at[t]] for t in ("ab", "▁a", "▁ab")] == [0.0, -1.0, -2.0]
    kinds = [found.kinds[at[t]] for t in ("<unk>", "<s>", "<0x41>", "ab", "[PAD269]")]
    assert kinds == [UNKNOWN, CONTROL, BYTE, NORMAL, UNUSED]
    assert found.special == {"unknown": 0, "eos": 2} and not found.add_bos


def _unigram(document: dict[str, Any]) -> None:
    document["model"] = {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]], "unk_id": 0}


def _prefix(document: dict[str, Any]) -> None:
    document["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip


def _two_before(document: dict[str, Any]) -> None:
    document["post_processor"]["single"].insert(0, document["post_processor"]["single"][0])


@pytest.mark.parametrize(
    "change, message",
    [
        (_unigram, "its tokenizer is Unigram; expected byte pairs"),
        (_prefix, "no pre-tokenizer that cuts text as this tokenizer does"),
        (_two_before, "puts more around a text than one BOS and one EOS"),
        (lambda d: d.update(normalizer={"type": "Lowercase"}), "rewrites text before cutting it"),
        (lambda d: d["model"].update(merges=[]), "has no merges"),
    ],
    ids=["unigram", "prefix space", "two before", "lowercase", "no merges"],
)
def test_tokenizers_that_llama_cpp_would_read_otherwise(change: Any, message: str) -> None:
    document = json.loads(byte_pairs().to_str())
    change(document)
    with pytest.raises(GristmillError, match=message):
        vocabulary(files(document), 320)


@pytest.mark.parametrize(
    "merges, message",
    [
        ([("a", "b"), ("▁", "a"), ("▁a", "b")], "do not make '▁ab' in all ways"),
        ([("a", "b"), ("▁", "a"), ("▁a", "b"), ("b", "c"), ("▁", "ab")], "do not make '▁ab' in all ways"),
    ],
    ids=["a way is missing", "other merges between"],
)
def test_merges_that_are_not_sentencepieces(merges: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        vocabulary(files(sentencepiece(merges)), 300)


def test_digits_have_a_name() -> None:
    assert vocabulary(files(json.loads(byte_pairs(digits=True).to_str())), 300).pre == "smollm"


def test_more_tokens_than_the_model_has() -> None:
    tokenizer: Tokenizer = byte_pairs()
    size = tokenizer.get_vocab_size()
    with pytest.raises(GristmillError, match=f"has {size} tokens and the model {size - 1}"):
        vocabulary(files(json.loads(tokenizer.to_str())), size - 1)
