"""The Program as a torch module beside the C++ executor: random programs, then compiled models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import Array, Format, Llama, llama
from programs import Program as Built
from safetensors.torch import load_file
from test_executor import CASES, FLOAT_TOLERANCE, assert_close, gpt2_like, make, tokens_for

import gristmill
from gristmill.export.program_module import ProgramModule, module_of
from gristmill.export.stored import Stored
from gristmill.runtime.program import Program

INTEGER_TOLERANCE = 2e-2  # as in test_executor.py: roundings the other way
CHUNKS = [11, 1, 16, 2]


def module(built: Built, directory: Path, **how: bool) -> ProgramModule:
    weights = directory / "weights.safetensors"
    if not weights.exists():
        built.write(directory)
    return ProgramModule(Program.from_json(json.loads(built.text())), Stored(weights), **how)


def in_chunks(model: ProgramModule, tokens: Array, sizes: list[int]) -> Array:
    """All logits of one sequence, `sizes` tokens in each call."""
    caches, parts, at = model.empty_caches(), [], 0
    for size in sizes:
        positions = torch.arange(at, at + size)
        ids = torch.from_numpy(tokens[at : at + size].astype(np.int64))
        with torch.inference_mode():
            parts.append(model(ids, positions, torch.arange(size), caches).numpy())
        at += size
    return np.concatenate(parts)


def of_executor(executor: Any, tokens: Array, sizes: list[int]) -> Array:
    parts, at = [], 0
    for size in sizes:
        rows = np.arange(size, dtype=np.int32)
        parts.append(executor.forward(tokens[at : at + size], rows + at, np.zeros_like(rows), rows))
        at += size
    return np.concatenate(parts)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_executor(case: str, tmp_path: Path) -> None:
    """Bounds are tighter than the interpreter's: both round to f32 in between."""
    config = CASES[case]
    built = llama(config)
    tokens = tokens_for(built, sum(CHUNKS))
    rounds = config.act_group or {config.cache, config.cache_v or config.cache} != {"f32"}
    got = in_chunks(module(built, tmp_path), tokens, CHUNKS)
    want = of_executor(make(built, tmp_path), tokens, CHUNKS)
    assert_close(got, want, INTEGER_TOLERANCE if rounds else FLOAT_TOLERANCE)


def test_other_instructions(tmp_path: Path) -> None:
    """Layer norms, learned positions, pointwise steps, views into values."""
    built = gpt2_like()
    tokens = tokens_for(built, sum(CHUNKS))
    got = in_chunks(module(built, tmp_path), tokens, CHUNKS)
    assert_close(got, of_executor(make(built, tmp_path), tokens, CHUNKS), FLOAT_TOLERANCE)


@pytest.mark.parametrize("form", ["f16", "bf16", "fp8_group", "int8_asymmetric", "int4_128", "int3", "int2"])
def test_packed_weights_have_the_names_and_bytes_of_the_file(form: str, tmp_path: Path) -> None:
    built = llama(CASES[form])
    plain, packed = module(built, tmp_path), module(built, tmp_path, packed=True)
    tokens = tokens_for(built, 9)
    np.testing.assert_array_equal(in_chunks(packed, tokens, [9]), in_chunks(plain, tokens, [9]))
    stored = {k: v for k, v in load_file(tmp_path / "weights.safetensors").items() if not k.startswith("__")}
    state = packed.state_dict()
    assert set(state) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor), name


def test_exact_leaves_activations_and_caches_as_they_are(tmp_path: Path) -> None:
    rounded = dataclasses.replace(CASES["int8"], form=Format("int8", 32), act_group=32, cache="int8")
    built = llama(rounded)
    exact = llama(dataclasses.replace(rounded, act_group=0, cache="f32"))
    tokens = tokens_for(built, 20)
    want = of_executor(make(exact, tmp_path / "exact"), tokens, [20])
    assert_close(in_chunks(module(built, tmp_path, exact=True), tokens, [20]), want, FLOAT_TOLERANCE)
    off = np.abs(in_chunks(module(built, tmp_path), tokens, [20]) - want).max()
    assert off > 10 * FLOAT_TOLERANCE * np.abs(want).max(), "rounding makes a difference"


def test_later_rows_of_a_cache_are_never_read(tmp_path: Path) -> None:
    """So a sequence is rolled back by naming an earlier position."""
    built = llama(Llama(window=7))
    model, tokens = module(built, tmp_path), tokens_for(built, 20)
    caches, ids = model.empty_caches(), torch.from_numpy(tokens.astype(np.int64))
    with torch.inference_mode():
        model(ids, torch.arange(20), torch.arange(20), caches)
        again = model(ids[12:15], torch.arange(12, 15), torch.arange(3), caches).numpy()
    assert_close(again, in_chunks(model, tokens, [12, 3])[12:], FLOAT_TOLERANCE)


@pytest.mark.parametrize("weights", ["f32", "int4"])
def test_the_example_model(weights: str, py7m_f32: Path, py7m_int4: Path) -> None:
    artifact = {"f32": py7m_f32, "int4": py7m_int4}[weights]
    session = gristmill.load(artifact, max_slots=1)
    tokens = np.array(session.tokenizer.encode("def read_lines(path):\n    with open(path) as f:"), np.int32)
    sizes = [len(tokens) - 3, 1, 1, 1]
    got = in_chunks(module_of(artifact), tokens, sizes)
    want = of_executor(session, tokens, sizes)
    assert_close(got, want, {"f32": FLOAT_TOLERANCE, "int4": INTEGER_TOLERANCE}[weights])


def test_greedy_tokens_of_the_real_small_model(stories_f32: Path) -> None:
    model = module_of(stories_f32)
    caches, ids, rows = model.empty_caches(64), [1], torch.tensor([0])
    with torch.inference_mode():
        for n in range(50):
            logits = model(torch.tensor(ids[-1:]), torch.tensor([n]), rows, caches)
            ids.append(int(logits.argmax()))
    want = gristmill.load(stories_f32, max_slots=1).generate([1], max_new_tokens=50, ignore_eos=True)
    assert ids[1:] == want.token_ids
