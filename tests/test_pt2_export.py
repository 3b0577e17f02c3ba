"""Exports to AOTInductor. Compiling takes long, so that formats and attention are held before it, in torch,
and the one package of the suite is that of a small program; `pytest -m minutes` compiles real models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import DTYPES, Array, Format, Llama, llama
from programs import Program as Built
from test_executor import CASES, assert_close, gpt2_like, tokens_for
from test_onnx_export import relative
from test_program_module import CHUNKS, in_chunks, module
from tiny import byte_tokenizer, tiny_artifact

import gristmill
from gristmill.cli import run_command
from gristmill.export import pt2_folder
from gristmill.export.entry_points import Decode, EntryPoint, Prefill
from gristmill.export.packed_matrix import PackedMatrix
from gristmill.export.program_module import module_of
from gristmill.export.stored import Stored, segments_of
from gristmill.runtime.artifact import EXPORT
from gristmill.runtime.artifact_writer import ArtifactWriter
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program
from gristmill.runtime.pt2.constants import constants
from gristmill.runtime.weights_file import TensorSpec

TOLERANCE = 2e-6  # of the largest: the same values in another order
PROGRAMS = {
    "f16": CASES["f16"], "int8": dataclasses.replace(CASES["int8"], cache="f32"), "order": CASES["order"],
    "sinks": Llama(sinks=True, window=7, softcap=3.0), "uneven_heads": CASES["uneven_heads"],
    "hadamard": CASES["kv_int4"], "window": CASES["window"],
}  # fmt: skip


def read(built: Built, folder: Path) -> tuple[Program, dict[str, torch.Tensor]]:
    program, weights = Program.from_json(json.loads(built.text())), folder / "weights.safetensors"
    if not weights.exists():
        built.write(folder)
    return program, constants(weights, program)


FORMATS = [
    Format(name, group, symmetric)
    for name in ("int8", "int4", "int3", "int2")
    for group, symmetric in ((0, True), (0, False), (32, False), (32, True), (64, False), (128, True))
]
FORMATS += [Format("fp8", group) for group in (0, 32, 128)]
FORMATS += [Format(name) for name in ("f32", "f16", "bf16")]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packed_products(form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, many rows in several pieces, and rows of an embedding, at widths that no block divides."""
    monkeypatch.setattr("gristmill.export.packed_matrix.ROWS_AT_ONCE_BYTES", 20_000)
    built = Built(vocabulary=24)
    for k in (72, 96, 328):
        built.weight(f"columns_{k}", [24], k, [form])
    program, weights = read(built, tmp_path)
    stored = Stored(tmp_path / "weights.safetensors")
    for name, segment in segments_of(program).items():
        parts = (weights.get(f"{name}.{part}") for part in ("weight", "scale", "zero"))
        weight, scale, zero = parts
        assert weight is not None
        matrix, values = PackedMatrix(segment, weight, scale, zero), torch.from_numpy(stored.values(segment))
        x = torch.randn(3, segment.k, generator=torch.Generator().manual_seed(1))
        want = (x.double() @ values.double().T).float().numpy()
        assert_close(matrix.product(x, one_row=False).numpy(), want, TOLERANCE)
        assert_close(matrix.product(x[:1], one_row=True).numpy(), want[:1], TOLERANCE)
        ids = torch.tensor([0, segment.n - 1, 5])
        assert_close(matrix.rows(ids).numpy(), values[ids].numpy(), TOLERANCE)


def of_entries(program: Program, weights: dict[str, torch.Tensor], tokens: Array, sizes: list[int]) -> Array:
    """All logits of one sequence, by prefill and, one token at a time, by decode."""
    caches, parts, at = pt2_folder.empty_caches(program, sum(sizes)), [], 0
    entries: list[EntryPoint] = [Prefill(program, weights), Decode(program, weights)]
    for size in sizes:
        end = at + size
        ids, positions = torch.from_numpy(tokens[at:end].astype(np.int64)), torch.arange(at, end)
        seen, rows = [cache[:end] for cache in caches], torch.arange(size)
        with torch.inference_mode():
            given = (ids, positions, rows, seen) if size > 1 else (ids, positions, seen)
            parts.append(entries[size == 1](*given)[0].numpy())
        at = end
    return np.concatenate(parts)


