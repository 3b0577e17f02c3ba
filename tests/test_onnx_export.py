"""Exports to ONNX in both flavours: random programs beside the torch module, and compiled models as used."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from programs import Array, Llama, llama
from programs import Program as Built
from test_executor import CASES, assert_close, gpt2_like, tokens_for
from test_program_module import in_chunks as of_module
from test_program_module import module, of_executor

import gristmill
from gristmill.cli import run_command
from gristmill.export.onnx_folder import OnnxOptions, write_graphs
from gristmill.export.program_module import module_of
from gristmill.export.stored import Stored
from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.onnx.executor import OnnxExecutor
from gristmill.runtime.program import Program

TOLERANCE = 2e-5  # of the largest logit: f32 against f32
CHUNKS = [11, 1, 16, 2]
# Heads of a multiple of 8 columns, keys and values alike, are what ONNX Runtime's attention takes.
RUNTIME = {
    name: dataclasses.replace(
        case, k_dim=24, v_dim=24, rope_dims=min(case.rope_dims, 24) // 8 * 8, hadamard=case.hadamard and 8
    )
    for name, case in CASES.items()
}  # fmt: skip
# Heads that the operator itself turns.
RUNTIME["turned"] = Llama(k_dim=32, v_dim=32, rope_dims=32, window=7, sinks=True)
RUNTIME["turned_interleaved"] = Llama(k_dim=16, v_dim=16, rope_dims=16, rope_style="interleaved", softcap=3.0)


def executor_of(
    built: Built, directory: Path, plain: bool, max_slots: int = 2, caches: str = "f32"
) -> OnnxExecutor:
    """The program's integers are multiplied by floats: what the module with `exact` computes. caches: of
    which type; "": as the program has them."""
    weights = built.write(directory)
    program = Program.from_json(json.loads(built.text()))
    for i in program.instructions:
        if i.op == "linear":
            i.attributes["act_group"] = 0
    if caches:
        program.caches = [dataclasses.replace(c, k_dtype=caches, v_dtype=caches) for c in program.caches]
    options = OnnxOptions(plain=plain, activations="f16" if caches == "f16" else None)
    write_graphs(directory, program, Stored(weights), options)
    folder = Artifact(directory, {"settings": {"shared_buffer": not plain}}, {})
    return OnnxExecutor(folder, program, 1, program.limits.max_len, max_slots, "cpu")


def assert_equal_to_the_module(built: Built, directory: Path, plain: bool) -> None:
    tokens = tokens_for(built, sum(CHUNKS))
    executor = executor_of(built, directory, plain)
    want = of_module(module(built, directory, exact=True), tokens, CHUNKS)
    assert_close(of_executor(executor, tokens, CHUNKS), want, TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_plain_graphs_equal_the_module(case: str, tmp_path: Path) -> None:
    assert_equal_to_the_module(llama(CASES[case]), tmp_path, plain=True)


@pytest.mark.parametrize("case", RUNTIME)
def test_runtime_graphs_equal_the_module(case: str, tmp_path: Path) -> None:
    assert_equal_to_the_module(llama(RUNTIME[case]), tmp_path, plain=False)


@pytest.mark.parametrize("plain", [False, True], ids=["runtime", "plain"])
def test_other_instructions(plain: bool, tmp_path: Path) -> None:
    """Layer norms, learned positions, pointwise steps, views into values."""
    assert_equal_to_the_module(gpt2_like(), tmp_path, plain)


@pytest.mark.parametrize("plain", [False, True], ids=["runtime", "plain"])
def test_slots_are_mixed_rolled_back_and_copied(plain: bool, tmp_path: Path) -> None:
    built = llama(RUNTIME["window"])
    executor, model = executor_of(built, tmp_path, plain), module(built, tmp_path, exact=True)
    texts = [tokens_for(built, 12, seed) for seed in (1, 2)]
    want = [of_module(model, text, [12]) for text in texts]
    order = np.random.default_rng(0).permutation(24)
    slots, positions = (order // 12).astype(np.int32), (order % 12).astype(np.int32)
    tokens = np.array([texts[s][p] for s, p in zip(slots, positions)], np.int32)
    rows = np.array([20, 3, 11], np.int32)
    got = executor.forward(tokens, positions, slots, rows)
    assert_close(got, np.stack([want[slots[r]][positions[r]] for r in rows]), TOLERANCE)
    assert executor.forward(tokens, positions, slots, rows[:0]).shape == (0, built.vocabulary)
    executor.copy_slot(0, 1, 5)
    again = of_slot(executor, texts[0], 5, 12, slot=1)  # which rolls slot 1 back as well
    assert_close(again, want[0][5:], TOLERANCE)
    assert_close(of_slot(executor, texts[0], 3, 12, slot=0), want[0][3:], TOLERANCE)


def of_slot(executor: Any, tokens: Array, start: int, end: int, slot: int) -> Array:
    rows = np.arange(end - start, dtype=np.int32)
    logits = executor.forward(tokens[start:end], rows + start, np.full_like(rows, slot), rows)
    return np.asarray(logits)


# ---- compiled models

PROMPT = "def read_lines(path):\n    with open(path) as f:"


Pair = tuple[Path, Path]  # an artifact and its export


@pytest.fixture(scope="module")
def exact(py7m_f32: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    out = tmp_path_factory.mktemp("f32") / "onnx"
    return py7m_f32, gristmill.export_checkpoint(py7m_f32, out, "onnx")


@pytest.fixture(scope="module")
def int4(py7m_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    out = tmp_path_factory.mktemp("int4") / "onnx"
    return py7m_int4, gristmill.export_checkpoint(py7m_int4, out, "onnx", kv="f32", activations="f32")


def logits(run: Any, ids: list[int]) -> Array:
    sizes = [len(ids) - 3, 1, 1, 1]
    tokens = np.array(ids, np.int32)
    if isinstance(run, torch.nn.Module):
        return of_module(run, tokens, sizes)  # type: ignore[arg-type]
    return of_executor(run, tokens, sizes)


def by_genai(model: Any, ids: list[int], count: int) -> list[int]:
    """The greedy tokens that ONNX Runtime GenAI goes on with."""
    import onnxruntime_genai as og

    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, min_length=len(ids) + count, max_length=len(ids) + count)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(i) for i in generator.get_sequence(0)][len(ids) :]


def relative(got: Array, want: Array) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_f32_logits_and_text_are_the_artifacts(exact: Pair) -> None:
    ours, theirs = gristmill.load(exact[0]), gristmill.load(exact[1], device="onnx:cpu")
    ids = ours.tokenizer.encode(PROMPT)
    assert theirs.tokenizer.encode(PROMPT) == ids
    assert relative(logits(theirs, ids), logits(ours, ids)) < 1e-4
    texts = [session.generate(PROMPT, max_new_tokens=200, ignore_eos=True) for session in (ours, theirs)]
    assert texts[1].token_ids == texts[0].token_ids and len(texts[0].token_ids) == 200
    hidden = [s.forward_hidden(ids, range(len(ids)), [s.max_slots - 1] * len(ids))[1] for s in (ours, theirs)]
    assert relative(hidden[1], hidden[0]) < 1e-4


@pytest.mark.parametrize("plain", [False, True], ids=["runtime", "plain"])
def test_int4_logits_are_those_of_the_stored_weights(plain: bool, int4: Pair, tmp_path: Path) -> None:
    artifact, _ = int4
    floats: dict[str, Any] = {"kv": "f32", "activations": "f32"}
    out = gristmill.export_checkpoint(artifact, tmp_path / "o", "onnx", plain=plain, **floats)
    session = gristmill.load(out, device="onnx:cpu")
    ids = session.tokenizer.encode(PROMPT)
    want = logits(module_of(artifact, exact=True), ids)
    assert relative(logits(session, ids), want) < 1e-4
    if not plain:
        rounds = gristmill.export_checkpoint(artifact, tmp_path / "i", "onnx", kv="f32")
        error = relative(logits(gristmill.load(rounds, device="onnx:cpu"), ids), want)
        assert 1e-4 < error < 0.05, "int8 activations, as the artifact has them"


def test_the_real_small_model(stories_f32: Path, tmp_path: Path) -> None:
    """Shapes that no group divides."""
    out = gristmill.export_checkpoint(stories_f32, tmp_path / "o", "onnx")
    sessions = gristmill.load(stories_f32), gristmill.load(out, device="onnx:cpu")
    ids = [1, *range(300, 340)]
    assert relative(logits(sessions[1], ids), logits(sessions[0], ids)) < 1e-4
    texts = [s.generate([1], max_new_tokens=200, ignore_eos=True).token_ids for s in sessions]
    assert texts[0] == texts[1]


def test_generation_over_slots_and_a_perplexity(exact: Pair) -> None:
    """What needs copies of slots, batches and all rows' logits: as on the CPU."""
    from gristmill.runtime.evaluation import score_text

    sessions = [gristmill.load(exact[0]), gristmill.load(exact[1], device="onnx:cpu")]
    prompts = [PROMPT, "import os\n", PROMPT + " return", "class A:"]
    texts = [[g.token_ids for g in s.generate(prompts, max_new_tokens=12)] for s in sessions]
    assert texts[0] == texts[1]
    beams = [s.beam_search(PROMPT, num_beams=3, max_new_tokens=8)[0].token_ids for s in sessions]
    assert beams[0] == beams[1]
    scores = [score_text(s, PROMPT * 20, window=100).nll for s in sessions]
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


