"""Formats of the KV cache: a rotation is exact and helps against outliers, bytes are as computed."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from programs import Array, Llama, llama
from test_executor import FLOAT_TOLERANCE, assert_close, in_chunks, make, run, tokens_for

import gristmill
from gristmill.compiler.lower import hadamard_block
from gristmill.runtime.evaluation import negative_log_likelihood
from gristmill.runtime.program import CACHE_TYPES, CacheSpec, cache_row_bytes


def shape(dim: int, cache: str, hadamard: int = 0, values: str = "f32") -> Llama:
    return Llama(
        layers=1, heads=4, kv_heads=2, k_dim=dim, v_dim=dim, rope_dims=dim, hidden=64, bias=True, cache=cache,
        cache_v=values, hadamard=hadamard,
    )  # fmt: skip


@pytest.mark.parametrize("dim, block", [(8, 8), (64, 32), (80, 16), (96, 32), (128, 32), (18, 2)])
def test_scores_do_not_change_with_the_transform(dim: int, block: int, tmp_path: Path) -> None:
    assert hadamard_block(dim) == block
    tokens = tokens_for(llama(shape(dim, "f32")), 30)
    plain = run(make(llama(shape(dim, "f32")), tmp_path / "plain"), tokens)
    for rotation in {block, dim & -dim}:
        program = llama(shape(dim, "f32", rotation))
        rotated = run(make(program, tmp_path / f"by{rotation}"), tokens)
        assert_close(rotated, plain, FLOAT_TOLERANCE)
        assert (rotated != plain).any(), "nothing was rotated"


def key_error(dim: int, hadamard: int, directory: Path, outliers: Array) -> float:
    """Root mean square error of the logits with int4 keys, whose bias has `outliers` in each head."""
    logits = []
    for cache in ("f32", "int4"):
        program = llama(shape(dim, cache, hadamard))
        bias = program.tensors["layers.0.bias"]
        keys = bias[4 * dim : 6 * dim].reshape(2, dim)
        keys[:] = outliers
        executor = make(program, directory / f"{cache}{dim}by{hadamard}")
        logits.append(run(executor, tokens_for(program, 32)))
    return float(np.sqrt(np.square(logits[1] - logits[0]).mean()))


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_key_biases_with_outliers_cost_less_rotated(dim: int, tmp_path: Path) -> None:
    outliers = np.zeros(dim, np.float32)
    outliers[[3, 17, dim // 2, dim - 5]] = [30, -30, 20, 25]
    plain = key_error(dim, 0, tmp_path, outliers)
    rotated = key_error(dim, hadamard_block(dim), tmp_path, outliers)
    assert 0 < rotated < 0.75 * plain, (rotated, plain)


@pytest.mark.parametrize("k, v", itertools.product(CACHE_TYPES, CACHE_TYPES))
def test_bytes_are_as_computed(k: str, v: str, tmp_path: Path) -> None:
    config = Llama(layers=1, cache=k, cache_v=v, k_dim=34, v_dim=33, rope_dims=34)
    executor = make(llama(config), tmp_path, max_len=64, max_slots=4)
    computed = 64 * 4 * CacheSpec(2, 34, 33, k, v).row_bytes()
    assert computed <= executor.kv_bytes <= computed + 2 * (64 + 64), "each array is rounded up, and fenced"
    tokens = tokens_for(llama(config), 20)
    assert np.isfinite(in_chunks(executor, tokens, [13, 7])).all()


def test_row_bytes_are_those_of_the_documentation() -> None:
    assert {dtype: cache_row_bytes(dtype, 80) for dtype in CACHE_TYPES} == {
        "f32": 320, "f16": 160, "int8": 88, "fp8": 84, "int4": 52,
    }  # fmt: skip
    assert cache_row_bytes("int4", 33) == 2 * 4 + 17


# keys, values, rotated, the most that nll may change by
COMPILED = [("f32", "f32", False, 0.0), ("int8", "int8", False, 0.001), ("fp8", "int4", False, 0.005),
            ("int4", "fp8", True, 0.005)]  # fmt: skip


def test_compiled_caches_keep_the_text(py7m: Path, shared: Path, tmp_path: Path) -> None:
    """nll on 2,000 tokens in windows of 1,000 against an f32 cache; keys and values chosen separately."""
    text = (shared / "data" / "python_dev.txt").read_text("utf-8")[:12_000]
    exact = 0.0
    for k, v, rotate, bound in COMPILED:
        out = tmp_path / f"{k}-{v}"
        gristmill.compile(py7m, out, weights="f16", kv="f16", kv_k=k, kv_v=v, kv_rotate=rotate, gate=False)
        session = gristmill.load(out)
        attention = [i for i in session.program.instructions if i.op == "attention"]
        assert {(c.k_dtype, c.v_dtype) for c in session.program.caches} == {(k, v)}
        assert {i.attribute("hadamard") for i in attention} == {32 if rotate else 0}
        ids = session.tokenizer.encode(text, add_special_tokens=False)[:2000]
        nll = float(negative_log_likelihood(session, ids, 1000).mean())
        exact = exact or nll
        assert abs(nll / exact - 1) <= bound, f"{k} keys, {v} values: nll {nll:.5f}, {exact:.5f} with f32"
