"""Small programs and an executor of Triton kernels for them, on a device or in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import Array, Format, Llama
from programs import Program as Made
from triton_device import DEVICE, INTERPRETED

from gristmill.kernels.triton import linear_configs
from gristmill.runtime.cuda import executor as cuda_executor
from gristmill.runtime.program import Program

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
        SMALL, form=Format("int4", 32, False), embedding=Format("int8"), act_group=32, cache="int8",
        bias=True, sinks=True,
    ),
    "int8_two_layers": dataclasses.replace(
        SMALL, form=Format("int8", 64), embedding=Format("f16"), act_group=64, layers=2,
    ),
    "f16_mixed_cache": dataclasses.replace(
        SMALL, form=Format("f16"), embedding=Format("f16"), cache="int4", cache_v="f16", qk_norm=True,
        hadamard=16, rope_style="interleaved", final_softcap=2.0,
    ),
    "window_order": dataclasses.replace(
        SMALL, form=Format("int8", 32), act_group=32, window=5,
        order=True, cache="f16", cache_v="fp8", softcap=3.0
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def a_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after the other: as few as a GPU with one processor would get."""
    monkeypatch.setattr(linear_configs, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(cuda_executor, "PROCESSORS_OF_CPU", 1)
    if INTERPRETED:  # as many rows as there are at once: tests/kernels has the table's own
        for table in linear_configs.TABLE.values():
            for rows in [rows for rows in table if rows <= linear_configs.DECODE_TOKENS]:
                monkeypatch.setitem(table, rows, dataclasses.replace(table[rows], rows=64, chunks=4))
        for tokens, config in linear_configs.INTEGER_TABLE.items():
            wide = dataclasses.replace(config, rows=64, chunks=8)
            monkeypatch.setitem(linear_configs.INTEGER_TABLE, tokens, wide)


def make(program: Made, directory: Path, max_slots: int = 3, **limits: int) -> cuda_executor.CudaExecutor:
    weights = program.write(directory)
    return cuda_executor.CudaExecutor(
        Program.from_json(program.json), [weights], DEVICE, limits.get("max_len", 64), max_slots
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
