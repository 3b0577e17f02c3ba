"""The CUDA executor on a real device alone: graphs beside launches, formats, families, long contexts.

`make test-gpu` runs it. Sizes are chosen for seconds: a test compiles each kernel once, which takes longest.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from families import FAMILIES, VARIANTS, VOCABULARY, save_tiny
from interpreter import Reference
from programs import Array, Format, Llama, llama
from test_executor import CASES as FORMATS

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from cuda_cases import FEW_TOLERANCE, MANY_TOLERANCE, assert_close, in_chunks, ints, make, run, tokens_for
from triton_device import INTERPRETED

import gristmill
from gristmill.runtime.cpu import _native
from gristmill.runtime.decoding.draws import Draws
from gristmill.runtime.decoding.options import GenerationOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device and TRITON_INTERPRET=0 (make test-gpu)"),
]
LONG = Llama(
    vocabulary=512, hidden=256, intermediate=256, layers=2, heads=8, kv_heads=2, k_dim=64, v_dim=64,
    rope_dims=64, form=Format("int4", 64), embedding=Format("int8"), max_tokens=512, max_position=1 << 16,
)  # fmt: skip

WIDE = dataclasses.replace(LONG, hidden=2048, intermediate=4096, heads=16, kv_heads=4, k_dim=128, v_dim=128,
                           rope_dims=128)  # fmt: skip


def tolerance_of(config: Llama) -> float:
    narrow = max(FEW_TOLERANCE[cache] for cache in (config.cache, config.cache_v or config.cache))
    return max(narrow, MANY_TOLERANCE)


@pytest.mark.parametrize("slots", [1, 5, 100])
def test_graphs_equal_launches(slots: int, tmp_path: Path) -> None:
    """The same batch from its graph and without it, logits and tokens, for every bucket that has a graph."""
    program = llama(dataclasses.replace(FORMATS["int4"], act_group=0, max_tokens=256))
    executor = make(program, tmp_path, max_slots=slots)
    graphs, draw_graphs = executor._graphs, executor._draw_graphs
    assert max(graphs) == {1: 1, 5: 8, 100: 128}[slots]
    assert len(draw_graphs) == 2 * len(graphs)
    for count in (n for n in (1, 2, 3, 5, 9, 17, 33, 65, 100) if n <= slots):
        tokens, order = tokens_for(program, count), np.arange(count, dtype=np.int32)
        batch = (tokens, ints([0] * count), order[::-1].copy(), order)
        options = [
            GenerationOptions(temperature=n % 3, top_k=n % 5, repetition_penalty=1 + n % 2)
            for n in range(count)
        ]
        for draws in (Draws.greedy(count), Draws.of(options, [7] * count, [0] * count)):
            executor._graphs, executor._draw_graphs = graphs, draw_graphs
            replayed = executor.forward(*batch), executor.sample(*batch, draws)
            executor._graphs, executor._draw_graphs, executor._graph_cache = {}, {}, None
            launched = executor.forward(*batch), executor.sample(*batch, draws)
            assert replayed[0].tobytes() == launched[0].tobytes()
            assert replayed[1].tolist() == launched[1].tolist()


@pytest.mark.parametrize("case", ["int4", "bf16"])
def test_prompts_from_graphs_equal_launches(case: str, tmp_path: Path) -> None:
    """Three prompts of each shape, the third from the graph that the second one captured: logits and tokens.
    Between them rows are decoded, and at last some in a batch of more blocks than graphs have."""
    program = llama(dataclasses.replace(FORMATS[case], act_group=0, max_tokens=256))
    executor, launched = (make(program, tmp_path, max_slots=64, max_len=512) for _ in range(2))
    launched._graph_cache = None
    sampled = Draws.of([GenerationOptions(temperature=1.0, repetition_penalty=2.0)], [7], [0])

    def check(positions: list[int], slots: list[int], seed: int) -> None:
        count = len(positions)
        batch = tokens_for(program, count, seed), ints(positions), ints(slots)
        for rows in ([], [count - 1], [*range(max(0, count - 40), count)]):
            logits = [one.forward(*batch, ints(rows)).tobytes() for one in (executor, launched)]
            assert logits[0] == logits[1]
        drawn = [one.sample(*batch, ints([count - 1]), sampled).tolist() for one in (executor, launched)]
        assert drawn[0] == drawn[1]

    for count in (2, 5, 33, 64, 200, 256):
        for seed in range(3):
            check([*range(seed, seed + count)], [seed] * count, seed)
        check([count], [2], 9)
        bucket = executor._bucket(count)
        assert executor._graph_cache is not None and (bucket, 1, False) in executor._graph_cache
    check([*range(100), *range(100)], [0] * 100 + [1] * 100, 4)
    check([300, 302] * 64, sorted([*range(64)] * 2), 5)


@pytest.mark.parametrize("form", [Format("int4", 128), Format("int8"), Format("fp8"), Format("bf16")])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_what_is_handed_over_never_changes(
    form: Format, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same step many times: programs that count each other in would show a race by a bit."""
    act_group = 128 if form.name.startswith("int") else 0
    program = llama(dataclasses.replace(WIDE, form=form, act_group=act_group))
    order = np.arange(rows, dtype=np.int32)
    batch = tokens_for(program, rows), ints([3] * rows), order, order
    executor = make(program, tmp_path, max_slots=rows)
    assert bool(executor._launcher.products.dissolved) and executor._launcher.products.handovers
    first = executor.forward(*batch)
    for _ in range(300):
        assert executor.forward(*batch).tobytes() == first.tobytes()
    assert not executor._launcher.products.counters.any()
    monkeypatch.setenv("GRISTMILL_HANDOVER", "0")
    assert_close(first, make(program, tmp_path, max_slots=rows).forward(*batch), MANY_TOLERANCE)


