"""Caches of exports to ONNX: int8 in standard operators, and f16 beside products and attention in f16."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from programs import Array, Format, Llama, llama
from test_executor import assert_close, tokens_for
from test_onnx_export import CHUNKS, PROMPT, by_genai, executor_of, of_slot, relative
from test_program_module import in_chunks as of_module
from test_program_module import module, of_executor

import gristmill
from gristmill.export import onnx_folder
from gristmill.export.onnx_cache import hadamard, rounded, values
from gristmill.export.onnx_folder import OnnxOptions
from gristmill.export.onnx_graph import Graph, WeightFile
from gristmill.kernels.reference import cache as reference
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.onnx import executor as executor_module
from gristmill.runtime.onnx import providers
from gristmill.runtime.onnx.executor import SharedBuffers
from gristmill.runtime.program import CacheSpec

FLOAT_TOLERANCE = 2e-5  # of the largest logit: f32 against f32
ROUNDED_TOLERANCE = 1e-2  # where a number of a cache rounds the other way
HALF_TOLERANCE = 4e-3  # f16 products and attention through two layers
INT8 = {
    "both": Llama(cache="int8"),
    "keys, turned": Llama(cache="int8", cache_v="f32", k_dim=48, v_dim=16, hadamard=16, qk_norm=True),
    "values, window": Llama(cache="f32", cache_v="int8", window=7, sinks=True),
}
HEADS: dict[str, Any] = {"k_dim": 32, "v_dim": 32, "rope_dims": 32}
HALF = {
    "f16": Llama(**HEADS, form=Format("f16"), embedding=Format("f16"), softcap=3.0, bias=True),
    "int4": Llama(
        **HEADS, form=Format("int4", 32, False), embedding=Format("int4", 32), sinks=True, window=7
    ),
    "int8_row": Llama(**HEADS, form=Format("int8"), embedding=Format("int8"), qk_norm=True),
    "int2": Llama(**HEADS, form=Format("int2", 32), hidden=136, order=True),
    "int3_wide": Llama(k_dim=24, v_dim=24, rope_dims=8, form=Format("int3", 32, True, "float32")),
    "bf16": Llama(**HEADS, form=Format("bf16"), activation="gelu_tanh", rope_style="interleaved"),
    "fp8": Llama(**HEADS, form=Format("fp8", 64)),
}  # fmt: skip


def evaluated(folder: Path, shapes: dict[str, Array], build: Any) -> list[Array]:
    """What `build` of a graph and its inputs makes of these arrays."""
    weights = WeightFile(folder / "w.data")
    graph = Graph(weights, 21)
    kinds = {np.dtype(np.float32): onnx.TensorProto.FLOAT}
    names = [graph.input(name, kinds[array.dtype], array.shape) for name, array in shapes.items()]
    for number, name in enumerate(build(graph, *names)):
        graph.op("Identity", name, outputs=[f"out_{number}"])
        graph.outputs.append(onnx.helper.make_empty_tensor_value_info(f"out_{number}"))
    weights.close()
    onnx.save_model(graph.model("g", "0"), folder / "g.onnx")
    session = onnxruntime.InferenceSession(str(folder / "g.onnx"), providers=["CPUExecutionProvider"])
    return list(session.run(None, shapes))


def test_int8_rows_are_the_references(tmp_path: Path) -> None:
    """Odd scales and constant rows among them."""
    random = np.random.default_rng(3)
    x = random.standard_normal((2, 3, 5, 40)).astype(np.float32) * 10.0 ** random.integers(
        -30, 30, (2, 3, 5, 1)
    )
    x = x.astype(np.float32)
    x[0, 0, 0], x[0, 0, 1], x[1, 2, 4, 7] = 0.0, -2.5, 1e30

    def build(g: Graph, x: str) -> list[str]:
        q, step, offset = rounded(g, x)
        return [q, values(g, q, step, offset)]

    q, got = evaluated(tmp_path, {"x": x}, build)
    want = reference.rounded(torch.from_numpy(x), "int8").numpy()
    assert q.dtype == np.uint8 and q.min() == 0 and q.max() == 255
    largest = np.abs(x).max(-1, keepdims=True)
    assert (np.abs(got - want) <= 2e-7 * np.maximum(largest, 1e-37)).all()


def test_a_hadamard_transform_is_the_references(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((1, 2, 3, 48)).astype(np.float32)
    (got,) = evaluated(tmp_path, {"x": x}, lambda g, x: [hadamard(g, x, 16)])
    np.testing.assert_allclose(got, reference.hadamard(torch.from_numpy(x), 16).numpy(), atol=1e-6)


@pytest.mark.parametrize("case", INT8)
def test_plain_graphs_with_int8_caches_equal_the_module(case: str, tmp_path: Path) -> None:
    built = llama(INT8[case])
    tokens = tokens_for(built, sum(CHUNKS))
    executor = executor_of(built, tmp_path, plain=True, caches="")
    want = of_module(module(built, tmp_path), tokens, CHUNKS)
    got = of_executor(executor, tokens, CHUNKS)
    assert_close(got, want, ROUNDED_TOLERANCE)
    exact = of_module(module(built, tmp_path, exact=True), tokens, CHUNKS)
    off, rounding = (np.median(np.abs(logits - want)) for logits in (got, exact))
    assert off < rounding / 4


@pytest.mark.parametrize("case", HALF)
def test_graphs_in_half_precision_equal_the_module(case: str, tmp_path: Path) -> None:
    built = llama(HALF[case])
    tokens = tokens_for(built, sum(CHUNKS))
    executor = executor_of(built, tmp_path, plain=False, caches="f16")
    want = of_module(module(built, tmp_path, exact=True), tokens, CHUNKS)
    got = of_executor(executor, tokens, CHUNKS)
    assert_close(got, want, HALF_TOLERANCE)
    assert np.abs(got - want).max() > FLOAT_TOLERANCE * np.abs(want).max(), "it is f16"


# ---- compiled models


@pytest.fixture(scope="module")
def plain(py7m_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int4 weights times floats, and the artifact's int8 cache."""
    out = tmp_path_factory.mktemp("plain") / "o"
    return gristmill.export_checkpoint(py7m_int4, out, "onnx", plain=True)


