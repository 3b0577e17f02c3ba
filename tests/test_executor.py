"""The C++ executor against the numpy interpreter, and itself: a row's bits depend on its own tokens."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interpreter import Reference
from programs import Array, Format, Llama, Program, llama

from gristmill.runtime.cpu import _native
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.machine import resident_bytes

FLOAT_TOLERANCE = 2e-5  # of the largest logit, f32 against f64 through two layers
INTEGER_TOLERANCE = 2e-2  # an activation rounded the other way moves by 1/127 of its group's largest
# where a key or value rounds the other way, by a step of its type
CACHE_TOLERANCE = {"f32": FLOAT_TOLERANCE, "f16": 2e-3, "int8": 2e-2, "fp8": 3e-2, "int4": 5e-2}

CASES: dict[str, Llama] = {
    "f32": Llama(),
    "f16": Llama(
        form=Format("f16"), embedding=Format("f16"), cache="f16", qk_norm=True, rope_style="interleaved"
    ),
    "bf16": Llama(
        form=Format("bf16"), embedding=Format("bf16"), softcap=3.0, final_softcap=2.0, activation="gelu_tanh"
    ),
    "int8": Llama(form=Format("int8"), embedding=Format("int8"), act_group=32, cache="int8", bias=True),
    "int8_group": Llama(
        form=Format("int8", 64), embedding=Format("int8", 32), act_group=64, hidden=136, cache="f16"
    ),
    "int8_asymmetric": Llama(form=Format("int8", 32, False, "float32"), act_group=32, hidden=200, sinks=True),
    "int4": Llama(form=Format("int4", 32), embedding=Format("int4"), act_group=32, hidden=136, cache="int8"),
    "int4_row": Llama(form=Format("int4"), act_group=128, hidden=200, intermediate=264),
    "int4_128": Llama(
        form=Format("int4", 128, False),
        embedding=Format("int4", 32, False),
        act_group=128,
        hidden=320,
        intermediate=264,
    ),
    "int3": Llama(form=Format("int3", 32), embedding=Format("int3"), act_group=32, hidden=136),
    "int3_128": Llama(form=Format("int3", 128, False), act_group=64, hidden=320, intermediate=264),
    "int2": Llama(
        form=Format("int2", 64, False, "float32"), embedding=Format("int2", 32), act_group=32, hidden=200
    ),
    "int2_row": Llama(form=Format("int2"), act_group=128, hidden=136, intermediate=264, cache="f16"),
    "fp8": Llama(form=Format("fp8"), embedding=Format("fp8", 32), hidden=136),
    "fp8_group": Llama(form=Format("fp8", 64, scale_dtype="float32"), embedding=Format("fp8"), hidden=200),
    "float_activations": Llama(form=Format("int4", 32, False), embedding=Format("int8"), hidden=136),
    "order": Llama(form=Format("int4", 32, False), act_group=32, hidden=328, order=True, bias=True),
    "order_float": Llama(form=Format("int8", 64), hidden=136, order=True),
    "window": Llama(window=7, cache="int8"),
    "kv_fp8": Llama(cache="fp8", cache_v="int4", k_dim=8, v_dim=33, rope_dims=8, qk_norm=True),
    "kv_int4": Llama(cache="int4", cache_v="fp8", k_dim=80, v_dim=40, rope_dims=32, hadamard=16, hidden=64),
    "kv_mixed": Llama(cache="int4", cache_v="f16", k_dim=96, v_dim=16, rope_dims=96, hadamard=32, window=9),
    "uneven_heads": Llama(heads=6, kv_heads=1, k_dim=24, v_dim=10, rope_dims=8, cache="f16"),
    "many_heads": Llama(heads=8, kv_heads=8, k_dim=64, v_dim=64, rope_dims=64, hidden=128),
}


def make(program: Program, directory: Path, **options: Any) -> _native.Executor:
    weights = directory / "weights.safetensors"
    if not weights.exists():
        program.write(directory)
    given = {"threads": 2, "max_len": 64, "max_slots": 4, "alone_below": 0, **options}
    return _native.Executor(program.text(), str(weights), **given)


def ints(values: Any) -> Array:
    return np.array(values, np.int32)


def run(executor: Any, tokens: Array, start: int = 0, slot: int = 0) -> Array:
    """All logits of one sequence's tokens, in one forward."""
    count = len(tokens)
    positions = np.arange(start, start + count, dtype=np.int32)
    return np.asarray(
        executor.forward(tokens, positions, np.full(count, slot, np.int32), np.arange(count, dtype=np.int32))
    )


