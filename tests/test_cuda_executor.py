"""The CUDA executor on CPU tensors, by Triton's interpreter, against the numpy interpreter and itself.

TRITON_INTERPRET=0 runs the same on a device, its graphs included.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from interpreter import Reference
from programs import Format, llama
from tiny import tiny_artifact

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from cuda_cases import (  # noqa: F401  (the fixture is for all)
    CASES,
    FEW_TOLERANCE,
    MANY_TOLERANCE,
    a_small_gpu,
    assert_close,
    in_chunks,
    ints,
    make,
    run,
    tokens_for,
)
from triton_device import DEVICE

import gristmill
from gristmill.runtime import cuda
from gristmill.runtime.cpu import _native
from gristmill.runtime.cuda import device as cuda_device
from gristmill.runtime.cuda import drawing as cuda_drawing
from gristmill.runtime.cuda import executor as cuda_executor
from gristmill.runtime.cuda import products as cuda_products
from gristmill.runtime.cuda import weights as cuda_weights
from gristmill.runtime.cuda.graphs import MOST_CACHED
from gristmill.runtime.cuda.residuals import added_in_place
from gristmill.runtime.decoding.contrastive import generate_contrastive
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import NO_HIDDEN_STATES, Program, View
from gristmill.runtime.session import Session


@pytest.mark.parametrize("case", CASES)
def test_equals_the_interpreter_of_programs(case: str, tmp_path: Path) -> None:
    """Prefill in chunks, one padded, and decode; the window is passed."""
    program, config = llama(CASES[case]), CASES[case]
    tokens, sizes = tokens_for(program, 9), [5, 3, 1]
    few = max(FEW_TOLERANCE[cache] for cache in (config.cache, config.cache_v or config.cache))
    got = in_chunks(make(program, tmp_path), tokens, sizes)
    assert_close(
        got, in_chunks(Reference(program), tokens, sizes), few if case == "f32" else max(few, MANY_TOLERANCE)
    )


@pytest.mark.parametrize("case,norms", [("int8_two_layers", 3), ("f32", 1), ("window_order", 0)])
def test_products_hand_over_to_the_next(
    case: str, norms: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every norm but the first and the last, and what the down projection multiplies, as a kernel would."""
    program = llama(CASES[case])
    tokens, executor = tokens_for(program, 6), make(program, tmp_path)
    products = executor._launcher.products
    assert sum(rows == 1 for _, rows in products.dissolved) == norms
    got = in_chunks(executor, tokens, [3, 2, 1])
    assert in_chunks(executor, tokens, [3, 2, 1], slot=1).tobytes() == got.tobytes()
    monkeypatch.setenv("GRISTMILL_HANDOVER", "0")
    apart = make(program, tmp_path)
    assert not apart._launcher.products.dissolved and not apart._launcher.products.handovers
    assert_close(got, in_chunks(apart, tokens, [3, 2, 1]), 2e-5 if case == "f32" else 2e-3)
    assert products.counters.eq(0).all() and (case == "window_order" or products.handovers)


def test_hidden_states_are_what_the_head_multiplies(tmp_path: Path) -> None:
    program = llama(CASES["f32"])
    tokens, zeros = tokens_for(program, 4), ints([0] * 4)
    batch = (tokens, ints(range(4)), zeros, ints([3, 0, 3]))
    executor = make(program, tmp_path)
    logits, hidden = executor.forward_hidden(*batch)
    wanted_logits, wanted = Reference(program).forward_hidden(*batch)
    assert_close(logits, wanted_logits, FEW_TOLERANCE["f32"])
    assert_close(hidden, wanted, FEW_TOLERANCE["f32"])
    executor.forward(*batch[:3], zeros)
    assert_close(hidden, wanted, FEW_TOLERANCE["f32"])  # a copy: the next batch does not change it
    program.add("gather_rows", **{"in": [0, 0, 64], "out": program.value(64, "R")})
    with pytest.raises(GristmillError, match=NO_HIDDEN_STATES):
        make(program, tmp_path).forward_hidden(*batch)


DENSE = dataclasses.replace(CASES["f32"], form=Format("bf16"))  # multiplied by cuBLAS from 5 rows on


