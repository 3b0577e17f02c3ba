"""docs/targets.md, cell by cell: what it says is done, or refused in its words."""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import target_cases as cases
import torch
from adapters import save_adapter
from conftest import ROOT
from onnx import TensorProto
from test_executor import tokens_for
from test_program_module import in_chunks

import gristmill
from gristmill.export import pt2_folder, support
from gristmill.export.program_module import module_of
from gristmill.export.support import ACTIVATIONS, CACHES, RUNS, SHAPES, TARGETS, WEIGHTS, Target
from gristmill.runtime.bench import BenchOptions, bench
from gristmill.runtime.devices import DEVICES
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.profile import CpuProbe
from gristmill.runtime.session import Session

TOLERANCE = 2e-5  # of the largest logit: f32
HALF_TOLERANCE = 4e-3
ROUNDED_TOLERANCE = 3e-2  # activations or cache rows that round the other way
CELLS = {target.name: target.cells() for target in TARGETS}
ON_DEVICES = [t for t in TARGETS if t.device is not None and t.name != "cuda"]
WRITTEN = [t for t in TARGETS if t.device is None]
ROUNDED = ("act_int8", "kv_f16", "kv_int8", "kv_fp8", "kv_int4")  # features that are a rounding
KINDS = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "int8": TensorProto.UINT8}
LENGTH, CHUNKS = 14, [9, 1, 4]
# What holds each cell of CUDA, in Triton's interpreter.
CUDA_TESTS = {
    "batch": "test_cuda_executor.py::test_bits_depend_on_the_bucket_not_on_company_or_padding",
    "chunks": "test_cuda_executor.py::test_chunks_equal_the_whole_within_rounding",
    "speculation": "test_cuda_drawing.py::test_speculated_rows_are_drawn_as_one_by_one",
    "copies": "test_cuda_executor.py::test_a_copied_slot_goes_on_as_its_source",
    "hidden": "test_cuda_executor.py::test_hidden_states_are_what_the_head_multiplies",
    "alike": "test_cuda_executor.py::test_bits_depend_on_the_bucket_not_on_company_or_padding",
    "bench": "test_cuda_bench.py::test_a_round_is_measured",
    "profile": "test_cuda_bench.py::test_kinds_are_timed_alone_beside_their_roofs",
    "ranks": "test_parallel_cuda.py::test_ranks_compute_what_one_device_does",
    "tune": "test_cuda_tuning.py::test_winners_are_kept_and_planned_with",
    **dict.fromkeys(WEIGHTS, "kernels/test_triton_linear.py::test_products_are_exact_but_for_rounding"),
    "asymmetric": "kernels/test_triton_linear.py::test_every_group_of_integers",
    "order": "test_cuda_executor.py::test_equals_the_interpreter_of_programs",
    "act_int8": "kernels/test_triton_linear.py::test_products_of_integers",
    "act_float": "kernels/test_triton_linear.py::test_products_are_exact_but_for_rounding",
    **dict.fromkeys(CACHES, "kernels/test_triton_attention.py::test_every_cache_type"),
    "window": "kernels/test_triton_attention.py::test_windows_in_rings",
    "sinks": "test_cuda_executor.py::test_equals_the_interpreter_of_programs",
    "heads": "kernels/test_triton_attention.py::test_shapes_of_heads",
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of pt2 take a minute each: here they are the torch modules before that."""
    monkeypatch.setattr(pt2_folder, "write_package", cases.write_uncompiled)
    monkeypatch.setattr("gristmill.runtime.pt2.executor._runners", cases.uncompiled_runners)


def pairs(targets: list[Target], features: Any) -> list[Any]:
    return [pytest.param(t, f, id=f"{t.name}-{f}") for t, f in itertools.product(targets, features)]


def refused(target: Target, feature: str, act: Callable[[], object]) -> bool:
    """Whether the cell says no; then `act` was refused in its words, and in one line."""
    cell = CELLS[target.name][feature]
    if cell.mark != "no":
        return False
    with pytest.raises(GristmillError, match=re.escape(cell.note)) as caught:
        act()
    assert "\n" not in str(caught.value)
    return True


def test_the_file_is_what_the_code_generates() -> None:
    """python -m gristmill.export.support > docs/targets.md"""
    assert (ROOT / "docs" / "targets.md").read_text() == support.table().rstrip("\n") + "\n"


def test_every_cell_is_filled() -> None:
    features = [feature for group in support.GROUPS.values() for feature in group]
    assert len({*features}) == len(features)
    for name, cells in CELLS.items():
        assert set(cells) == set(features), name
        assert {cell.mark for cell in cells.values()} <= {"yes", "as", "no", "-"}
    assert {t.device.name for t in TARGETS if t.device} == set(DEVICES)


@pytest.mark.parametrize("feature", [f for f, cell in CELLS["cuda"].items() if cell.mark != "no"])
def test_cells_of_cuda_have_their_tests(feature: str) -> None:
    file, _, name = CUDA_TESTS[feature].partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.M), CUDA_TESTS[feature]


# ---- sessions


@pytest.mark.parametrize("feature", ["threads", "pages", "adapters"])
def test_options_that_cuda_refuses(feature: str) -> None:
    options = {
        "threads": {"threads": 1}, "pages": {"pin": True}, "adapters": {"adapters": {"a": "b"}},
    }  # fmt: skip
    how: Any = options[feature]
    target = next(t for t in TARGETS if t.name == "cuda")
    assert refused(target, feature, lambda: gristmill.load(cases.artifact("f32"), "cuda", **how))


@pytest.mark.parametrize("target, feature", pairs(ON_DEVICES, RUNS))
def test_sessions(target: Target, feature: str) -> None:
    RUN_TESTS[feature](target, cases.session(target, "f32"))


def _batch(target: Target, session: Session) -> None:
    """Rows of three slots in one forward, in any order."""
    texts = [tokens_for(cases.program("f32"), 4, seed) for seed in range(3)]
    want = np.concatenate([cases.logits(session, text, 3, [4]) for text in texts])
    order = np.random.default_rng(0).permutation(12)
    slots, positions = order // 4, order % 4
    got = session.forward(np.concatenate(texts)[order], positions, slots)
    for slot in range(3):
        session.reset(slot)
    close(got, want[order], tolerance(target))


def _chunks(target: Target, session: Session) -> None:
    tokens = tokens_for(cases.program("f32"), LENGTH)
    whole, parts = (cases.logits(session, tokens, 0, sizes) for sizes in ([LENGTH], CHUNKS))
    close(parts, whole, tolerance(target))


def _speculation(target: Target, session: Session) -> None:
    how: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
    plain = session.generate([5, 6, 5, 6, 5], lookup=False, **how).token_ids
    before = session.statistics.drafted
    assert session.generate([5, 6, 5, 6, 5], lookup=True, **how).token_ids == plain
    draft = cases.exported(target, "f32")
    pair = gristmill.load(draft, cases.runs_on(target), threads=1, max_slots=2, draft=draft)
    assert pair.generate([5, 6, 5, 6, 5], **how).token_ids == plain
    assert session.statistics.drafted > before and pair.statistics.accepted > 0


def _copies(target: Target, session: Session) -> None:
    tokens = tokens_for(cases.program("f32"), LENGTH)
    want = cases.logits(session, tokens, 0, [LENGTH])
    session.forward(tokens, range(LENGTH), [0] * LENGTH)
    session.executor.copy_slot(0, 1, 6)
    rows = np.arange(6, LENGTH, dtype=np.int32)
    ones, all_rows = np.ones_like(rows), np.arange(len(rows), dtype=np.int32)
    got = session.executor.forward(tokens[6:], rows, ones, all_rows)
    session.reset(0)
    close(got, want[6:], tolerance(target))
    assert len(session.beam_search([5, 6], num_beams=2, max_new_tokens=3)[0].token_ids) == 3


def _hidden(target: Target, session: Session) -> None:
    """The head makes the logits of them."""
    tokens = tokens_for(cases.program("f32"), LENGTH)
    logits, hidden = session.forward_hidden(tokens, range(LENGTH), [0] * LENGTH)
    session.reset(0)
    close(hidden @ cases.program("f32").matrices["head"].T, logits, tolerance(target))


def _alike(target: Target, session: Session) -> None:
    exact = CELLS[target.name]["alike"].mark == "yes"
    assert getattr(session.executor, "rows_agree", True) == exact
    tokens = tokens_for(cases.program("f32"), LENGTH)
    whole, alone = (cases.logits(session, tokens, 0, sizes) for sizes in ([LENGTH], [1] * LENGTH))
    close(alone, whole, 0.0 if exact else tolerance(target))


def _adapters(target: Target, session: Session) -> None:
    """One that adds twice a hidden state's third column to every logit."""
    segment = session.program.weights["head"][0]
    name = "base_model.model.lm_head"
    a, b = torch.zeros(1, segment.k), torch.ones(segment.n, 1)
    tokens = tokens_for(cases.program("f32"), LENGTH)
    logits, hidden = session.forward_hidden(tokens, range(LENGTH), [0] * LENGTH)
    a[0, 3] = 1
    with tempfile.TemporaryDirectory() as folder:
        tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        save_adapter(Path(folder), tensors, r=1, lora_alpha=2)
        if refused(target, "adapters", lambda: session.load_adapter("a", folder)):
            return
        session.load_adapter("a", folder)
    session.reset(0, "a")
    got = session.forward(tokens, range(LENGTH), [0] * LENGTH)
    session.reset(0)
    session.unload_adapter("a")
    close(got, logits + 2 * hidden[:, 3:4], tolerance(target))


def _bench(target: Target, session: Session) -> None:
    del session
    device = target.device
    assert device is not None
    options = BenchOptions(prompt=4, tokens=2, rounds=1, threads=1, device=device.name)

    def measured() -> dict[str, Any]:
        return bench(cases.exported(target, "f32"), options)

    with pytest.MonkeyPatch.context() as patch:  # which takes longest
        patch.setattr(CpuProbe, "read_stream", lambda probe: 10.0)
        assert refused(target, "bench", measured) or measured()["decode_tok_s"] > 0


def _profile(target: Target, session: Session) -> None:
    device = target.device
    assert device is not None
    options = BenchOptions(prompt=4, tokens=2, rounds=1, profile=True, device=device.name)
    if not refused(target, "profile", lambda: bench("nowhere", options)):
        executor: Any = session.executor
        executor.profile(True)
        cases.logits(session, tokens_for(cases.program("f32"), 4), 0, [4])
        assert len(executor.profile_results()) == len(session.program.instructions)
        executor.profile(False)


def _tune(target: Target, session: Session) -> None:
    assert refused(target, "tune", lambda: next(session.tune()))


def _threads(target: Target, session: Session) -> None:
    del session
    assert CELLS[target.name]["threads"].mark == "yes"
    assert gristmill.load(cases.exported(target, "f32"), cases.runs_on(target), threads=2).threads == 2
    gristmill.load(cases.exported(target, "f32"), cases.runs_on(target), threads=1)  # torch's, for all


def _pages(target: Target, session: Session) -> None:
    device = target.device
    assert device is not None

    def opened() -> Session:
        return gristmill.load(cases.exported(target, "f32"), device.name, hugepages=True, pin=True)

    if not refused(target, "pages", opened):
        tokens = tokens_for(cases.program("f32"), 4)
        assert (cases.logits(opened(), tokens, 0, [4]) == cases.logits(session, tokens, 0, [4])).all()


def _ranks(target: Target, session: Session) -> None:
    device = target.device
    assert device is not None

    def opened() -> Session:
        return gristmill.load(cases.exported(target, "f32"), device.name, tensor_parallel=2)

    def compared() -> None:
        tokens, ranks = tokens_for(cases.program("f32"), 4), opened()
        close(cases.logits(ranks, tokens, 0, [4]), cases.logits(session, tokens, 0, [4]), TOLERANCE)
        ranks.close()

    refused(target, "ranks", compared)


RUN_TESTS: dict[str, Callable[[Target, Session], None]] = {
    "batch": _batch, "chunks": _chunks, "speculation": _speculation, "copies": _copies, "hidden": _hidden,
    "alike": _alike, "bench": _bench, "profile": _profile, "tune": _tune, "threads": _threads,
    "pages": _pages, "ranks": _ranks, "adapters": _adapters,
}  # fmt: skip


def tolerance(target: Target) -> float:
    return HALF_TOLERANCE if target.options.get("activations") == "f16" else TOLERANCE


def close(got: Any, want: Any, bound: float) -> None:
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error <= bound, f"off by {error:.1e} of the largest, expected at most {bound:.0e}"


# ---- formats


@pytest.mark.parametrize("target, feature", pairs(ON_DEVICES, [*WEIGHTS, *ACTIVATIONS, *CACHES, *SHAPES]))
def test_what_devices_run(target: Target, feature: str) -> None:
    """Logits are those of the torch module, which rounds where the target does."""
    if refused(target, feature, lambda: cases.exported(target, feature)):
        return
    note = CELLS[target.name][feature].note
    rounds = feature in ROUNDED and (not note or note.startswith("rounded so"))
    tokens = tokens_for(cases.program(feature), LENGTH)
    modules = [module_of(cases.artifact(feature), exact=exact) for exact in (not rounds, True)]
    want, exact = (in_chunks(module, tokens, CHUNKS) for module in modules)
    got = cases.logits(cases.session(target, feature), tokens, 0, CHUNKS)
    close(got, want, ROUNDED_TOLERANCE if rounds else tolerance(target))
    assert not rounds or np.abs(got - exact).max() > TOLERANCE * np.abs(exact).max(), "it rounds"
    if target.to == "onnx":
        _as_the_graph_says(target, feature, note)


def _as_the_graph_says(target: Target, feature: str, note: str) -> None:
    graph = onnx.load(str(cases.exported(target, feature) / "rows.onnx"), load_external_data=False).graph
    products = [{a.name: a.i for a in n.attribute} for n in graph.node if n.op_type == "MatMulNBits"]
    kinds = {i.name: i.data_type for i in graph.initializer}
    if feature in CACHES:
        types = {i.name: i.type.tensor_type.elem_type for i in graph.input}
        dtype = note.removeprefix("in ") or CACHES[feature]
        assert types["past_key_values.0.key"] == KINDS[dtype]
    elif note.endswith(" bits"):
        four = {TensorProto.INT4, TensorProto.UINT4} & {*kinds.values()}
        assert ({p["bits"] for p in products} or {4 for _ in four}) == {int(note.split()[1])}
    elif feature == "act_int8":
        levels = {p.get("accuracy_level") for p in products}
        assert levels == {"": {4}, "in f16": {None}, "by floats": set()}[note]
    elif target.options.get("activations") == "f16" and feature in WEIGHTS:
        halves = [name for name, kind in kinds.items() if kind == TensorProto.FLOAT16 and "layers" in name]
        assert bool(halves) == (note != "multiplied in f32")


@pytest.mark.parametrize("target, feature", pairs(WRITTEN, [*WEIGHTS, *SHAPES]))
def test_what_is_written_for_other_programs(target: Target, feature: str) -> None:
    cell = CELLS[target.name][feature]
    if cell.mark == "-" or refused(target, feature, lambda: cases.exported(target, feature)):
        return
    if target.to == "gguf":
        _gguf(target, feature, cell.note)
        return
    assert cases.settings(cases.exported(target, feature))["quant_method"] == target.name
    read, stored = cases.read_back(cases.exported(target, feature)), cases.stored(feature)
    np.testing.assert_allclose(read, stored, rtol=1e-6, err_msg="rounds nothing again")


def _gguf(target: Target, feature: str, note: str) -> None:
    gguf = pytest.importorskip("gguf")
    told: list[str] = []
    reader = gguf.GGUFReader(cases.written(target, feature, {"note": told.append}))
    kind = {t.name: t.tensor_type.name.lower() for t in reader.tensors}["blk.0.attn_q.weight"]
    if feature == "window":
        assert reader.fields["llama.context_length"].contents() == 7
    else:
        assert kind in re.split(", | or ", note or feature)
        assert any("rounded anew" in line for line in told) == ("rounded anew" in note)
