"""Calibrated compiles of tiny models: better than rounding, the same bytes after a kill, clear refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import config_of, fused, random_model, texts, traced_of

import gristmill
from gristmill.compiler import calibrate, scale_channels
from gristmill.compiler import walk as walking
from gristmill.compiler.calibration_set import calibration_set
from gristmill.compiler.walk import Walk, no_visit
from gristmill.passes.graph import arguments, is_op, ours
from gristmill.quant.scheme import Scheme
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.report import artifact_summary, matrix_lines, quantization_rows, read_program
from gristmill.runtime.tokenizer import Tokenizer

OPTIONS: dict[str, Any] = {"group_size": 32, "gate": False, "samples": 8, "sample_length": 48}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with a tokenizer of bytes; two channels of its residual stream stand out."""
    from families import save_tiny

    directory = tmp_path_factory.mktemp("calibrated") / "model"
    save_tiny(
        directory, "llama", hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2
    )
    return directory


def manifest(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "manifest.json").read_text()))


def errors(path: Path) -> dict[str, tuple[float, float]]:
    found = manifest(path)["quantization"]["matrices"]
    return {name: (r["error_rtn"], r["error"]) for name, r in found.items() if r["error"] is not None}


@pytest.mark.parametrize("method", ["rtn+search", "gptq", "awq", "awq+gptq"])
def test_every_matrix_is_at_least_as_good_as_rounded(
    model: Path, text: Path, tmp_path: Path, method: str
) -> None:
    gristmill.compile(model, tmp_path / "a", method=method, calibration=text, **OPTIONS)
    found = errors(tmp_path / "a")
    assert len(found) >= 2 * 7
    assert all(after <= before * 1.001 for before, after in found.values())
    assert sum(after for _, after in found.values()) < 0.95 * sum(before for before, _ in found.values())
    assert manifest(tmp_path / "a")["quantization"]["calibration"]["text"] == text.name
    assert not list(tmp_path.glob(".*"))  # nothing is left beside the artifact
    summary = artifact_summary(*read_program(tmp_path / "a"))
    shown = dict(quantization_rows(summary))
    assert "2 x int4-g32, " + method in shown["q_proj"] and "rounded" in shown["q_proj"]
    lines = matrix_lines(summary)
    assert len(lines) == len(found) + 1 and any("down_proj" in line and " s" in line for line in lines)
    session = gristmill.load(tmp_path / "a")
    assert session.generate("def f", max_new_tokens=4, ignore_eos=True).token_ids