@pytest.mark.parametrize("case", FORMATS)
def test_every_format(case: str, tmp_path: Path) -> None:
    """Prefill in chunks of every way to multiply, and decode from a graph."""
    config = dataclasses.replace(FORMATS[case], act_group=0)
    program = llama(config)
    tokens, sizes = tokens_for(program, 40), [20, 7, 4, 3, 2, 1, 1, 1, 1]
    got = in_chunks(make(program, tmp_path), tokens, sizes)
    assert_close(got, in_chunks(Reference(program), tokens, sizes), tolerance_of(config))


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_every_family(name: str, tmp_path: Path) -> None:
    """Of f32 weights, which are multiplied as they are; text in a chunk and token by token."""
    family, changes = VARIANTS.get(name, (name, {}))
    save_tiny(tmp_path / "model", family, **changes)
    gristmill.compile(tmp_path / "model", tmp_path / "artifact", weights="f32", gate=False, max_tokens=32)
    ids = np.random.default_rng(1).integers(2, VOCABULARY, 40).astype(np.int32)
    found: dict[str, Array] = {}
    for device in ("cpu", "cuda"):
        session = gristmill.load(tmp_path / "artifact", device=device)
        found[device] = in_chunks(session, ids, [32, 3, 1, 1, 1, 1, 1])
    assert_close(found["cuda"], found["cpu"], 1e-3)


@pytest.mark.parametrize("window", [0, 1000])
@pytest.mark.parametrize("cache", ["f16", "int8", "fp8", "int4"])
def test_long_contexts(cache: str, window: int, tmp_path: Path) -> None:
    check_long_context(dataclasses.replace(LONG, cache=cache, window=window), 20_000, tmp_path)


def check_long_context(config: Llama, count: int, directory: Path) -> None:
    """The last rows of a prompt in chunks and what is decoded after it, against the CPU's executor."""
    program, max_len = llama(config), count + 64
    weights = program.write(directory)
    cpu = _native.Executor(program.text(), str(weights), threads=2, max_len=max_len, max_slots=1)
    cuda = make(program, directory, max_slots=1, max_len=max_len)
    tokens = tokens_for(program, count + 4)
    ends = [*range(config.max_tokens, count, config.max_tokens), *range(count, count + 5)]
    for executor in (cpu, cuda):
        rows = []
        for start, end in zip([0, *ends], ends):
            rows.append(run(executor, tokens[start:end], start)[-1:])
        if executor is cpu:
            expected = np.concatenate(rows)
    assert_close(np.concatenate(rows), expected, tolerance_of(config))
