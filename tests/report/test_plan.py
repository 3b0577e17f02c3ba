"""Plans: bytes against those of artifacts and by hand, what fits, and which input is refused in one line."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import save_tiny
from tiny import tiny_artifact

import gristmill
from gristmill.cli import run_command
from gristmill.report import plan_source
from gristmill.report.attained import Attained, Attention, Product
from gristmill.report.cpu_probe import ProbeOptions, measure_cpu
from gristmill.report.devices import DEVICES, DeviceSpec
from gristmill.report.forward_time import forward_times
from gristmill.report.plan import Plan, PlanOptions, needed_bytes, plan
from gristmill.report.plan_text import lines
from gristmill.report.probe_fits import MOST_REACHED, fit_rows, fit_shapes
from gristmill.report.roof_model import break_even, compute_seconds, memory_seconds, ridge
from gristmill.runtime.artifact import open_artifact
from gristmill.runtime.bench import decode_read_bytes
from gristmill.runtime.profile import Forward
from gristmill.runtime.weights_file import read_tensors

CPU = DeviceSpec("a CPU", "cpu", 1 << 30, 20e9, 1e11, 2, "made up", int8_ops=1e12)
PRODUCT, ATTENTION = Product(0.8, 4e10, 3.0), Attention(0.5, 1e10, 2.0)
KERNELS = Attained({"int4": PRODUCT, "int8": PRODUCT}, {"f16": ATTENTION}, 5e-6, 7e-6, 1e-6, 3e-5, "made up")
MEASURED = replace(CPU, attained=KERNELS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gristmill"


def config_only(folder: Path, model: Path, **changes: Any) -> str:
    """A directory with a model's config.json and nothing else."""
    folder.mkdir(exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of py7m, traced once for the tests of this file."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def model(tmp_path: Path, py7m: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    return config_only(tmp_path / "py7m", py7m)


def entry(made: Plan, weights: str, kv: str) -> Any:
    (found,) = (e for e in made.entries if (e.weights, e.kv) == (weights, kv))
    return found


# ---- bytes


def test_bytes_of_py7m_by_hand(model: str) -> None:
    """256 columns, 768 inner ones, 8 layers, 2 heads of 64 in the cache, 4096 words, one matrix for both
    ends."""
    found = entry(plan(model, CPU, PlanOptions(("int4",), ("f16", "int8"), 10)), "int4-g128", "f16")
    short, long = 128 + 2 * 2, 384 + 6 * 2  # bytes of a row: nibbles and f16 scales of 128 columns
    layer = (256 + 128 + 128 + 256 + 2 * 768) * short + 256 * long
    ends = 4096 * (256 + 2)  # int8 with a scale for a row
    assert found.weight_bytes == 8 * layer + ends + 4 * (17 * 256 + 32)  # norms, rotary frequencies
    assert found.kv_bytes == 8 * 2 * (128 + 128)
    assert found.read_bytes == 8 * layer + ends + 258 + 11 * found.kv_bytes
    weights, bits = 8 * 786432 + 4096 * 256, 8 * 786432 * 4.125 + 4096 * 256 * (8 + 16 / 256)
    assert found.bits_per_weight == pytest.approx(bits / weights)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bytes_are_those_of_the_artifact(family: str, tmp_path: Path) -> None:
    """Planned from the config alone, compiled with the weights."""
    save_tiny(tmp_path / "model", family)
    made = plan(config_only(tmp_path / "config", tmp_path / "model"), CPU, PlanOptions(context=20))
    for weights, kv in (("int4", "int8"), ("f16", "f16")):
        out = tmp_path / f"{weights}.grist"
        gristmill.compile(tmp_path / "model", out, weights=weights, kv=kv, gate=False)
        session, artifact = gristmill.load(out, threads=1), open_artifact(out)
        (found,) = (e for e in made.entries if e.weights.split("-")[0] == weights and e.kv == kv)
        stored = {n: t for n, t in read_tensors(artifact.weights_path).items() if not n.startswith("__")}
        assert found.weight_bytes == sum(t.size_bytes for t in stored.values())
        assert found.read_bytes == decode_read_bytes(session, 20)
        assert found.bits_per_weight == pytest.approx(artifact.manifest["bits_per_weight"], abs=1e-4)
        again = plan(str(out), CPU, PlanOptions(context=20, kv=(kv,)))
        assert [replace(e, weights="") for e in again.entries] == [replace(found, weights="")]


# ---- what fits


@pytest.mark.parametrize("device", ["a10", "cpu"])
def test_the_most_that_fits_does_and_one_more_does_not(device: str, model: str) -> None:
    if device == "a10":
        pytest.importorskip("triton", reason="memory of a GPU is counted by its executor, which needs triton")
    spec = CPU if device == "cpu" else replace(DEVICES["a10"], memory_bytes=3 << 29)
    made = plan(model, spec, PlanOptions(("int8",), ("f16",), 100, 3))
    (found,) = made.entries
    _, (sketch,) = plan_source.sketches(model, ["int8"], ())
    program = sketch.with_cache("f16")

    def needed(length: int, slots: int) -> int:
        return needed_bytes(program, spec, length, slots, sketch.weight_bytes)

    assert 1 < found.max_batch < 65536 and found.fits and found.needed_bytes == needed(101, 3)
    assert needed(101, found.max_batch) <= made.usable_bytes < needed(101, found.max_batch + 1)
    assert found.max_context == 1024, "no more than the model has positions"


def test_what_does_not_fit(model: str) -> None:
    options = PlanOptions(("f16", "int2"), ("f16",), 1000)
    made = plan(model, replace(CPU, memory_bytes=32 << 20), options)
    assert [e.fits for e in made.entries] == [False, False] and made.entries[0].max_batch == 0
    said = "Nothing fits with 1 sequence of 1000 positions: int2-g128 with KV f16 is the smallest"
    assert lines(made)[0].startswith(said)
    most = plan(model, replace(CPU, memory_bytes=made.entries[0].needed_bytes - 1), options)
    assert [e.fits for e in most.entries] == [False, True]
    assert lines(most)[0].endswith("int2-g128 with KV f16 is the most exact that fits.")


# ---- times


def test_times_by_hand(tmp_path: Path, model: str) -> None:
    """The seconds of a decoded token, added up from the model's shapes."""
    _, (sketch,) = plan_source.sketches(model, ["int4"], ())
    found = forward_times(sketch.with_cache("f16"), MEASURED, Forward(1, 99))
    linear_bytes = sketch.weight_bytes - 4 * (17 * 256 + 32)
    read = linear_bytes / (0.8 * 20e9) + 258 / 20e9 + 100 * 4096 / (0.5 * 20e9)
    products = 2 * (8 * 786432 + 4096 * 256) * (1 + 3) / 4e10
    attention = 8 * 2 * 4 * 128 * 100 / 1e10 * (1 + 2 / 2)  # two queries for each head of the cache
    assert found.memory == pytest.approx(read) and found.compute == pytest.approx(products + attention)
    assert found.overhead == pytest.approx(3e-5 + 8 * (4 * 5e-6 + 7e-6) + 5e-6 + (17 + 2) * 1e-6)
    worked = products + attention + 258 / 20e9  # computing is the longer part of every instruction but one
    assert found.seconds == pytest.approx(worked + found.overhead)
    assert found.floor == pytest.approx((linear_bytes + 258 + 100 * 4096) / 20e9, rel=0.01)


def test_what_a_cache_holds_is_not_read(model: str) -> None:
    _, (sketch,) = plan_source.sketches(model, ["int4"], ())
    held = forward_times(sketch.program, replace(MEASURED, cache_bytes=32 << 20), Forward())
    assert held.memory == held.floor_memory == 0 < held.compute
    assert [KERNELS.missing(size, 32) for size in (1, 16, 40, 64, 1000)] == [0, 0, 0.5, 1, 1]
    assert KERNELS.missing(1, 0) == 1, "a device whose caches are not known"
    measured = replace(KERNELS, misses=((100, 0.0), (400, 0.5), (800, 1.0)))
    found = [measured.missing(size, 32) for size in (1, 100, 200, 400, 9999)]
    assert found == pytest.approx([0, 0, 0.25, 0.5, 1])


def test_batches_share_the_weights(model: str) -> None:
    one, many = (plan(model, CPU, PlanOptions(("int4",), ("f16",), 0, n)).entries[0] for n in (1, 16))
    assert one.floor_tok_s < many.floor_tok_s < 16.01 * one.floor_tok_s
    assert one.read_bytes == many.read_bytes, "of one sequence"


def test_ridges_and_break_even(model: str) -> None:
    made = plan(model, CPU, PlanOptions(("f16", "int8"), ("f16",)))
    f16, int8 = made.entries
    assert (f16.number, f16.ridge) == ("f32", 1e11 / 20e9) and (int8.number, int8.ridge) == ("int8", 50.0)
    assert f16.break_even_roof == 5, "two operations for two bytes: as many sequences as the ridge says"
    assert int8.break_even_roof == 26, "and for 1 + 1/64 bytes"
    assert any("5 operations per byte (f32)" in line and "a batch of 5 (f16)" in line for line in lines(made))


def test_roof_model() -> None:
    assert memory_seconds(500, bandwidth=100) == 5.0 and compute_seconds(300, peak=100) == 3.0
    assert ridge(bandwidth=100, peak=20000) == 200
    assert break_even(lambda n: 100, lambda n: 7 * n, 1000) == 15
    assert break_even(lambda n: 100, lambda n: 7 * n, 14) is None
    assert break_even(lambda n: 1, lambda n: n, 1000) == 1


# ---- the CPU


def test_rows_are_fitted() -> None:
    assert fit_rows((1000, 1000), (10, 2), (30.0, 14.0), 100.0) == pytest.approx((1.0, 2.0))
    assert fit_rows((1000, 1000), (10, 2), (40.0, 24.0), 100.0) == pytest.approx((0.5, 2.0))
    assert fit_rows((1000, 1000), (10, 2), (20.0, 22.0), 100.0) == pytest.approx((20 / 42, 0.0))
    share, row = fit_rows((1000, 1000), (10, 2), (30.0, 8.0), 100.0)  # much faster than the stream
    assert share == pytest.approx(MOST_REACHED) and row == pytest.approx((38 - 16) / 12)


def test_small_products_are_fitted() -> None:
    shapes = ((256, 256), (2048, 256), (1024, 1024))

    def times(launch: float, row: float, weight: float) -> list[float]:
        return [launch + n * row + n * k * weight for n, k in shapes]

    assert fit_shapes(shapes, times(3000, 2, 0.01)) == pytest.approx((3000, 2, 0.01))
    assert fit_shapes(shapes, times(0, 0, 0.01)) == pytest.approx((0, 0, 0.01))
    launch, row, weight = fit_shapes(shapes, [1000, 1200, 800])  # noise: larger is faster
    assert launch >= 0 and row == 0 and weight > 0
    assert launch + 1024 * 1024 * weight == pytest.approx(800), "what counts most is kept"


def test_this_machine_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.report import cpu_probe

    monkeypatch.setattr(cpu_probe, "cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(cpu_probe, "LEAST_STREAM", 4 << 20)
    monkeypatch.setattr(cpu_probe, "PROBE_BYTES", 16 << 20)
    spec = measure_cpu(ProbeOptions(("int4", "f16"), ("int8",), threads=1, rounds=1, seconds=0.002))
    assert spec.kind == "cpu" and spec.processors == 1 and spec.bandwidth > 1e8 and spec.int8_ops > 1e8
    attained = spec.kernels
    assert set(attained.products) == {"int4", "f16"} and set(attained.attention) == {"int8"}
    for product in attained.products.values():
        assert 0 < product.reached <= MOST_REACHED and product.one > 1e6 and product.rate > 1e6
        assert product.fetch >= 0 and product.finish >= 0
    assert 0 < attained.attend < 0.1 and attained.forward >= 0


# ---- from configs, and what is refused


def test_programs_are_kept(model: str, py7m: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Path] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache.parent))
    _, found = plan_source.sketches(model, ["int4"], ())
    (path,) = own_cache.iterdir()

    def no_trace(directory: Path) -> dict[str, Any]:
        traced.append(directory)
        return {s.weights: s.program for s in found}

    monkeypatch.setattr(plan_source, "_traced_programs", no_trace)
    assert plan_source.sketches(model, ["int4"], ()) == ("py7m", found) and not traced
    for damage in ("{", "[]", '{"int4": {}}'):
        path.write_text(damage)
        assert plan_source.sketches(model, ["int4"], ()) == ("py7m", found) and traced.pop()
    assert len(list(own_cache.iterdir())) == 1
    other = config_only(Path(model).parent / "other", py7m, num_hidden_layers=2)
    plan_source.sketches(other, ["int4"], ())
    assert traced, "another config has other programs"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    """The one line on stderr with which a plan is refused."""
    assert run_command(["plan", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and (code == 2 or err.count("\n") == 1), err
    return err


def test_models_that_cannot_be_planned(
    tmp_path: Path, py7m: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = ("--device-spec", "h200")
    (tmp_path / "empty").mkdir()
    assert "empty: no config.json" in refused(capsys, str(tmp_path / "empty"), *gpu)
    assert "no such directory" in refused(capsys, str(tmp_path / "none"), *gpu)
    strange = config_only(tmp_path / "strange", py7m, model_type="vit")
    assert "'vit' is not a decoder that transformers knows" in refused(capsys, strange, *gpu)
    mixture = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 32, "vocab_size": 64,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "config.json").write_text(json.dumps(mixture))
    assert "mixture-of-experts models are not supported" in refused(capsys, str(tmp_path / "moe"), *gpu)


def test_options_that_do_not_fit(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = str(tiny_artifact(tmp_path / "a"))
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps({"name": "x", "kind": "cpu", "memory": 1}))
    cases = {
        (model, "--device-spec", "h20"): "did you mean h200?",
        (model, "--device-spec", str(file)): "unknown field 'memory'; did you mean memory_bytes?",
        (model, "--device-spec", "h200", "--context", "1024"): "context is 1024, expected 0 to 1023",
        (model, "--device-spec", "h200", "--batch", "0"): "batch is 0, expected 1 to",
        (model, "--device-spec", "h200", "--weights", "int5"): "weights is 'int5', expected one of f32",
        (model, "--device-spec", "h200", "--kv", "int2"): "kv is 'int2', expected one of f32",
        (artifact, "--device-spec", "h200", "--weights", "int4"): "is an artifact, whose weights are what",
    }
    for arguments, message in cases.items():
        assert message in refused(capsys, *arguments), arguments
    assert "Missing argument 'MODEL'" in refused(capsys, "--batch", "2", code=2)
    assert "--threads is for" in refused(capsys, model, "--device-spec", "h200", "--threads", "2", code=2)


def test_the_command(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="memory of a GPU is counted by its executor, which needs triton")
    assert run_command(["plan", model, "--device-spec", "l4", "--kv", "f16,int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["entries"]) == 12 and found["device"]["name"] == "L4" and found["context"] == 1023
    assert found["entries"][0]["weights"] == "f16" and "assumed" in found["assumptions"]
    (tmp_path / "l4.json").write_text(json.dumps(found["device"]))
    again = ["plan", model, "--device-spec", str(tmp_path / "l4.json"), "--kv", "f16,int8", "--json"]
    assert run_command(again) == 0 and json.loads(capsys.readouterr().out) == found
    assert run_command(["plan", model, "--device-spec", "l4", "--weights", "int4,f16"]) == 0
    out = capsys.readouterr().out
    assert "py7m on L4" in out and "int4-g128" in out and "Ridge: the roofs meet at 403" in out
    assert "Every format fits with 1 sequence of 1023 positions." in out
    assert run_command(["plan", "--device-spec", "list"]) == 0
    assert all(spec.source in (out := capsys.readouterr().out + out) for spec in DEVICES.values())


def test_an_artifact_is_planned_without_torch_being_asked(tmp_path: Path) -> None:
    """Its program is all there is to it: no trace, and nothing is kept."""
    path = tiny_artifact(tmp_path / "a")
    made = plan(str(path), CPU, PlanOptions(kv=("f32",)))
    (found,) = made.entries
    session = gristmill.load(path, threads=1)
    assert found.weights == "f32" and found.read_bytes == decode_read_bytes(session, made.context)
    assert not (tmp_path / "cache").exists() and made.positions == 256
    shutil.rmtree(path)
    assert os.listdir(tmp_path) == []