@pytest.fixture(scope="module")
def half(py7m_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "o"
    return gristmill.export_checkpoint(py7m_int4, out, "onnx", kv="f32", activations="f16")


def test_a_session_keeps_its_cache_in_int8(plain: Path, py7m_int4: Path) -> None:
    ours, theirs = gristmill.load(py7m_int4, threads=1), gristmill.load(plain, "onnx:cpu", threads=1)
    dims = sum(c.kv_heads * (c.k_dim + c.v_dim + 16) for c in theirs.program.caches)
    assert theirs.memory["kv_bytes"] == dims * theirs.max_len * theirs.max_slots
    ids = ours.tokenizer.encode(PROMPT)
    want, got = (s.forward(ids, range(len(ids)), [0] * len(ids)) for s in (ours, theirs))
    assert relative(got, want) < 3e-2, "the artifact rounds activations as well"
    tokens = np.array(ids, np.int32)
    np.testing.assert_allclose(
        of_slot(theirs, tokens, 3, len(ids), slot=0), got[3:], atol=1e-3
    )  # rolled back
    beams = theirs.beam_search(PROMPT, num_beams=2, max_new_tokens=4)  # which copies slots
    assert len(beams[0].token_ids) == 4
    assert not (plain / "genai_config.json").exists(), "GenAI has no steps and offsets"


def test_half_precision_behind_a_session_and_in_genai(half: Path, py7m_int4: Path) -> None:
    from gristmill.export.program_module import module_of

    session = gristmill.load(half, "onnx:cpu", threads=1)
    ids = session.tokenizer.encode(PROMPT)
    got = session.forward(ids, range(len(ids)), [0] * len(ids))
    want = of_module(module_of(py7m_int4, exact=True), np.array(ids, np.int32), [len(ids)])
    assert 1e-5 < relative(got, want) < 5e-3
    graph = onnx.load(str(half / "rows.onnx"), load_external_data=False).graph
    kinds = {i.name: i.type.tensor_type.elem_type for i in [*graph.input, *graph.output]}
    assert {kinds["past_key_values.0.key"], kinds["present.0.value"]} == {onnx.TensorProto.FLOAT16}
    assert kinds["logits"] == onnx.TensorProto.FLOAT
    og = pytest.importorskip("onnxruntime_genai")
    text = session.generate(ids, max_new_tokens=8, ignore_eos=True).token_ids
    assert by_genai(og.Model(str(half)), ids, 8) == text


# ---- CUDA, as far as a machine without it goes


def test_cuda_without_the_provider_is_refused(half: Path) -> None:
    if providers.CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(
        GristmillError, match="CUDAExecutionProvider.*lacks; install onnxruntime-gpu"
    ) as caught:
        gristmill.load(half, "onnx:cuda")
    assert "\n" not in str(caught.value)


def test_cuda_takes_folders_in_half_precision(
    half: Path, plain: Path, py7m_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An onnxruntime that has CUDA and finds no device goes on with the CPU, which we do not."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [providers.CUDA, providers.CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    wide = gristmill.export_checkpoint(py7m_int4, tmp_path / "o", "onnx", kv="f32")
    with pytest.raises(GristmillError, match="attention computes in f32, .* --activations f16 .*--plain"):
        gristmill.load(wide, "onnx:cuda")
    for folder in (half, plain):
        with warnings.catch_warnings(), pytest.raises(GristmillError, match="found no CUDA device"):
            warnings.simplefilter("ignore")
            gristmill.load(folder, "onnx:cuda")


def test_buffers_of_a_device_are_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA does, with memory of the CPU in its place."""
    built = llama(HALF["int4"])
    executor, tokens = executor_of(built, tmp_path, plain=False, caches="f16"), tokens_for(built, 12)
    want = of_slot(executor, tokens, 0, 12, slot=0)
    session = executor._histories._session  # type: ignore[attr-defined]
    monkeypatch.setattr(
        executor_module, "_on", lambda place, array: onnxruntime.OrtValue.ortvalue_from_numpy(array, "cpu")
    )
    executor._histories = SharedBuffers(session, executor.program.caches, executor.max_len, "cuda")
    of_slot(executor, tokens, 0, 8, slot=1)
    executor.copy_slot(1, 0, 5)
    assert_close(of_slot(executor, tokens, 5, 12, slot=0), want[5:], FLOAT_TOLERANCE)


@pytest.mark.parametrize(
    "kv, how, message",
    [
        ("int8", {}, "KV cache is int8 .* --kv f32 .* or with --plain, which has int8"),
        ("int4", {"plain": True}, "KV cache is int4 .* --kv f32 .*rounds nothing$"),
        ("fp8", {}, "KV cache is fp8 .* --kv f32 .*rounds nothing$"),
        ("f32", {"plain": True, "activations": "f16"}, "activations f16 .* leave out --plain"),
    ],
)
def test_what_is_refused(kv: str, how: dict[str, Any], message: str) -> None:
    options = OnnxOptions(**how)
    with pytest.raises(GristmillError, match=message):
        onnx_folder._refuse_choices(options)
        onnx_folder.caches([CacheSpec(1, 8, 8, kv, kv)], options)


def test_what_caches_become() -> None:
    given = [CacheSpec(1, 8, 8, "int8", "f16")]
    cases: list[tuple[dict[str, Any], tuple[str, str]]] = [
        ({"plain": True}, ("int8", "f32")),
        ({"plain": True, "kv": "f32"}, ("f32", "f32")),
        ({"kv": "f32"}, ("f32", "f32")),
        ({"kv": "f32", "activations": "f16"}, ("f16", "f16")),
    ]
    for how, want in cases:
        (found,) = onnx_folder.caches(given, OnnxOptions(**how))
        assert (found.k_dtype, found.v_dtype) == want
