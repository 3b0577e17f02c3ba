"""The CUDA executor on CPU tensors, by Triton's interpreter, against the numpy interpreter and itself.

TRITON_INTERPRET=0 runs the same on a device, its graphs included.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import Reference
from programs import Array, Format, Llama, llama
from programs import Program as Made
from tiny import tiny_artifact

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

if os.environ["TRITON_INTERPRET"] == "1":
    import triton_interpreter  # noqa: F401  (puts it right)

import gristmill
from gristmill.kernels.triton import linear_configs
from gristmill.runtime.cuda import device as cuda_device
from gristmill.runtime.cuda import executor as cuda_executor
from gristmill.runtime.cuda import weights as cuda_weights
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
# Of the largest logit. Up to 4 rows all is f32 but the f16 queries beside a narrow cache, and cached numbers
# that round the other way; more rows multiply activations as bf16, of 8 significant bits.
FEW_TOLERANCE = {"f32": 2e-5, "f16": 4e-3, "int8": 2e-2, "fp8": 3e-2, "int4": 5e-2}
MANY_TOLERANCE = 3e-2
SMALL = Llama(
    vocabulary=40, hidden=64, intermediate=48, layers=1, heads=2, kv_heads=1, k_dim=16, v_dim=16,
    rope_dims=16, max_tokens=8,
)  # fmt: skip
CASES = {
    "f32": SMALL,
    "int4_int8": dataclasses.replace(
        SMALL, form=Format("int4", 32, False), embedding=Format("int8"), cache="int8", bias=True, sinks=True
    ),
    "f16_mixed_cache": dataclasses.replace(
        SMALL, form=Format("f16"), embedding=Format("f16"), cache="int4", cache_v="f16", qk_norm=True,
        hadamard=16, rope_style="interleaved", final_softcap=2.0,
    ),
    "window_order": dataclasses.replace(
        SMALL, form=Format("int8", 32), window=5, order=True, cache="f16", cache_v="fp8", softcap=3.0
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def a_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after the other: as few as a GPU with one processor would get."""
    monkeypatch.setattr(linear_configs, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(cuda_executor, "PROCESSORS_OF_CPU", 1)


def make(program: Made, directory: Path, max_slots: int = 3, **limits: int) -> cuda_executor.CudaExecutor:
    weights = program.write(directory)
    return cuda_executor.CudaExecutor(
        Program.from_json(program.json), weights, DEVICE, limits.get("max_len", 64), max_slots
    )


def ints(values: Any) -> Array:
    return np.array(values, np.int32)


def run(executor: Any, tokens: Array, start: int = 0, slot: int = 0) -> Array:
    count = len(tokens)
    where = np.arange(start, start + count)
    return np.asarray(
        executor.forward(tokens, ints(where), ints([slot] * count), np.arange(count, dtype=np.int32))
    )


def in_chunks(executor: Any, tokens: Array, sizes: list[int], slot: int = 0) -> Array:
    ends = np.cumsum(sizes)
    return np.concatenate([run(executor, tokens[e - s : e], int(e - s), slot) for s, e in zip(sizes, ends)])


def tokens_for(program: Made, count: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).integers(0, program.vocabulary, count).astype(np.int32)


def assert_close(got: Array, expected: Array, tolerance: float) -> None:
    assert got.shape == expected.shape and got.dtype == np.float32
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"off by {error:.2e} of the largest logit, tolerance {tolerance:.0e}"


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
    assert run(executor, tokens[4:], 4, 2).tobytes() == run(executor, tokens[4:], 4, 0).tobytes()
    for bad in [(-1, 0, 1), (0, 3, 1), (0, 1, 65)]:
        with pytest.raises(GristmillError, match="copy_slot: .* expected 0 to"):
            executor.copy_slot(*bad)


def test_logits_of_no_rows_and_of_rows_in_any_order(tmp_path: Path) -> None:
    program = llama(CASES["f32"])
    executor, tokens = make(program, tmp_path), tokens_for(program, 3)
    zeros, at = ints([0, 0, 0]), ints([0, 1, 2])
    assert executor.forward(tokens, at, zeros, ints([])).shape == (0, program.vocabulary)
    plain = executor.forward(tokens, at, zeros, at)
    assert executor.forward(tokens, at, zeros, ints([2, 0, 2])).tobytes() == plain[[2, 0, 2]].tobytes()


def test_sizes_are_counted(tmp_path: Path) -> None:
    program = llama(CASES["f32"])
    executor = make(program, tmp_path)
    stored = sum(t.nbytes for t in program.tensors.values())
    embedding = program.tensors["embed.0.weight"]
    vectors = sum(t.nbytes for name, t in program.tensors.items() if not name.endswith(".weight"))
    assert executor.weight_bytes == stored
    assert executor.weight_bytes_per_token == stored - vectors - embedding.nbytes + embedding[0].nbytes
    assert executor.kv_bytes == 4 * 64 * (16 + 16) * 4  # 3 slots and one for padding
    assert executor.arena_bytes > program.json["arena_bytes"] + 8 * 40 * 4


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
        cuda_executor.CudaExecutor(broken, weights, DEVICE, 64, 3)
    other = Program.from_json(program.json)
    other.weights["head"][0] = dataclasses.replace(other.weights["head"][0], n=41)
    with pytest.raises(GristmillError, match="head.0: data: expected .*compile the model again"):
        cuda_weights.Weights(other, weights, DEVICE)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(GristmillError, match="weights.safetensors: .*compile the model again"):
        cuda_executor.CudaExecutor(Program.from_json(program.json), weights, DEVICE, 64, 3)


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
    with pytest.raises(GristmillError, match="needed 0.50 GiB .* free 0.00, and no max_len or max_slots"):
        gristmill.load(artifact, device="cuda")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(GristmillError, match=r"pip install gristmill\[cuda\]"):
        gristmill.load(artifact, device="cuda")


def test_too_little_memory_names_what_fits() -> None:
    program = Program.from_json(llama(CASES["f32"]).json)
    fixed = cuda_device.RESERVE_BYTES + 1000 + program.arena_bytes + 4 * 8 * 40
    row = 16 * 4 * 2  # of one position in one slot
    cuda_device.refuse_too_large(program, 100, 3, 1000, fixed + 4 * 100 * row)
    with pytest.raises(GristmillError, match="load with max_len=99 or max_slots=2, which fits"):
        cuda_device.refuse_too_large(program, 100, 3, 1000, fixed + 4 * 100 * row - 1)
    with pytest.raises(GristmillError, match="load with max_len=25, which fits"):
        cuda_device.refuse_too_large(program, 100, 3, 1000, fixed + 100 * row)


def test_buckets_are_powers_of_two_and_the_most() -> None:
    assert cuda_executor.buckets(8) == [1, 2, 4, 8]
    assert cuda_executor.buckets(12) == [1, 2, 4, 8, 12]
    assert cuda_executor.buckets(1) == [1]
