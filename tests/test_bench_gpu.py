"""The GPU benchmark without a GPU: random artifacts are a compile's, a dry run goes through it all."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import bench_gpu
import make_model
import numpy as np
import pytest
import random_artifact
from click.testing import CliRunner
from random_artifact import RandomModel, format_name

import gristmill
from gristmill.compiler.options import CompileOptions
from gristmill.quant import pack, rtn
from gristmill.quant.scheme import parse
from gristmill.runtime.artifact import open_artifact
from gristmill.runtime.weights_file import read_tensors

SMALL = {
    **make_model.SHAPES["llama-3.1-8b"], "vocab_size": 300, "hidden_size": 96, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 512,
}  # fmt: skip
FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"kv": "int8"}, "fp8": {"kv": "fp8"}, "bf16": {"max_tokens": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return RandomModel("llama-3.1-8b", SMALL)


def test_the_artifact_is_a_compiles(
    model: RandomModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes of program.json, the same tensors, the same formats; only numbers differ."""
    monkeypatch.setitem(make_model.SHAPES, "llama-3.1-8b", SMALL)
    source = make_model.make_model("llama-3.1-8b", tmp_path / "model")
    options = [CompileOptions.of(weights=name, **more) for name, more in FORMATS.items()]
    written = model.write_all(tmp_path / "random", options)
    for (name, more), path in zip(FORMATS.items(), written.values(), strict=True):
        gristmill.compile(source, tmp_path / name, weights=name, gate=False, **more)
        compiled, random = open_artifact(tmp_path / name), open_artifact(path)
        assert random.read("program.json") == compiled.read("program.json")
        assert read_tensors(random.weights_path) == read_tensors(compiled.weights_path)
        schemes = [a.manifest["quantization"]["schemes"] for a in (random, compiled)]
        assert schemes[0] == schemes[1] and random.manifest["bits_per_weight"] > 0


def test_the_artifact_runs(model: RandomModel, tmp_path: Path) -> None:
    options = CompileOptions.of(weights="int4", kv="int8")
    (path,) = model.write_all(tmp_path, [options]).values()
    assert path.name == f"llama-3.1-8b-{format_name(options)}" == "llama-3.1-8b-int4-int8"
    before = open_artifact(path).content_id
    session = gristmill.load(path, threads=1)
    with session.slot() as slot:
        logits = session.forward([3, 4, 5], [0, 1, 2], [slot] * 3)
    assert np.isfinite(logits).all() and 0.01 < logits.std() < 10
    model.write_all(tmp_path, [options])  # kept
    assert open_artifact(model.write(tmp_path / "again", options)).content_id == before, "not the same bytes"


@pytest.mark.parametrize("text", ["int4-g128", "int8-g128", "int8", "fp8", "bf16", "int3-g128"])
def test_random_weights_have_the_deviation(text: str) -> None:
    scheme = parse(text)
    pool = random_artifact.random_pool(scheme)
    columns, rows = 1024, 64
    if not scheme.has_scales:
        values = pack.decode_float(pool["weight"])[: rows * columns]
    else:
        row = {"fp8": 1024, "int8": 1024, "int4": 512, "int3": 384}[scheme.format]
        arrays = {
            "weight": pool["weight"][: rows * row].reshape(rows, row),
            "scale": pool["scale"][: rows * scheme.groups(columns)].reshape(rows, -1),
        }
        values = rtn.dequantize(pack.unpack(arrays, scheme, columns), scheme)
    assert np.isfinite(values).all()
    assert values.std() == pytest.approx(make_model.DEVIATION, rel=0.1)


# ---- the benchmark itself

triton = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "1", reason="a dry run is for Triton's interpreter"
)