def in_chunks(executor: Any, tokens: Array, sizes: list[int], slot: int = 0) -> Array:
    parts, at = [], 0
    for size in sizes:
        parts.append(run(executor, tokens[at : at + size], at, slot))
        at += size
    assert at == len(tokens)
    return np.concatenate(parts)


def tokens_for(program: Program, count: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).integers(0, program.vocabulary, count).astype(np.int32)


def assert_close(got: Array, expected: Array, tolerance: float) -> None:
    error = np.abs(got - expected) / np.abs(expected).max()
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= tolerance, (
        f"largest {error.max():.2e} at {worst}, mean {error.mean():.2e}, tolerance {tolerance:.0e}"
    )


def test_caches_are_not_touched_before_their_positions_are_used(tmp_path: Path) -> None:
    """So that the thread that writes a page is the first to touch it."""
    program = llama(Llama(cache="f32", max_position=1 << 16))
    before = resident_bytes()
    executor = make(program, tmp_path, max_len=1 << 16, max_slots=8)
    made = resident_bytes()
    run(executor, tokens_for(program, 32), slot=7)
    assert executor.kv_bytes > 128 << 20
    assert made - before < 8 << 20
    assert resident_bytes() - made < 8 << 20


@pytest.mark.parametrize("case", ["order", "kv_mixed"])
def test_huge_pages_give_the_same_bits(case: str, tmp_path: Path) -> None:
    program = llama(CASES[case])
    tokens = tokens_for(program, 9)
    mapped, copied = (run(make(program, tmp_path, huge_pages=huge), tokens) for huge in (False, True))
    np.testing.assert_array_equal(mapped, copied)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("case", CASES)
def test_equals_the_interpreter(case: str, isa: str, tmp_path: Path) -> None:
    program = llama(CASES[case])
    executor, reference = make(program, tmp_path, isa=isa), Reference(program)
    assert executor.isa == isa
    caches = {CASES[case].cache, CASES[case].cache_v or CASES[case].cache}
    tolerance = max(CACHE_TOLERANCE[cache] for cache in caches)
    if CASES[case].act_group:
        tolerance = INTEGER_TOLERANCE
    tokens = tokens_for(program, 30)
    assert_close(
        in_chunks(executor, tokens, [11, 1, 16, 2]), in_chunks(reference, tokens, [11, 1, 16, 2]), tolerance
    )


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_chunks_threads_or_company(case: str, isa: str, tmp_path: Path) -> None:
    program = llama(CASES[case])
    tokens = tokens_for(program, 30)
    expected = in_chunks(make(program, tmp_path, threads=1, isa=isa), tokens, [1] * 30)
    for threads, sizes in [(1, [30]), (2, [30]), (3, [7, 23]), (2, [1, 28, 1])]:
        got = in_chunks(make(program, tmp_path, threads=threads, isa=isa), tokens, sizes)
        assert got.tobytes() == expected.tobytes(), (threads, sizes)
    executor = make(program, tmp_path, isa=isa)
    others = tokens_for(program, 12, seed=2)
    run(executor, others[:9], slot=1)
    run(executor, tokens[:20], slot=2)
    mixed = executor.forward(
        np.concatenate([others[9:], tokens[20:]]),
        ints([9, 10, 11, *range(20, 30)]),
        ints([1] * 3 + [2] * 10),
        ints([12, 3, 7]),
    )
    assert mixed.tobytes() == expected[[29, 20, 24]].tobytes()


