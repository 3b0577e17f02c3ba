"""The benchmark models have the shapes of the published ones; the conversions to GGUF keep the numbers."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import click
import compare_peers
import kv_by_position
import make_model
import numpy as np
import pytest
import speed
import start
import torch
from click.testing import CliRunner
from tiny import tiny_artifact
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from gristmill.report.peers import llamacpp_peer, peer_process
from gristmill.report.peers.peer_process import Peer

SMALL = {
    **make_model.SHAPES["tinyllama-1.1b"],
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def test_speed_of_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make_model.SHAPES, "tinyllama-1.1b", SMALL)
    monkeypatch.setattr(speed, "read_gb_s", lambda threads, seconds: 10.0)
    counts = ["--prompt", "8", "--context", "16", "--batch", "2", "--rounds", "1", "--seconds", "0"]
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path)]
    arguments = ["tinyllama-1.1b", "--weights", "int4,f16", "--kv", "int8", *counts, *folders]
    for _ in range(2):  # the second time over the same artifacts
        result = CliRunner().invoke(speed.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0 and "decode of 2" in result.output
    (path,) = tmp_path.glob("*-speed-*.csv")
    rows = list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
    assert [(row["weights"], row["kv"]) for row in rows] == [("int4", "int8")] * 4 + [("f16", "int8")] * 4
    assert all(float(row["tok_s"]) > 0 and float(row["floor_share"]) > 0 for row in rows)


def test_start_of_a_process(tmp_path: Path) -> None:
    tiny_artifact(tmp_path / "a")
    arguments = [str(tmp_path / "a"), "--max-len", "32", "--tokens", "4", "--rounds", "1"]
    result = CliRunner().invoke(start.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "first token after" in result.output and "resident" in result.output


SCRIPT = """
import sys
sys.path.append(sys.argv[1])
from peers.peer_process import Engine, serve
asked = []
def measure(prompt, context, tokens):
    asked.append(prompt)
    return {"prefill_tok_s": prompt / len(asked), "decode_tok_s": context / tokens}
serve(Engine({"version": "clockwork 1"}, measure))
"""


def test_peers_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", SCRIPT, str(Path(peer_process.__file__).parents[1])]
    monkeypatch.setattr(compare_peers, "started", lambda *how: Peer(command))
    tiny_artifact(tmp_path / "a")
    arguments = [str(tmp_path / "a"), "--rounds", "2", "--prompt", "8", "--context", "4", "--tokens", "4"]
    peers = ["--peer", "openvino", sys.executable, str(tmp_path), "--results", str(tmp_path)]
    result = CliRunner().invoke(compare_peers.main, arguments + peers, catch_exceptions=False)
    assert result.exit_code == 0 and "clockwork 1" in result.output
    (path,) = tmp_path.glob("*-peers-a.csv")
    rows = list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
    assert [row["round"] for row in rows] == ["1", "1", "2", "2"]
    theirs = [row for row in rows if row["engine"] == f"openvino {tmp_path.stem}"]
    assert [row["prefill_tok_s"] for row in theirs] == ["4", "2.667"]  # the first of three warmed up
    assert [row["decode_tok_s"] for row in theirs] == ["1", "1"]


def test_ratios_are_of_the_same_round() -> None:
    speeds = {"gristmill": [10.0, 20.0, 90.0], "peer": [5.0, 20.0, 10.0]}
    rows = [
        {"engine": engine, "prefill_tok_s": speed, "decode_tok_s": 2 * speed}
        for engine, each in speeds.items()
        for speed in each
    ]
    assert compare_peers.table(rows)[2:] == [
        "gristmill | 20 | 1.00x | 40.0 | 1.00x",
        "peer | 10 | 2.00x | 20.0 | 2.00x",
    ]


@pytest.mark.parametrize("name", sorted(make_model.SHAPES))
def test_tensors_are_those_of_transformers(name: str) -> None:
    config = dict(make_model.SHAPES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if make_model.SHAPES[name]["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert dict(make_model.tensor_shapes(make_model.SHAPES[name])) == expected


def test_bfloat16_rounds_as_torch() -> None:
    values = np.random.default_rng(0).standard_normal(10_000, np.float32) * np.float32(3)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(make_model.bfloat16(values), expected)


def test_the_same_name_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make_model.SHAPES, "small", SMALL)
    monkeypatch.setattr(make_model, "SHARD_BYTES", 60_000)
    first, again = (make_model.make_model("small", tmp_path / name) for name in ("a", "b"))
    files = sorted(path.name for path in first.iterdir())
    assert sum(name.endswith(".safetensors") for name in files) > 2
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)
    model = AutoModelForCausalLM.from_pretrained(first)
    assert 0.019 < model.model.layers[1].mlp.up_proj.weight.float().std() < 0.021
    assert (model.model.norm.weight == 1).all()
    tokenizer = Tokenizer.from_file(str(first / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == SMALL["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("naïve").ids) == "naïve"


def test_gguf_rows_interleave_the_halves_of_each_head() -> None:
    weight = np.arange(2 * 6, dtype=np.float32).reshape(12, 1)  # two heads of 6 rows
    assert llamacpp_peer.interleaved(weight, 2).ravel().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_gguf_conversion_reads_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make_model.SHAPES, "small", SMALL)
    seen = {
        llamacpp_peer.gguf_name(name): values.shape
        for name, values in llamacpp_peer.tensors(make_model.make_model("small", tmp_path / "m"))
    }
    assert len(seen) == len(list(make_model.tensor_shapes(SMALL)))
    assert seen["output.weight"] == (400, 64)
    assert seen["blk.1.ffn_down.weight"] == (64, 96)


def test_cache_formats_and_their_cost_by_position() -> None:
    options = kv_by_position.cache_options("int8/int4 rotated")
    assert options == {"kv_k": "int8", "kv_v": "int4", "kv_rotate": True}
    assert kv_by_position.cache_options("fp8") == {"kv_k": "fp8", "kv_v": "fp8", "kv_rotate": False}
    with pytest.raises(click.BadParameter, match="no format"):
        kv_by_position.cache_options("int8+int4")
    exact = [np.full(100, 2.0)] * 10
    worse = [np.concatenate([np.full(64, 2.0), np.full(36, 2.02)])] * 10
    assert kv_by_position.report_line(exact, worse, 0, 64).split() == ["+0.000", "(+0.000", "to", "+0.000)"]
    assert kv_by_position.report_line(exact, worse, 64, 100).split()[0] == "+1.000"