@pytest.mark.parametrize(
    "family, changes",
    [
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gemma2", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ],
)
def test_other_families_with_outliers_and_tied_heads(
    family: str, changes: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    """A few input channels of every linear after a norm are 30 times as large, undone by its weights."""
    from families import save_tiny

    net = save_tiny(tmp_path / "model", family, **changes)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() == 1 and "norm" in name or "ln_" in name and name.endswith("weight"):
                parameter[:3] *= 30
    net.save_pretrained(tmp_path / "model")
    options = OPTIONS | {"calibration": text, "weights": "int3"}
    gristmill.compile(tmp_path / "model", tmp_path / "a", method="awq+gptq", **options)
    found = errors(tmp_path / "a")
    assert sum(after for _, after in found.values()) < 0.7 * sum(before for before, _ in found.values())
    schemes = manifest(tmp_path / "a")["quantization"]["schemes"]
    tied = changes.get("tie_word_embeddings", family in ("gpt2", "gemma2"))
    assert ("lm_head" in schemes or "embed_out" in schemes) != tied
    logits = gristmill.load(tmp_path / "a").forward(np.arange(2, 20), np.arange(18), np.zeros(18, np.int32))
    assert np.isfinite(logits).all()


class Killed(Exception):
    pass


def _into(seen: list[tuple[str, float]]) -> Callable[[str, float], None]:
    return lambda stage, fraction: seen.append((stage, fraction))


@pytest.mark.parametrize("method, asymmetric", [("gptq", True), ("gptq", False), ("awq+gptq", True)])
def test_a_resumed_run_has_the_bytes_of_one_that_was_not_killed(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, asymmetric: bool
) -> None:
    monkeypatch.setattr(calibrate, "SAVE_EVERY_S", 0.0)
    options = OPTIONS | {"method": method, "calibration": text, "asymmetric_error": asymmetric}
    whole = gristmill.compile(model, tmp_path / "whole", **options)
    again = gristmill.compile(model, tmp_path / "again", **options)
    ids = [manifest(r.path)["content_id"] for r in (whole, again)]
    stages = ["prepare", "quantize"] if "awq" in method else ["quantize"]
    for stage in stages:
        for share in (0.3, 0.8):

            def kill(now: str, fraction: float, stage: str = stage, share: float = share) -> None:
                if now == stage and fraction >= share:
                    raise Killed

            with pytest.raises(Killed):
                gristmill.compile(model, tmp_path / "killed", progress=kill, **options, force=True)
            assert not (tmp_path / "killed").exists()
            seen: list[tuple[str, float]] = []
            resumed = gristmill.compile(
                model, tmp_path / "killed", resume=True, progress=_into(seen), **options
            )
            started = next(fraction for name, fraction in seen if name == stage)
            assert started > (0.4 if share > 0.5 else 0.05)  # it did go on, and not begin again
            ids.append(manifest(resumed.path)["content_id"])
            shutil.rmtree(tmp_path / "killed")
    assert len(set(ids)) == 1
    assert not list(tmp_path.glob(".*"))


def test_a_resume_that_does_not_fit_is_refused(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS | {"method": "gptq", "calibration": text}
    with pytest.raises(GristmillError, match="no calibration to resume"):
        gristmill.compile(model, tmp_path / "a", resume=True, **options)

    def kill(stage: str, fraction: float) -> None:
        if stage == "quantize":
            raise Killed

    with pytest.raises(Killed):
        gristmill.compile(model, tmp_path / "a", progress=kill, **options)
    with pytest.raises(GristmillError, match=r"was made with options .*leave out --resume"):
        gristmill.compile(model, tmp_path / "a", resume=True, **options | {"group_size": 64})


def test_a_budget_is_kept_and_shown(model: Path, text: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"calibration": text, "keep": "int8:*.1.mlp.down_proj"}
    result = gristmill.compile(model, tmp_path / "bits", method="gptq", bits=6.0, **options)
    schemes = manifest(result.path)["quantization"]["schemes"]
    assert result.summary["bits_per_weight"] <= 6.0
    assert schemes["model.layers.1.mlp.down_proj"] == "int8-g32"
    assert len({s for n, s in schemes.items() if "layers" in n}) > 1
    assert "bits per weight" in result.summary["budget"] and "next larger" in result.summary["budget"]
    size = (result.path / "weights.safetensors").stat().st_size + 6000
    sized = gristmill.compile(model, tmp_path / "size", size=str(size), **options)
    assert (sized.path / "weights.safetensors").stat().st_size <= size
    with pytest.raises(GristmillError, match="too small"):
        gristmill.compile(model, tmp_path / "none", bits=1.5, **options)


def test_kept_formats_split_a_linear_of_both_kinds(model: Path, tmp_path: Path) -> None:
    gristmill.compile(
        model,
        tmp_path / "a",
        keep=["f16:*.k_proj", "f32:head"],
        **OPTIONS | {"samples": 64, "sample_length": 512},
    )
    schemes = manifest(tmp_path / "a")["quantization"]["schemes"]
    assert schemes["model.layers.0.self_attn.k_proj"] == "f16"
    assert schemes["model.layers.0.self_attn.q_proj"] == "int4-g32"
    dequantized = gristmill.load(tmp_path / "a")
    reference = _reference(model, tmp_path / "a")
    ids = np.arange(2, 30, dtype=np.int32)
    got = dequantized.forward(ids, np.arange(28), np.zeros(28, np.int32))
    assert np.abs(got - reference).max() < 2e-3 * np.abs(reference).max()
    with pytest.raises(GristmillError, match="gated pair"):
        gristmill.compile(
            model, tmp_path / "b", keep="f16:*.gate_proj", **OPTIONS | {"samples": 64, "sample_length": 512}
        )
    with pytest.raises(GristmillError, match="matches no weight matrix"):
        gristmill.compile(
            model, tmp_path / "b", keep="f16:*.gate_prod", **OPTIONS | {"samples": 64, "sample_length": 512}
        )


def _reference(model: Path, artifact: Path) -> np.ndarray:
    """transformers' logits with the weights that the artifact holds, whose narrow linears keep f32 rows."""
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    from gristmill.quant import pack, rtn
    from gristmill.quant.scheme import parse

    stored = load_file(artifact / "weights.safetensors")
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    schemes = manifest(artifact)["quantization"]["schemes"]
    for name, scheme in schemes.items():
        arrays = {k: stored[f"{name}.{k}"] for k in ("weight", "scale", "zero") if f"{name}.{k}" in stored}
        parameter = net.get_parameter(f"{name}.weight")
        k = parameter.shape[1]
        parsed = parse(scheme)
        values = (
            rtn.dequantize(pack.unpack(arrays, parsed, k), parsed) if "scale" in arrays else arrays["weight"]
        )
        parameter.data = torch.from_numpy(np.array(values, np.float32))
    with torch.no_grad():
        return net(torch.arange(2, 30)[None]).logits[0].numpy()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "gpt_neox", "gemma2", "qwen3"])
def test_scaling_channels_leaves_the_function_alone(family: str, tied: bool) -> None:
    config = config_of(family, tie_word_embeddings=tied)
    traced = fused(traced_of(random_model(config), config))
    samples = [t.tolist() for t in texts(24, 17)]
    before, sites = _logits(traced, samples), 0
    for node in traced.graph.find_nodes(op="call_function", target=ours.linear.default):
        site = scale_channels.find_site(traced, node)
        if site is None:
            continue
        sites += 1
        k = traced.weights[arguments(node)["weights"][0].name].shape[1]
        scales = 0.5 + torch.rand(k, generator=torch.Generator().manual_seed(sites))
        if site.tied is not None:
            scales = scales[site.tied]
        names = [w.name for n in site.consumers for w in arguments(n)["weights"]]
        scale_channels.apply(traced, dict(scale_channels._factors(traced, site, names, scales)))
    # norm → qkv, v → o, norm → gate and up, up → down, in each of two layers, and norm → head; a curved
    # activation allows none before the second of a plain pair, an embedding that is the head none there
    assert sites == {"gpt2": 7, "gpt_neox": 7}.get(family, 9) - tied
    after = _logits(traced, samples)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def _logits(traced: Any, samples: list[list[int]]) -> torch.Tensor:
    walk = Walk(traced, samples)
    while walk.node is not walk.result:
        walk.advance()
    weights = {
        n.name: traced.weights[n.name].load() for n in walk.node.all_input_nodes if n.name in traced.weights
    }
    return torch.cat([v[0] for v in walk._run(walk.node, weights)])


def test_a_walk_restored_at_a_boundary_is_the_same_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("llama")
    traced = fused(traced_of(random_model(config), config))
    monkeypatch.setattr(walking, "CHUNK_ROWS", 1)  # a chunk a sample, more than ten
    samples = [t.tolist() for t in texts(*range(9, 21))]
    walk, boundaries = Walk(traced, samples), 0
    while not walk.done:
        walk.advance(no_visit)
        if not walk.at_boundary:
            continue
        boundaries += 1
        other = Walk(traced, samples)
        other.restore(walk.at, dict(sorted(walk.state().items())))
        assert all(
            torch.equal(a, b)
            for n in walk.values
            for a, b in zip(walk.values[n], other.values[n], strict=True)
        )
    assert boundaries >= 4  # after the embedding and each half of two layers
    assert is_op(walk.steps[-1][0], ours.linear.default)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer((model / "tokenizer.json").read_bytes())


def test_samples_are_spread_over_the_text(tokenizer: Tokenizer, text: Path) -> None:
    found = calibration_set(str(text), tokenizer, 4, 32)
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False)
    prefix = len(tokenizer.prefix_ids)
    assert [len(s) for s in found.samples] == [32] * 4 and found.tokens == 128
    starts = [_find(ids, s[prefix:]) for s in found.samples]
    assert starts[0] == 0 and starts == sorted(starts) and starts[-1] > len(ids) / 2
    assert found.sha256 == calibration_set(str(text), tokenizer, 4, 32).sha256