def written(executor: cuda_executor.CudaExecutor, tokens: Any) -> list[bool]:
    """Of each value, whether a batch of these tokens writes it in f32."""
    executor._values.arena.fill_(-7.0)
    run(executor, tokens)
    values = executor._program.values
    views = [executor._values.view(View(n, 0, value.width), len(tokens)) for n, value in enumerate(values)]
    return [bool((view != -7).any()) for view in views]


def test_what_cublas_alone_reads_is_written_in_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bits that a copy of the f32 values would have."""
    monkeypatch.setenv("GRISTMILL_HANDOVER", "0")
    program = llama(DENSE)
    tokens = tokens_for(program, 7)
    executor = make(program, tmp_path)
    at_once = run(executor, tokens)
    assert_close(at_once, in_chunks(Reference(program), tokens, [7]), MANY_TOLERANCE)
    # x, norm, qkv, attended, o, norm, inner; the head's two are its own
    assert written(executor, tokens) == [True, False, True, False, True, False, False, True, True]
    assert all(written(executor, tokens[:4])), "up to four rows are not rounded"
    monkeypatch.setattr(cuda_products.Products, "_values_kept", lambda products: set(range(9)))
    apart = make(program, tmp_path)
    assert run(apart, tokens).tobytes() == at_once.tobytes()
    assert all(written(apart, tokens))


class Exchanged:
    """Value 1 is taken after the instruction that writes it."""

    def values(self, index: int) -> list[int]:
        return [1] if index == 1 else []

    def run(self, index: int, whole: object) -> None:
        pass


def test_what_others_read_stays_in_f32(tmp_path: Path) -> None:
    """A second reader, other ranks, whoever asks for hidden states."""
    program, tokens = llama(DENSE), tokens_for(llama(DENSE), 7)
    batch = (tokens, ints(range(7)), ints([0] * 7), ints(range(7)))
    hidden = make(program, tmp_path).forward_hidden(*batch)[1]
    assert_close(hidden, Reference(program).forward_hidden(*batch)[1], MANY_TOLERANCE)
    weights, whole = program.write(tmp_path), Program.from_json(program.json)
    shared = cuda_executor.CudaExecutor(whole, [weights], DEVICE, 64, 3, Exchanged())
    assert written(shared, tokens)[1]
    other = program.value(64)
    program.json["instructions"].insert(2, {"op": "rms_norm", "in": [1, 0, 64], "eps": 1e-5, "out": other})
    assert written(make(program, tmp_path), tokens)[1]


def test_contrastive_search_says_what_it_says_on_the_cpu(tmp_path: Path) -> None:
    """The prompt in two chunks, the candidates in one bucket, rows copied between slots."""
    made = llama(CASES["f32"])
    program, weights = Program.from_json(made.json), str(made.write(tmp_path))
    native = _native.Executor(made.text(), weights, threads=1, max_len=64, max_slots=3)
    texts = [
        generate_contrastive(Session(None, program, executor), list(range(2, 12)), 4, 0.6, 3).token_ids
        for executor in (make(made, tmp_path), cast(Any, native))
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 4


def test_up_to_four_rows_lose_nothing_of_their_activations(tmp_path: Path) -> None:
    program = llama(dataclasses.replace(CASES["int4_int8"], cache="f32"))
    tokens = tokens_for(program, 6)
    expected = in_chunks(Reference(program), tokens, [6])
    assert_close(in_chunks(make(program, tmp_path), tokens, [3, 2, 1]), expected, FEW_TOLERANCE["f32"])


def test_chunks_equal_the_whole_within_rounding(tmp_path: Path) -> None:
    program = llama(CASES["int4_int8"])
    tokens = tokens_for(program, 7)
    executor = make(program, tmp_path)
    assert_close(in_chunks(executor, tokens, [2, 5]), in_chunks(executor, tokens, [7], 1), MANY_TOLERANCE)


@pytest.mark.usefixtures("rows_by_themselves")
def test_bits_depend_on_the_bucket_not_on_company_or_padding(tmp_path: Path) -> None:
    """A row beside others of its slot, beside other slots, and beside padding: bucket 4 throughout."""
    program = llama(dataclasses.replace(CASES["window_order"], cache="int8"))
    executor = make(program, tmp_path)
    tokens, other = tokens_for(program, 4), tokens_for(program, 4, seed=2)
    whole = run(executor, tokens)  # 4 rows of a slot
    padded = run(executor, tokens[:3], slot=1)  # and one of padding
    assert padded.tobytes() == whole[:3].tobytes()
    mixed = executor.forward(
        ints([other[0], tokens[3], other[1], tokens[0]]), ints([0, 3, 1, 0]), ints([2, 1, 2, 0]),
        ints([1, 0, 2, 3]),
    )  # fmt: skip
    assert mixed[0].tobytes() == whole[3].tobytes() and mixed[3].tobytes() == whole[0].tobytes()
    run(executor, other[2:3], 2, 2)
    alone = executor.forward(
        ints([tokens[3], other[3], other[0]]), ints([3, 3, 0]), ints([1, 2, 0]), ints([0, 1, 2])
    )  # one row of each slot, the other way through attention
    assert alone[0].tobytes() == whole[3].tobytes()


def test_a_copied_slot_goes_on_as_its_source(tmp_path: Path) -> None:
    program = llama(CASES["f16_mixed_cache"])
    executor = make(program, tmp_path)
    tokens = tokens_for(program, 5)
    run(executor, tokens[:4])
    executor.copy_slot(0, 2, 4)
    want = run(executor, tokens[4:], 4, 0).tobytes()
    assert run(executor, tokens[4:], 4, 2).tobytes() == want
    executor.copy_slot(0, 1, 2)
    executor.copy_slot(0, 1, 4, 2)
    assert run(executor, tokens[4:], 4, 1).tobytes() == want
    for bad in [(-1, 0, 1), (0, 3, 1), (0, 1, 65), (0, 1, 4, 5), (0, 1, 4, -1)]:
        with pytest.raises(GristmillError, match="copy_slot: .* expected 0 to"):
            executor.copy_slot(*bad)


def test_logits_of_no_rows_and_of_rows_in_any_order(tmp_path: Path) -> None:
    program = llama(CASES["f32"])
    executor, tokens = make(program, tmp_path), tokens_for(program, 3)
    zeros, at = ints([0, 0, 0]), ints([0, 1, 2])
    assert executor.forward(tokens, at, zeros, ints([])).shape == (0, program.vocabulary)
    plain = executor.forward(tokens, at, zeros, at)
    assert executor.forward(tokens, at, zeros, ints([2, 0, 2])).tobytes() == plain[[2, 0, 2]].tobytes()


def owned_by(drawing: cuda_drawing.Drawing) -> list[torch.Tensor]:
    """What it keeps on the device, the workspace's tensors one by one."""
    workspace = vars(drawing._workspace).values()
    return [*workspace, drawing._history, drawing._seen, drawing._device, drawing._tokens]