@pytest.mark.parametrize("act_group", [0, 32])
def test_bits_of_long_chunks(act_group: int, tmp_path: Path) -> None:
    """Of three bands of 128 rows, one not full, over many strips; and of few rows."""
    program = llama(
        Llama(layers=1, form=Format("int4", 32), act_group=act_group, intermediate=1216, max_tokens=300)
    )
    tokens = tokens_for(program, 300)
    executors = [make(program, tmp_path, threads=n, max_len=300) for n in (1, 2, 3)]
    expected = in_chunks(executors[0], tokens, [20] * 15)
    for executor in executors:
        for sizes in ([300], [290, 10], [128, 129, 43], [1, 2, 3, 5, 9, 280]):
            got = in_chunks(executor, tokens, sizes)
            assert got.tobytes() == expected.tobytes(), (executor.threads, sizes)


def test_interleaved_rows_of_several_slots(tmp_path: Path) -> None:
    program = llama(CASES["int8"])
    executor = make(program, tmp_path)
    texts = [tokens_for(program, 8, seed) for seed in range(3)]
    expected = [run(make(program, tmp_path), text) for text in texts]
    order = np.random.default_rng(0).permutation(24)
    rows = [(slot, position) for slot in range(3) for position in range(8)]
    shuffled = [rows[i] for i in order]
    got = executor.forward(
        ints([texts[s][p] for s, p in shuffled]),
        ints([p for _, p in shuffled]),
        ints([s for s, _ in shuffled]),
        np.arange(24, dtype=np.int32),
    )
    for row, (slot, position) in zip(got, shuffled, strict=True):
        assert row.tobytes() == expected[slot][position].tobytes()


@pytest.mark.parametrize("cache", ["f32", "f16", "int8", "fp8 int4", "int4 fp8"])
@pytest.mark.parametrize("window", [0, 600])
def test_long_context_over_several_splits(cache: str, window: int, tmp_path: Path) -> None:
    """Several splits of 512 positions: shared by threads in decode, taken whole in prefill, the same bits."""
    keys, _, values = cache.partition(" ")
    config = Llama(layers=1, cache=keys, cache_v=values, window=window, max_tokens=128, sinks=True)
    program = llama(config)
    tokens = tokens_for(program, 1400)
    sizes = [128] * 10 + [119] + [1]
    expected = in_chunks(make(program, tmp_path, threads=1, max_len=1500), tokens, sizes)
    got = in_chunks(make(program, tmp_path, threads=4, max_len=1500), tokens, [100] * 13 + [96] + [1] * 4)
    assert got.tobytes() == expected.tobytes()
    reference = Reference(program)
    in_chunks(reference, tokens[:1390], [139] * 10)
    assert_close(
        expected[1390:],
        run(reference, tokens[1390:], 1390),
        max(CACHE_TOLERANCE[keys], CACHE_TOLERANCE[values or keys]),
    )


def test_window_crossed_inside_one_chunk(tmp_path: Path) -> None:
    program = llama(dataclasses.replace(CASES["window"], cache="f32"))
    tokens = tokens_for(program, 60)
    executor = make(program, tmp_path, max_len=4096)
    got = in_chunks(executor, tokens, [32, 28])
    assert_close(got, in_chunks(Reference(program), tokens, [60]), FLOAT_TOLERANCE)
    assert executor.kv_bytes < 4 * 2 * 2 * 64 * 36 * 4 + 4096, (
        "a window's ring holds window + max_tokens rows"
    )