def _find(ids: list[int], part: list[int]) -> int:
    return next(i for i in range(len(ids)) if ids[i : i + len(part)] == part)


def test_records_of_jsonl(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i} of many\n"}) + "\n" for i in range(50)))
    assert len(calibration_set(str(path), tokenizer, 3, 40).samples) == 3
    path.write_text('{"text": "a"}\n{"txt": 1}\n')
    with pytest.raises(GristmillError, match="record 2 has the fields txt"):
        calibration_set(str(path), tokenizer, 3, 40)
    path.write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(GristmillError, match="line 2 is not JSON"):
        calibration_set(str(path), tokenizer, 3, 40)


def test_the_default_text_suits_the_example_model(py7m: Path) -> None:
    code = calibration_set(None, Tokenizer((py7m / "tokenizer.json").read_bytes()), 2, 64)
    assert code.name.endswith("-code")


def test_the_default_text_is_pythons_own(tokenizer: Tokenizer) -> None:
    found = calibration_set(None, tokenizer, 3, 64)
    assert found.name.startswith("python-3.") and len(found.samples) == 3


@pytest.mark.parametrize(
    "given, message",
    [
        ({"method": "gptq", "calibration": "short.txt"}, "shorter than one sample of 48 tokens"),
        ({"method": "gptq", "calibration": "missing.txt"}, "missing.txt"),
        ({"method": "gptq", "calibration": "some/hub-name"}, "pip install datasets"),
        ({"method": "gptq", "weights": "f16", "group_size": None}, "needs integer weights"),
        ({"method": "gptq", "weights": "fp8"}, "needs integer weights, got weights fp8"),
        ({"method": "best"}, "expected one of rtn, rtn"),
        ({"samples": 3}, "is for calibrated methods"),
        ({"method": "awq", "damping": 0.1}, "is for method gptq"),
        ({"method": "gptq", "damping": 0.0}, "above 0"),
        ({"bits": 4.0, "size": "1MB"}, "leave out one"),
        ({"bits": 99.0}, "at most 32"),
        ({"size": "big"}, "expected a number of bytes"),
        ({"activations": "f16"}, "expected one of int8, f32"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("too short")
    options: dict[str, Any] = {"group_size": 32, "gate": False}
    if "samples" not in given:
        options["sample_length"] = 48
    if given.get("method", "rtn") == "rtn" and "samples" not in given:
        options.pop("sample_length")
        options |= (
            {"calibration": "short.txt", "sample_length": 48} if "bits" in given or "size" in given else {}
        )
    with pytest.raises(GristmillError, match=message) as raised:
        gristmill.compile(model, "out", **options | given)
    assert "\n" not in str(raised.value) and not Path("out").exists()


def test_weights_that_are_not_numbers_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(GristmillError, match=r"v_proj.* holds NaN"):
        gristmill.compile(tmp_path / "model", tmp_path / "out", method="gptq", calibration=text, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_dead_input_and_a_small_set_are_told(model: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][5] = 0
    save_file(tensors, file, {"format": "pt"})
    notes: list[str] = []
    options = OPTIONS | {"samples": 2}
    gristmill.compile(
        tmp_path / "model", tmp_path / "out", method="gptq", calibration=text, note=notes.append, **options
    )
    told = "\n".join(notes)
    assert "1 inputs of model.layers.0.mlp.down_proj were 0" in told
    assert "few for linears of 96 inputs" in told and "GiB of memory at the peak" in told


def test_float_activations_are_an_option(model: Path, tmp_path: Path) -> None:
    gristmill.compile(model, tmp_path / "a", activations="f32", gate=False, group_size=32)
    program = json.loads((tmp_path / "a" / "program.json").read_text())
    assert {i["act_group"] for i in program["instructions"] if i["op"] == "linear"} == {0}


def test_schemes_are_normal_in_records(model: Path, text: Path, tmp_path: Path) -> None:
    gristmill.compile(model, tmp_path / "a", method="gptq", calibration=text, **OPTIONS | {"group_size": 128})
    schemes = {r["scheme"] for r in manifest(tmp_path / "a")["quantization"]["matrices"].values()}
    assert schemes == {str(Scheme("int4", 0)), "int8"}