def test_sizes_are_counted(tmp_path: Path) -> None:
    program = llama(CASES["f32"])
    executor = make(program, tmp_path)
    stored = sum(t.nbytes for t in program.tensors.values())
    embedding = program.tensors["embed.0.weight"]
    vectors = sum(t.nbytes for name, t in program.tensors.items() if not name.endswith(".weight"))
    assert executor.weight_bytes == stored
    assert executor.weight_bytes_per_token == stored - vectors - embedding.nbytes + embedding[0].nbytes
    assert executor.kv_bytes == 4 * 64 * (16 + 16) * 4  # 3 slots and one for padding
    drawing = cuda_drawing.drawing_bytes(8, 40, 64, 3)
    assert drawing == sum(t.nbytes for t in owned_by(executor._drawing))
    assert executor.arena_bytes > program.json["arena_bytes"] + 8 * 40 * 4 + drawing


@pytest.mark.parametrize("max_tokens, count", [(8, 7), (7, 7), (8, 1)])
def test_more_rows_of_logits_than_there_is_room_for_come_in_pieces(
    max_tokens: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = llama(dataclasses.replace(CASES["f32"], max_tokens=max_tokens))
    tokens = tokens_for(program, count)
    expected = in_chunks(Reference(program), tokens, [count])
    monkeypatch.setattr(cuda_device, "LOGIT_ROWS", 2)
    executor = make(program, tmp_path, max_slots=1)
    assert executor._values.logits.shape == (2, 40)
    assert_close(run(executor, tokens), expected, FEW_TOLERANCE["f32"])


def test_running_out_of_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At load and in a batch, by torch's error or the driver's; the executor goes on afterwards."""
    program = llama(CASES["f32"])
    executor, tokens = make(program, tmp_path), tokens_for(program, 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 29, 8 << 30))
    failures = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ]
    for failure, needed in zip(failures, ["needed 2.50 GiB more", "needed more than there is"]):
        with monkeypatch.context() as patch:
            patch.setattr(executor._launcher, "begin", raising(failure))
            with pytest.raises(GristmillError, match=f"in a batch of 2 rows: {needed}, free 1.50 GiB; give"):
                run(executor, tokens)
        with (
            pytest.raises(GristmillError, match=f"memory loading 3 slots: {needed}, free 1.50 GiB; load"),
            cuda_device.refuse_out_of_memory(DEVICE, "loading 3 slots", "load less"),
        ):
            raise failure
    assert_close(run(executor, tokens), in_chunks(Reference(program), tokens, [2]), FEW_TOLERANCE["f32"])
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="illegal address"):
        patch.setattr(executor._launcher, "begin", raising(RuntimeError("CUDA error: illegal address")))
        run(executor, tokens)


def test_nothing_half_open_is_left_where_memory_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = llama(CASES["f32"])
    weights, half_made = program.write(tmp_path), []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(cuda_device, "open_device", lambda index: DEVICE)

    def allocate(batch: object, *rest: object) -> None:
        half_made.append(weakref.ref(batch))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(cuda_executor, "Drawing", allocate)
    with pytest.raises(GristmillError, match="ran out of memory loading 3 slots of 64") as caught:
        cuda.open_executor(Program.from_json(program.json), weights, 64, 3)
    gc.collect()
    assert len(half_made) == 1 and half_made[0]() is None, "held by what was raised"
    del caught


def raising(error: Exception) -> Callable[..., None]:
    def fail(*given: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "given, message",
    [
        (([40], [0], [0], [0]), "tokens: got 40, expected 0 to 39"),
        (([1], [64], [0], [0]), "positions: got 64"),
        (([1], [0], [3], [0]), "slots: got 3"),
        (([1], [0], [0], [1]), "rows: got 1"),
        (([1, 2], [0, 0], [1, 1], [0]), "twice"),
        (([1, 2], [0, 20], [1, 1], [0]), "positions 20 apart"),
        (([1] * 9, [*range(9)], [0] * 9, [0]), "expected 1 to 8"),
        (([1, 2], [0], [0], [0]), "as many positions"),
    ],
)
def test_batches_that_cannot_be(given: tuple[list[int], ...], message: str, tmp_path: Path) -> None:
    executor = make(llama(CASES["window_order"]), tmp_path)
    with pytest.raises(GristmillError, match=message):
        executor.forward(*map(ints, given))


def test_damaged_programs_and_weights_are_refused(tmp_path: Path) -> None:
    program = llama(CASES["f32"])
    weights = program.write(tmp_path)
    broken = Program.from_json(program.json)
    broken.instructions[0].out = dataclasses.replace(broken.instructions[0].out, column=1)
    with pytest.raises(GristmillError, match="instruction 0 names"):
        cuda_executor.CudaExecutor(broken, [weights], DEVICE, 64, 3)
    other = Program.from_json(program.json)
    other.weights["head"][0] = dataclasses.replace(other.weights["head"][0], n=41)
    with pytest.raises(GristmillError, match="head.0: data: expected .*compile the model again"):
        cuda_weights.Weights(other, [weights], DEVICE)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(GristmillError, match="weights.safetensors: .*compile the model again"):
        cuda_executor.CudaExecutor(Program.from_json(program.json), [weights], DEVICE, 64, 3)


def test_fp8_is_refused_where_a_device_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (8, 6)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    programs = {
        what: Program.from_json(llama(dataclasses.replace(CASES["f32"], **changes)).json)
        for what, changes in (
            ("weights in fp8", {"form": Format("fp8")}), ("a KV cache in fp8", {"cache_v": "fp8"}),
        )
    }  # fmt: skip
    for what, program in programs.items():
        with pytest.raises(GristmillError, match=f"capability 8.6, and fp8 needs 8.9.* {what}: compile"):
            cuda_device.refuse_fp8(program, DEVICE)
    cuda_device.refuse_fp8(Program.from_json(llama(CASES["int4_int8"]).json), DEVICE)
    capability = (8, 9)
    for program in programs.values():
        cuda_device.refuse_fp8(program, DEVICE)


def test_what_a_machine_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = tiny_artifact(tmp_path / "a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GristmillError, match="no CUDA device, expected an NVIDIA GPU.*device 'cpu'"):
        gristmill.load(artifact, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(GristmillError, match="capability 7.5, expected 8.0 or more"):
        gristmill.load(artifact, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 30))
    with pytest.raises(GristmillError, match="needed 0.51 GiB .* free 0.00, and no max_len or max_slots"):
        gristmill.load(artifact, device="cuda")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(GristmillError, match=r"pip install gristmill\[cuda\]"):
        gristmill.load(artifact, device="cuda")


def test_too_little_memory_names_what_fits() -> None:
    program = Program.from_json(llama(CASES["f32"]).json)
    fixed = cuda_device.RESERVE_BYTES + 1000 + added_in_place(program).arena_bytes + 4 * 8 * 40
    fixed += cuda_device.graph_bytes(program, 3) + cuda_drawing.drawing_bytes(8, 40, 0, 3)
    fixed += cuda_device.product_bytes(program, 8)
    row = 16 * 4 * 2 + 4  # of one position in one slot: key, value, token
    cuda_device.refuse_too_large(program, 100, 3, 1000, fixed + 4 * 100 * row)
    with pytest.raises(GristmillError, match="load with max_len=99 or max_slots=2, which fits"):
        cuda_device.refuse_too_large(program, 100, 3, 1000, fixed + 4 * 100 * row - 1)
    with pytest.raises(GristmillError, match="load with max_len=25 or max_slots=2, which fits"):
        cuda_device.refuse_too_large(program, 100, 3, 1000, fixed + 100 * row)


@pytest.mark.parametrize("case", CASES)
def test_what_products_keep_in_between_is_counted(case: str, tmp_path: Path) -> None:
    made = llama(CASES[case])
    executor, program = make(made, tmp_path), Program.from_json(made.json)
    counted = cuda_device.product_bytes(program, cuda_device.few_rows(3, program.limits.max_tokens))
    assert executor._launcher.products.workspace.nbytes == max(2, counted)


def test_what_dense_products_do_without_is_counted_still(tmp_path: Path) -> None:
    made = llama(DENSE)
    executor, program = make(made, tmp_path), Program.from_json(made.json)
    rounded = executor._launcher.products._rounded_inputs.nbytes
    assert rounded == 8 * 64 * 2, "of the widest input, for 8 rows"
    counted = cuda_device.product_bytes(program, cuda_device.few_rows(3, program.limits.max_tokens))
    kept = executor._launcher.products.workspace.nbytes
    assert kept == 8 * 2 * 48 * 4, "the sums of gates and up projections alone"
    assert kept + rounded < counted


def test_dense_products_of_many_rows_are_counted() -> None:
    program = Program.from_json(llama(CASES["int4_int8"]).json)
    program.limits = dataclasses.replace(program.limits, max_tokens=2048)
    key = next(i.weight for i in program.instructions if i.op == "linear")
    assert key is not None
    segments = [dataclasses.replace(s, n=28672, k=4096) for s in program.weights[key][:1]]
    program.weights[key] = segments
    # weights, activations, sums, activations of another product
    wanted = 28672 * 4096 * 2 + 2048 * (4096 * 2 + 28672 * 4) + 2048 * 4096 * 2
    assert cuda_device.product_bytes(program, 64) == wanted
    program.weights[key] = [dataclasses.replace(segments[0], format="f16")]
    with pytest.raises(GristmillError, match="is f16 .* beside int8 activations in groups of 32"):
        cuda_device.product_bytes(program, 64)


def test_graphs_and_logits_are_for_as_many_rows_as_slots_can_fill() -> None:
    assert [cuda_device.captured_rows(slots, 512) for slots in (1, 3, 8, 100, 1000)] == [1, 4, 8, 128, 256]
    assert cuda_device.captured_rows(100, 96) == 96
    assert [cuda_device.few_rows(slots, 512) for slots in (1, 65, 1000)] == [64, 128, 256]
    assert cuda_device.few_rows(8, 16) == 16
    program = Program.from_json(llama(CASES["f32"]).json)
    one, many = (cuda_device.graph_bytes(program, slots) for slots in (1, 8))
    assert one / (2 + MOST_CACHED) == many / (5 + MOST_CACHED)


def test_buckets_are_powers_of_two_and_the_most() -> None:
    assert cuda_device.buckets(8) == [1, 2, 4, 8]
    assert cuda_device.buckets(12) == [1, 2, 4, 8, 12]
    assert cuda_device.buckets(1) == [1]