def test_copied_slot_continues_alike(tmp_path: Path) -> None:
    for case in ("int8", "window", "kv_fp8", "kv_int4"):
        program = llama(CASES[case])
        executor = make(program, tmp_path / case)
        tokens = tokens_for(program, 20)
        run(executor, tokens[:15], slot=0)
        executor.copy_slot(0, 3, 15)
        assert (
            run(executor, tokens[15:], 15, slot=3).tobytes()
            == run(executor, tokens[15:], 15, slot=0).tobytes()
        )
        with pytest.raises(GristmillError, match="destination is 4, expected 0 to 3"):
            executor.copy_slot(0, 4, 1)
        with pytest.raises(GristmillError, match="length is 65, expected 0 to 64"):
            executor.copy_slot(0, 1, 65)


@pytest.mark.parametrize("cache", ["f32", "f16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("window", [0, 7, 33])
def test_copied_rows_behind_a_common_prefix(cache: str, window: int, tmp_path: Path) -> None:
    """Starts and lengths within tiles and at their ends, in rings of 32 and 48 rows that positions go round
    twice, into slots that are as long as the source, shorter, and longer by no more than max_tokens."""
    program = llama(Llama(layers=1, cache=cache, window=window, max_tokens=15))
    executor = make(program, tmp_path, max_len=128)
    text, other = tokens_for(program, 110), tokens_for(program, 110, seed=2)
    for length in (1, 15, 16, 17, 40, 95, 96, 100):
        in_parts(executor, text[:length], 0)
        want = run(executor, text[length : length + 3], length, 0).tobytes()
        in_parts(executor, text[:length], 0)
        for start in {0, 1, 15, 16, 17, length // 2, length - 5, length - 1, length} & set(range(length + 1)):
            for held in {start, length - 1, length, length + 7}:
                if held < start:
                    continue
                in_parts(executor, np.concatenate([text[:start], other[start:held]]), 1)
                executor.copy_slot(0, 1, length, start)
                got = run(executor, text[length : length + 3], length, 1).tobytes()
                assert got == want, (length, start, held)


def in_parts(executor: Any, tokens: Array, slot: int) -> None:
    """Puts `tokens` into a slot, max_tokens at a time."""
    size = executor.max_tokens
    for at in range(0, len(tokens), size):
        run(executor, tokens[at : at + size], at, slot)


def test_copied_rows_begin_at_the_start(tmp_path: Path) -> None:
    program = llama(dataclasses.replace(CASES["int8"], window=0))
    executor = make(program, tmp_path)
    tokens, other = tokens_for(program, 31), tokens_for(program, 20, seed=2)
    run(executor, tokens[:30], slot=0)
    run(executor, other, slot=1)
    want = run(executor, np.concatenate([other[:16], tokens[:0]]), slot=2)[-1]
    executor.copy_slot(0, 1, 30, 16)
    assert run(executor, tokens[30:], 30, slot=1).tobytes() != run(executor, tokens[30:], 30).tobytes()
    assert run(executor, other[15:16], 15, slot=1)[-1].tobytes() == want.tobytes(), "rows 0 to 15 stay"
    for bad in (-1, 31):
        with pytest.raises(GristmillError, match=f"the start is {bad}, expected 0 to 30"):
            executor.copy_slot(0, 1, 30, bad)


def gpt2_like() -> Program:
    """Learned positions, layer norms, biases, mixed segments, leftovers as pointwise, a scaled tied head."""
    p = Program(61)
    x, y, z = p.value(48), p.value(48), p.value(96)
    embed = p.weight("embed", [30, 10, 21], 48, [Format("int8"), Format("int3", 32), Format("int4", 32)])
    p.add("embedding", ids="positions", weight=p.weight("wpe", [4100], 48, [Format()]), offset=2, out=y)
    p.add("embedding", ids="tokens", weight=embed, scale=1.5, residual=y, out=x)
    p.add(
        "layer_norm",
        **{"in": x, "weight": p.gain("w", 48), "bias": p.gain("b", 48), "eps": 1e-5, "residual": x, "out": y},
    )
    up = p.weight("up", [60, 36], 48, [Format("int4", 32, False), Format("int8", 32)])
    p.add(
        "linear",
        **{"in": y, "weight": up, "bias": p.gain("ub", 96), "activation": "gelu", "act_group": 32, "out": z},
    )
    one = p.value(1)
    p.add(
        "linear",
        **{
            "in": z,
            "weight": p.weight("one", [1], 96, [Format()]),
            "act_group": 0,
            "scale": 0.5,
            "softcap": 1.0,
            "out": one,
        },
    )
    p.add(
        "pointwise",
        **{
            "in": [[z[0], 48, 48], one, x],
            "out": x,
            "steps": [
                ["sigmoid", 0],
                ["mul", 3, 1],
                ["add", 4, {"const": 0.25}],
                ["maximum", 5, 2],
                ["gelu_tanh", 6],
            ],
        },
    )
    last = p.value(48, "R")
    p.add("gather_rows", **{"in": x, "out": last})
    p.add("linear", **{"in": last, "weight": "embed", "act_group": 32, "scale": 0.125, "out": [-1, 0, 61]})
    return p


def test_other_instructions(tmp_path: Path) -> None:
    program = gpt2_like()
    tokens = tokens_for(program, 30)
    got = run(make(program, tmp_path), tokens)
    assert_close(got, run(Reference(program), tokens), INTEGER_TOLERANCE)
    assert got.tobytes() == in_chunks(make(program, tmp_path, threads=1), tokens, [1] * 30).tobytes()


def test_weights_are_counted(tmp_path: Path) -> None:
    program = llama(CASES["f32"])
    executor = make(program, tmp_path)
    every = sum(m.size for m in program.matrices.values()) - program.matrices["embed"].size
    assert executor.weight_bytes_per_token == 4 * (every + CASES["f32"].hidden)
    assert executor.weight_bytes == (tmp_path / "weights.safetensors").stat().st_size


def test_concurrent_forwards_take_turns(tmp_path: Path) -> None:
    program = llama(dataclasses.replace(CASES["int4"], hidden=512, intermediate=1024))
    executor = make(program, tmp_path)
    expected = run(make(program, tmp_path), tokens_for(program, 30))
    results: dict[int, Array] = {}

    def work(slot: int) -> None:
        for _ in range(5):
            results[slot] = in_chunks(executor, tokens_for(program, 30), [10] * 3, slot)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[slot].tobytes() == expected.tobytes() for slot in range(4))


def in_child(check: Any) -> int:
    """The exit status of a forked child that runs `check`."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process")
def test_fork_after_a_forward_and_during_one(tmp_path: Path) -> None:
    program = llama(dataclasses.replace(CASES["int4"], hidden=512, intermediate=1024))
    executor = make(program, tmp_path)
    tokens = tokens_for(program, 30)
    expected = run(executor, tokens).tobytes()
    assert in_child(lambda: run(executor, tokens).tobytes() == expected) == 0
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            run(executor, tokens, slot=1)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        for _ in range(5):
            assert in_child(lambda: run(executor, tokens).tobytes() == expected) == 0
    finally:
        stop.set()
        busy.join()
    assert run(executor, tokens).tobytes() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([97], [0], [0], [0]), r"tokens\[0\] is 97, expected 0 to 96"),
        (([-1], [0], [0], [0]), r"tokens\[0\] is -1"),
        (([1], [64], [0], [0]), r"positions\[0\] is 64, expected 0 to 63"),
        (([1], [0], [4], [0]), r"slots\[0\] is 4, expected 0 to 3"),
        (([1], [0], [0], [1]), r"rows\[0\] is 1, expected 0 to 0"),
        (([], [], [], []), "got 0 tokens"),
        (([1] * 33, range(33), [0] * 33, []), "got 33 tokens, expected 1 to 32"),
        (([1, 1], [3, 3], [0, 0], [0]), "slot 0 has position 3 twice"),
        (([1, 1], [0], [0], [0]), "got 2 tokens, 1 positions and 1 slots"),
        (([1], [0], [0], [0] * 33), "got 33 rows"),
    ],
)
def test_bad_rows_are_refused(arguments: Any, message: str, tmp_path: Path) -> None:
    executor = make(llama(CASES["f32"]), tmp_path)
    with pytest.raises(GristmillError, match=message):
        executor.forward(*(ints(list(a)) for a in arguments))
    with pytest.raises(GristmillError, match="int32"):
        executor.forward(*(np.array(list(a), np.int64) for a in arguments))  # type: ignore[arg-type]
    assert executor.forward(ints([1]), ints([0]), ints([0]), ints([])).shape == (0, 97)


def test_positions_too_far_apart_for_a_ring(tmp_path: Path) -> None:
    executor = make(llama(CASES["window"]), tmp_path, max_len=64)
    with pytest.raises(GristmillError, match="positions 39 apart"):
        executor.forward(ints([1, 1]), ints([0, 39]), ints([0, 0]), ints([0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": 4097}, "max_len is 4097, expected 1 to 4096"),
        ({"max_slots": 0}, "max_slots is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"isa": "sse"}, "isa is 'sse', this CPU can run: auto, "),
        ({"max_len": 4096, "max_slots": 65536}, "caches for max_len 4096 and max_slots 65536"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    program = llama(
        Llama(kv_heads=4, k_dim=512, v_dim=512, rope_dims=2) if len(options) == 2 else CASES["f32"]
    )
    with pytest.raises(GristmillError, match=message):
        make(program, tmp_path, **options)


def edit(change: str) -> Program:
    """The small llama with one statement run on its json as `j` (and its first instructions by op name)."""
    program = llama(CASES["int8"])
    names = {"j": program.json}
    for instruction in program.json["instructions"]:
        names.setdefault(instruction["op"], instruction)
    exec(change, names)
    return program


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("j['format'] = 2", "field 'format' is 2, expected 1 to 1"),
        ("j['extra'] = 1", "program.json: unknown field 'extra'"),
        ("del j['values']", "field 'values' is missing"),
        ("linear['op'] = 'conv'", r"instructions\[2\]: field 'op' is 'conv', expected one of: embedding"),
        ("linear['in'] = [999, 0, 72]", r"instructions\[2\] linear: field 'in' is 999"),
        ("linear['in'] = [1, 0, 73]", "field 'in' is 73, expected 1 to 72"),
        ("linear['out'][2] = 71", "out has width 71, expected 144"),
        ("linear['act_group'] = 96", "act_group is 96, expected 0, 32, 64 or 128"),
        ("linear['weight'] = 'none'", "weight 'none' is not listed"),
        ("linear['bias'] = 'none'", "tensor 'none' is missing"),
        ("linear['bias'] = 'norm'", r"tensor 'norm' is 'F32' \[72\], expected F32 \[144\]"),
        ("linear['colour'] = 1", "linear: unknown field 'colour'"),
        ("linear['in'] = embedding['out']; linear['out'] = embedding['out']", "out has width 72"),
        ("rms_norm['out'] = rms_norm['in']", "in overlaps out in the arena"),
        ("rms_norm['in'] = [1, 0, 72]", "reads value 1 before it is written"),
        ("j['values'][1]['offset'] = 0", "in overlaps out in the arena"),
        ("j['values'][4]['offset'] = j['values'][0]['offset']", "residual overlaps out in the arena"),
        ("j['values'][5]['offset'] = 32", "offset 32 is not a multiple of 64"),
        ("j['arena_bytes'] -= 64", "of the arena, which has"),
        ("j['arena_bytes'] = 2**40", "'arena_bytes' is 1099511627776, expected 0 to"),
        ("attention['heads'] = 3", "3 heads over 2 kv heads"),
        ("attention['rope'] = 1", "field 'rope' is 1, expected -1 to 0"),
        ("attention['cache'] = 1", "caches\\[0\\]: no attention uses it|cache 1 is shared"),
        ("j['ropes'][0]['dims'] = 17", "dims is 17, expected an even number"),
        ("j['caches'][0]['k_dtype'] = 'int3'", "'int3', expected one of: f32, f16, int8, fp8, int4"),
        ("del j['caches'][0]['v_dtype']", "'v_dtype' is missing"),
        ("attention['hadamard'] = 4", "hadamard is 4, expected a power of two that divides k_dim 18"),
        ("attention['hadamard'] = 6", "hadamard is 6, expected a power of two"),
        ("attention['hadamard'] = -2", "'hadamard' is -2, expected 0 to"),
        ("j['instructions'].pop()", "no instruction writes the logits"),
        ("j['instructions'].append(j['instructions'][-1])", "writes the logits a second time"),
        ("gather_rows['out'] = embedding['out']", "expected in with rows T and out with rows R"),
        ("j['weights']['head'][0]['format'] = 'int5'", "'format' is 'int5'"),
        ("j['weights']['head'][0]['format'] = 'int3'", r"is 'I8' \[97, 128\], expected U8 \[97, 48\]"),
        ("j['weights']['head'][0]['format'] = 'int2'", r"is 'I8' \[97, 128\], expected U8 \[97, 32\]"),
        ("j['weights']['head'][0]['format'] = 'fp8'", r"is 'I8' \[97, 128\], expected U8 \[97, 128\]"),
        (
            "j['weights']['head'][0].update(format='fp8', symmetric=False)",
            "float formats have no zero point",
        ),
        (
            "j['weights']['head'][0]['n'] = 98",
            r"tensor 'head.0.weight' is 'I8' \[97, 128\], expected I8 \[98, 128\]",
        ),
        ("j['weights']['head'][0]['symmetric'] = False", "tensor 'head.0.zero' is missing"),
        ("j['vocabulary'] = 98", "ids reach 97, its weight has 97 rows|field 'out'|logits"),
        ("j['limits']['max_tokens'] = 10**6", "'max_tokens' is 1000000, expected 1 to 65536"),
        ("linear['scale'] = 1e300", "field 'scale' does not fit a float"),
        ("linear['glu'] = 1", "'glu' is a number, expected a boolean"),
    ],
)
def test_bad_programs_are_refused(change: str, message: str, tmp_path: Path) -> None:
    llama(CASES["int8"]).write(tmp_path)
    with pytest.raises(GristmillError, match=message):
        make(edit(change), tmp_path)


def test_profile_names_every_instruction(tmp_path: Path) -> None:
    program = llama(CASES["int8"])
    executor = make(program, tmp_path)
    executor.profile(True)
    run(executor, tokens_for(program, 8))
    results = executor.profile_results()
    assert [label.split()[1] for label, _, _ in results] == [i["op"] for i in program.json["instructions"]]
    assert sum(nanoseconds for _, nanoseconds, _ in results) > 0


@pytest.mark.parametrize(
    "order, message",
    [
        (np.zeros(72, np.int32), "holds 0 twice"),
        (np.arange(72, dtype=np.int32) + 1, r"order\[71\] is 72, expected 0 to 71"),
        (np.arange(72, dtype=np.int32) - 1, r"order\[0\] is -1, expected 0 to 71"),
        (np.arange(71, dtype=np.int32), r"\[71\], expected I32 \[72\]"),
        (np.arange(72, dtype=np.float32), "I32"),
    ],
    ids=["twice", "beyond", "negative", "short", "floats"],
)
def test_an_order_that_is_no_permutation_is_refused(order: Array, message: str, tmp_path: Path) -> None:
    program = llama(Llama(order=True))
    program.tensors["layers.0.qkv.order"] = order
    with pytest.raises(GristmillError, match=message):
        make(program, tmp_path)