def run(folder: Path, *arguments: str) -> tuple[int, str, dict[str, dict[str, Any]]]:
    """Exit code, output, and rows by "format measure"."""
    pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")
    folders = ["--work", str(folder / "work"), "--results", str(folder), "--budget", "3000"]
    result = CliRunner().invoke(bench_gpu.main, [*folders, *arguments], catch_exceptions=False)
    rows = {}
    for path in folder.glob("gpu-*.csv"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        rows = {f"{row['format']} {row['measure']}": row for row in csv.DictReader(lines)}
    return result.exit_code, result.output, rows


@pytest.fixture
def one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a dry run sets for its process is taken back."""
    pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")
    import triton_interpreter  # noqa: F401

    from gristmill.kernels.triton import linear_configs
    from gristmill.runtime.cuda import executor

    monkeypatch.setattr(linear_configs, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(executor, "PROCESSORS_OF_CPU", 1)


@triton
@pytest.mark.usefixtures("one_processor")
def test_dry_run(tmp_path: Path) -> None:
    sections = ["--formats", "int4", "--sections", "numerics,int4,attention"]
    code, output, rows = run(tmp_path, "--dry-run", *sections)
    assert code == 0, output
    for name in ("decode", "decode, share of the roof", "batch, times one sequence",
                 "first token, share of matmul", "kernels per token"):  # fmt: skip
        assert float(rows[f"int4 {name}"]["value"]) > 0
    assert float(rows["int8 KV attention, times f16"]["value"]) > 0
    checks = [row for row in rows.values() if not row["target"] and row["met"]]
    assert len(checks) == 4 and all(row["met"] == "yes" for row in checks)
    assert float(rows["int4 kernels per token"]["value"]) == 11  # one layer: none of torch's
    kinds = [row["measure"] for row in rows.values() if row["section"] == "profile"]
    assert {"attention f16", "linear mlp.down_proj int4", "rope tables", "sum"} <= set(kinds)
    assert "not measured" in output and "4 checks of numbers: passed" in output


@triton
@pytest.mark.usefixtures("one_processor")
def test_dry_run_of_the_peer(tmp_path: Path) -> None:
    code, output, rows = run(tmp_path, "--dry-run", "--formats", "bf16", "--sections", "peer")
    assert code == 0, output
    assert float(rows["bf16 times torch.compile"]["value"]) > 0
    assert rows["bf16 compilation"]["note"].startswith("torch ")


@triton
@pytest.mark.usefixtures("one_processor")
def test_numbers_that_are_wrong_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import numerics

    right = numerics.decoded
    monkeypatch.setattr(numerics, "decoded", lambda file, segment: 1.1 * right(file, segment))
    code, output, rows = run(tmp_path, "--dry-run", "--formats", "int4", "--sections", "numerics")
    assert code == 1 and rows["int4 error of one row against f32"]["met"] == "NO"


def test_what_has_no_time_left_is_skipped(tmp_path: Path) -> None:
    code, output, rows = run(tmp_path, "--dry-run", "--formats", "int4", "--budget", "0")
    assert code == 0 and "peer: skipped" in output and not rows
    assert output.count("not measured") == 16 and "no numbers were checked" in output


@pytest.mark.usefixtures("one_processor")
def test_a_lost_device_is_left_for_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from gpu import sections
    from gpu.bench import DRY_SHAPE, TINY, Bench
    from gpu.results import Results
    from gpu.roofs import Clock

    def fails(bench: Bench) -> None:
        raise RuntimeError("an illegal memory access")

    replaced: list[list[str]] = []
    monkeypatch.setitem(sections.SECTIONS, "int4", (fails, 1.0))
    monkeypatch.setattr(bench_gpu, "_is_lost", lambda bench: True)
    monkeypatch.setattr(os, "execv", lambda program, arguments: replaced.append(arguments))
    results = Results(tmp_path / "a.csv", ["about"], "NVIDIA H100")
    results.add("int4", "int4", "decode", 700.0, "tok/s")
    results.add("bf16", "bf16", "decode, share of the roof", 0.5, "")
    deadline = time.monotonic() + 500
    bench = Bench("x", DRY_SHAPE, tmp_path, ["int4"], TINY, results, Clock(torch.device("cpu")), deadline)
    assert bench_gpu.run_sections(bench, ["int4"]) == ["int4"]
    assert replaced[0][-6:-2] == ["--sections", "none", "--budget", replaced[0][-3]]
    again = Results(Path(replaced[0][-1]), [], "NVIDIA H100", append=True)
    assert again.rows == results.rows and [row.met for row in again.rows] == [None, False, False]
    assert [row.section for row in again.failed_checks] == ["int4"]


def test_refusals() -> None:
    result = CliRunner().invoke(bench_gpu.main, ["--sections", "int5"])
    assert result.exit_code == 2 and "'int5', expected some of numerics,int4" in result.output
    import torch

    if not torch.cuda.is_available():
        result = CliRunner().invoke(bench_gpu.main, [])
        assert result.exit_code == 1 and "try --dry-run or --paper" in result.output


# ---- on paper


def test_bytes_on_paper_are_the_executors(model: RandomModel, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")
    import torch
    from gpu import paper
    from gpu.adapter import Decoder, with_max_tokens

    (path,) = model.write_all(tmp_path, [CompileOptions.of(weights="int4")]).values()
    decoder = Decoder(path, torch.device("cpu"), max_len=16, max_slots=1, max_tokens=4)
    kv = 2 * 2 * 2 * 24 * 2 * 11  # layers, k and v, heads, dim, f16, positions
    assert paper.bytes_per_token(decoder.program, 10) == decoder.executor.weight_bytes_per_token + kv
    planned = with_max_tokens(decoder.program, 512)
    assert planned.to_bytes() == open_artifact(path).read("program.json"), "planning again changed more"


def test_predictions(model: RandomModel) -> None:
    pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")
    from gpu import paper
    from gpu.adapter import count_on_nothing

    program = model.program(CompileOptions.of(weights="int4"))
    counts = count_on_nothing(program, 132)
    costs = paper.costs(program, 127, counts)
    assert sum(cost.kernels for cost in costs) == sum(counts.values())
    assert counts["rope tables"] == 1 and counts["linear mlp.gate_proj+up_proj int4"] == 2
    assert counts["rms_norm"] == 2, "the first and the last one, the others are the products'"
    by_device = [paper.predict("int4", costs, paper.DEVICES[name]) for name in ("h100", "h200")]
    assert by_device[0].seconds > by_device[1].seconds and by_device[0].share > by_device[1].share
    assert by_device[0].bytes == paper.bytes_per_token(program, 127)
    linears = [program.weights[i.weight or ""] for i in program.instructions if i.op == "linear"]
    linear = sum(segment.n * segment.k for segments in linears for segment in segments)
    assert sum(cost.weights for cost in costs) == linear
    assert paper.operations(program, 1) > 2 * linear


def test_occupancy_and_loops() -> None:
    from gpu import paper

    device = paper.DEVICES["h100"]
    kernel = paper.Compiled("", "", (3584, 1), 4, 4096, 72, 0)
    assert kernel.resident(device) == 7 and kernel.occupancy(device) == 28 / 64
    assert paper.Compiled("", "", (132,), 8, 100 << 10, 255, 0).resident(device) == 1
    assert paper.Compiled("", "", (13,), 8, 0, 32, 0).occupancy(device) == 8 / 64
    sass = [".L_x_0:", "  /*0010*/  FADD R0, R0, R1 ;", ".L_x_1:", "  /*0020*/  LDG.E R1, [R2] ;",
            "   /* 0x000fe20000000f00 */", "  /*0030*/  @!P0 BRA `(.L_x_1) ;", "  /*0040*/  EXIT ;",
            ".L_x_2:", "  /*0050*/  BRA `(.L_x_2);", "  /*0060*/  NOP;"]  # fmt: skip
    assert paper.longest_loop("\n".join(sass)) == 2


def test_paper_is_printed(model: RandomModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")
    monkeypatch.setitem(make_model.SHAPES, "llama-3.1-8b", SMALL)
    result = CliRunner().invoke(bench_gpu.main, ["--paper", "--formats", "int4"], catch_exceptions=False)
    assert result.exit_code == 0 and "linear mlp.down_proj int4" in result.output
    assert "H100 SXM" in result.output and "H200" in result.output
    assert json.dumps(SMALL)  # untouched by transformers, which writes into configs