@pytest.mark.parametrize("plain", [False, True], ids=["runtime", "plain"])
def test_onnx_runtime_genai_generates(plain: bool, exact: Pair, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    artifact, out = exact
    if plain:
        out = gristmill.export_checkpoint(artifact, tmp_path / "plain", "onnx", plain=True)
    model = og.Model(str(out))
    tokenizer = og.Tokenizer(model)
    ids = [int(i) for i in tokenizer.encode(PROMPT)]
    want = gristmill.load(artifact).generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    assert ids == gristmill.load(artifact).tokenizer.encode(PROMPT)
    found = by_genai(model, ids, 40)
    assert found == want.token_ids
    assert tokenizer.decode(np.array(found, np.int32)) == want.text


def test_plain_graphs_have_standard_operators_alone(int4: Pair, tmp_path: Path) -> None:
    artifact, out = int4
    plain = gristmill.export_checkpoint(artifact, tmp_path / "plain", "onnx", plain=True, kv="f32")
    for name in ("model.onnx", "rows.onnx"):
        for folder, domains in ((plain, {""}), (out, {"", "com.microsoft"})):
            graph = onnx.load(str(folder / name), load_external_data=False).graph
            assert {node.domain for node in graph.node} == domains
    kinds = {node.op_type for node in onnx.load(str(out / "model.onnx"), load_external_data=False).graph.node}
    assert {"MatMulNBits", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"} <= kinds


def test_weights_are_stored_once_and_in_their_own_size(int4: Pair) -> None:
    """f32 scales instead of f16, a tied embedding and head together, and room between weights."""
    artifact, out = int4
    size = (artifact / "weights.safetensors").stat().st_size
    assert size < (out / "model.onnx.data").stat().st_size < 1.25 * size
    assert sum((out / name).stat().st_size for name in ("model.onnx", "rows.onnx")) < 200_000


@pytest.mark.parametrize(
    "how, message",
    [
        ({}, "KV cache is int8 .* --kv f32"),
        ({"kv": "int8"}, "kv is 'int8', expected 'f32'"),
        ({"kv": "f32", "activations": "f8"}, "activations are 'f8'"),
        ({"kv": "f32", "max_len": 5000}, "max_len is 5000"),
        ({"kv": "f32", "opset": 9}, "no option 'opset'"),
    ],
)
def test_what_is_refused(how: dict[str, Any], message: str, int4: Pair, tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match=message) as caught:
        gristmill.export_checkpoint(int4[0], tmp_path / "o", "onnx", **how)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_heads_that_only_plain_graphs_take(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="heads of 18 key and 18 value columns .* --plain"):
        executor_of(llama(Llama()), tmp_path, plain=False)


def test_the_command(exact: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, out = str(exact[0]), str(tmp_path / "o")
    assert run_command(["export", artifact, "--to", "onnx", "-o", out, "--max-len", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": out, "format": "onnx"}
    assert run_command(["export", artifact, "--to", "onnx", "-o", out]) == 1
    assert "exists; use --force" in capsys.readouterr().err
    assert run_command(["export", artifact, "--to", "gptq", "-o", out, "--plain"]) == 2
    assert "--plain is for --to onnx" in capsys.readouterr().err
    command = ["run", out, "--prompt", "x", "--max-new-tokens", "3", "--device"]
    assert run_command([*command, "onnx:cpu"]) == 0
    capsys.readouterr()
    assert run_command([*command, "cpu"]) == 1
    assert "export to onnx: load it with device='onnx:cpu'" in capsys.readouterr().err
    assert run_command(["run", artifact, *command[2:], "onnx:cpu"]) == 1
    assert "gristmill export ARTIFACT --to onnx" in capsys.readouterr().err
    bench = ["bench", out, "--device", "onnx:cpu", "--prompt", "8", "--tokens", "4", "--rounds", "1"]
    assert run_command(bench) == 0
    assert "decode" in capsys.readouterr().out
    assert run_command([*bench, "--profile"]) == 1
    assert "not for device 'onnx:cpu'" in capsys.readouterr().err


def test_damaged_folders_are_refused(exact: Pair, tmp_path: Path) -> None:
    _, out = exact
    copy = tmp_path / "o"
    copy.mkdir()
    for path in out.iterdir():
        (copy / path.name).symlink_to(path)
    for name, data, message in [
        ("rows.onnx", b"x", "another size"),
        ("export.json", b"[]", "expected an object"),
        ("export.json", b'{"kind": "gristmill export", "to": "gguf"}', "is an export to 'gguf'"),
        ("export.json", b'{"kind": "gristmill export", "to": "onnx", "format": 9}', "format 9"),
        ("export.json", b'{"kind": "gristmill export", "to": "onnx", "format": 1}', "lists no program.json"),
    ]:
        (copy / name).unlink()
        (copy / name).write_bytes(data)
        with pytest.raises(GristmillError, match=message):
            gristmill.load(copy, device="onnx:cpu")
        (copy / name).unlink()
        (copy / name).symlink_to(out / name)