@pytest.mark.parametrize("case", [*PROGRAMS, "gpt2"])
def test_entry_points_compute_the_program(case: str, tmp_path: Path) -> None:
    built = gpt2_like() if case == "gpt2" else llama(PROGRAMS[case])
    for instruction in built.json["instructions"]:
        instruction |= {"act_group": 0} if instruction["op"] == "linear" else {}
    tokens = tokens_for(built, sum(CHUNKS))
    rounds = any(set(spec.values()) & {"f16", "int8", "fp8", "int4"} for spec in built.json["caches"])
    want = in_chunks(module(built, tmp_path), tokens, CHUNKS)
    got = of_entries(*read(built, tmp_path), tokens, CHUNKS)
    assert_close(got, want, 2e-2 if rounds else 1e-5)


def artifact_of(built: Built, path: Path) -> Path:
    """A random program as an artifact with a tokenizer of bytes."""
    with ArtifactWriter(path) as writer:
        specs = [TensorSpec(name, DTYPES[a.dtype.name], a.shape) for name, a in built.tensors.items()]
        out = writer.declare_weights(specs, {"model": "random"})
        for name, array in built.tensors.items():
            out.write(name, array)
        writer.write_bytes("program.json", Program.from_json(json.loads(built.text())).to_bytes())
        writer.write_bytes("tokenizer.json", byte_tokenizer().to_str().encode())
        writer.write_json("tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
        return writer.commit({"quantization": {"method": "none"}, "source": {"name": "random"}})


Pair = tuple[Path, Path]  # an artifact and its export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One layer in int4 with an embedding in int8; the cache is f32, so that greedy tokens must be equal."""
    folder = tmp_path_factory.mktemp("pt2")
    form, embedding = Format("int4", 32, False), Format("int8")
    built = llama(Llama(vocabulary=260, layers=1, form=form, embedding=embedding, hidden=136))
    artifact = artifact_of(built, folder / "a")
    return artifact, gristmill.export_checkpoint(artifact, folder / "o", "pt2")


@pytest.fixture
def sessions(exported: Pair) -> Iterator[tuple[gristmill.Session, gristmill.Session]]:
    """The artifact's own, and that of the package."""
    yield (
        gristmill.load(exported[0], threads=1, max_slots=3),
        gristmill.load(exported[1], device="pt2:cpu", threads=1, max_slots=3),
    )


@pytest.mark.minutes  # a package is compiled
def test_a_session_runs_it(sessions: tuple[gristmill.Session, gristmill.Session]) -> None:
    ours, theirs = sessions
    ids = ours.tokenizer.encode("def read_lines(path):")
    want, got = (s.forward_hidden(ids, range(len(ids)), [0] * len(ids)) for s in sessions)
    for ours_part, theirs_part in zip(want, got):
        assert relative(theirs_part, ours_part) < 1e-4
    chunks = [
        theirs.forward(ids[a:b], range(a, b), [1] * (b - a)) for a, b in ((0, 1), (1, 8), (8, len(ids)))
    ]
    assert relative(np.concatenate(chunks), want[0]) < 1e-4
    again = theirs.forward([7, 7], [len(ids)] * 2, [0, 1])  # rows of two sequences
    assert relative(again[:1], again[1:]) < 1e-4
    for session in sessions:
        for slot in (0, 1):
            session.reset(slot)
    texts = [s.generate([5, 6, 7], max_new_tokens=40, ignore_eos=True).token_ids for s in sessions]
    assert texts[0] == texts[1]
    beams = [s.beam_search("ab", num_beams=3, max_new_tokens=4) for s in sessions]  # which copies slots
    assert [b.token_ids for b in beams[0]] == [b.token_ids for b in beams[1]]


@pytest.mark.minutes  # a package is compiled
def test_weights_lie_outside_the_package(exported: Pair) -> None:
    artifact, out = exported
    assert (out / "weights.safetensors").read_bytes() == (artifact / "weights.safetensors").read_bytes()
    session = gristmill.load(out, device="pt2:cpu", threads=1)
    runners = session.executor._runners  # type: ignore[attr-defined]
    assert set(runners) == {"decode", "prefill"}
    program = Program.from_json(json.loads((out / "program.json").read_text()))
    assert set(runners["decode"].get_constant_fqns()) <= set(constants(out / "weights.safetensors", program))


@pytest.mark.minutes  # a package is compiled
def test_commands_run_it(exported: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, text = str(exported[1]), tmp_path / "text.txt"
    text.write_text("a line of text\n" * 20)
    options = ["--device", "pt2:cpu", "--threads", "1"]
    assert run_command(["run", out, *options, "--prompt", "ab", "--max-new-tokens", "3"]) == 0
    assert run_command(["eval", out, *options, "--text", str(text)]) == 0
    assert "ppl" in capsys.readouterr().out
    with pytest.raises(GristmillError, match="export to pt2: load it with device='pt2:cpu'"):
        gristmill.load(out)


def changed(folder: Path, **settings: str) -> None:
    found = json.loads((folder / EXPORT).read_text())
    found["settings"] |= settings
    (folder / EXPORT).write_text(json.dumps(found))


@pytest.mark.minutes  # a package is compiled
@pytest.mark.parametrize(
    "setting, value",
    [("torch", "2.1.0"), ("machine", "riscv64"), ("instructions", "AVX9"), ("device", "cuda")],
)
def test_a_package_of_another_machine_is_refused(
    setting: str, value: str, exported: Pair, tmp_path: Path
) -> None:
    folder = copied(exported[1], tmp_path)
    changed(folder, **{setting: value})
    with pytest.raises(
        GristmillError, match=f"was compiled for {setting} {value}, here is .*; export"
    ) as caught:
        gristmill.load(folder, device="pt2:cpu")
    assert "\n" not in str(caught.value)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


@pytest.mark.minutes  # a package is compiled
def test_damaged_folders_are_refused(exported: Pair, tmp_path: Path) -> None:
    folder = copied(exported[1], tmp_path)
    package = (folder / "model.pt2").read_bytes()
    (folder / "model.pt2").write_bytes(bytes(len(package)))
    with pytest.raises(GristmillError, match="its hash in export.json; export again"):
        gristmill.load(folder, device="pt2:cpu")
    (folder / "model.pt2").write_bytes(package[:1000])
    with pytest.raises(GristmillError, match="another size than export.json says; export again"):
        gristmill.load(folder, device="pt2:cpu")
    (folder / "model.pt2").write_bytes(b"no package")
    found = json.loads((folder / EXPORT).read_text())
    found["files"]["model.pt2"] = {"size": 10, "sha256": hashlib.sha256(b"no package").hexdigest()}
    (folder / EXPORT).write_text(json.dumps(found))
    with pytest.raises(GristmillError, match="cannot load .*model.pt2: .*; export again") as caught:
        gristmill.load(folder, device="pt2:cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(GristmillError, match="is an export to 'pt2', expected onnx"):
        gristmill.load(folder, device="onnx:cpu")


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = tiny_artifact(tmp_path / "a")

    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pt2_folder, "write_package", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gristmill.export_checkpoint(artifact, tmp_path / "o", "pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_gpus_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = tiny_artifact(tmp_path / "a")
    with pytest.raises(GristmillError, match="runs the artifact itself, with CUDA Graphs: --device cuda"):
        gristmill.export_checkpoint(artifact, tmp_path / "o", "pt2", device="cuda")
    with pytest.raises(GristmillError, match="'pt2:cuda' is not supported"):
        gristmill.load(artifact, device="pt2:cuda")
    command = ["export", str(artifact), "--to", "onnx", "--device", "cpu", "-o", str(tmp_path / "o")]
    assert run_command(command) == 2
    assert "--device is for --to pt2" in capsys.readouterr().err


@pytest.mark.minutes
@pytest.mark.parametrize("weights, kv", [("f32", "f32"), ("int4", "f32"), ("int4", "int8")])
@pytest.mark.parametrize("model", ["py7m", "stories260k"])
def test_real_models(
    model: str, weights: str, kv: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(model)
    artifact = tmp_path / "a"
    gristmill.compile(source, artifact, gate=False, weights=weights, kv=kv)
    out = gristmill.export_checkpoint(artifact, tmp_path / "o", "pt2")
    theirs = gristmill.load(out, device="pt2:cpu", threads=1, max_slots=2)
    ids = theirs.tokenizer.encode("def read_lines(path): once upon a time")
    reference = module_of(artifact)
    for i in reference.program.instructions:
        i.attributes.update({"act_group": 0} if i.op == "linear" else {})
    count = torch.arange(len(ids))
    with torch.inference_mode():
        want = reference(torch.tensor(ids), count, count, reference.empty_caches(64)).numpy()
    tolerance = 1e-3 if kv == "f32" else 2e-2  # a cache that rounds is rounded the other way now and then
    assert relative(theirs.forward(ids, count.numpy(), [0] * len(ids)), want) < tolerance
    alone = [theirs.forward([token], [at], [1]) for at, token in enumerate(ids)]
    assert relative(np.concatenate(alone), want) < tolerance
    theirs.reset(0)
    if weights == "f32":
        sessions = gristmill.load(artifact), theirs
        texts = [s.generate([1], max_new_tokens=200, ignore_eos=True).token_ids for s in sessions]
        assert texts[0] == texts[1]
