"""Attention in Triton, in Triton's interpreter or on a device, against float64 over the same stored cache."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from compile_sm90 import compile_launches
from triton_caches import Case, Context, prepared, rotary
from triton_device import DEVICE, ahead_of_time, generator, on_device  # noqa: F401  (the fixture is for all)
from triton_matrices import int8_room
from triton_ptx import evaluate

from gristmill.kernels.triton import attention_warps
from gristmill.kernels.triton.append import AS_THEY_ARE, Preparation, append
from gristmill.kernels.triton.attention import attend, blocks_of, can_quantize
from gristmill.kernels.triton.attention_tilings import Tiling, tiling, tilings
from gristmill.kernels.triton.cache import allocate
from gristmill.kernels.triton.quantize import quantize
from gristmill.kernels.triton.splits import allocate_partials
from gristmill.runtime.program import CACHE_TYPES

TOLERANCE = {"f32": 2e-5, "f16": 2e-3}  # of f32 products, and of queries and probabilities rounded to f16
DECODE, BLOCKS = Tiling(1, 64, 1, 4, 2), Tiling(8, 32, 1, 4, 2)
FORMS = ("decoding at 32768,", "4 rows,")
BY_WARPS = [f"{form} {dtype}" for dtype in ("f16", "int8", "fp8") for form in FORMS]
WARPS = Tiling(4, 64, 1, 4, 1, 4, 4)  # which go through the context by themselves


def run(
    context, q, positions, slots, tiles, new=None, preparation=AS_THEY_ARE, quantized=None, partials=None
):  # fmt: skip
    """Rows alone in their slots with ``new`` keys and values, or in blocks of what is appended already."""
    case = context.case
    out = torch.full((len(q), case.heads * case.v_dim + 2), torch.nan)[:, 1:-1]
    table = None
    if new is None:  # unused blocks at the end
        table = torch.cat([blocks_of(positions, slots, tiles.rows), torch.zeros(2, 4, dtype=torch.int32)])
    partials = partials or empty_partials(context, len(q), tiles)
    attend(
        q, context.cache, positions, slots, case.scale, tiles, out, preparation, case.softcap, context.sinks,
        new, table, partials, quantized,
    )  # fmt: skip
    assert not partials.arrived.any(), "the next launch counts from zero"
    return out


def empty_partials(context, rows, tiles):
    case = context.case
    partials = allocate_partials(rows, case.heads, case.kv_heads, tiles.splits, case.v_dim, DEVICE)
    for tensor in (partials.m, partials.l, partials.acc):
        tensor.fill_(torch.nan)
    return partials


def new_rows(context, count):
    """Keys and values of rows, as columns of something wider."""
    case = context.case
    sizes = [case.kv_heads * case.k_dim, case.kv_heads * case.v_dim]
    return (context.normal(count, sum(sizes) + 3) + 0.25)[:, 3:].split(sizes, 1)


def check(context, rows, tiles, alone=False):
    """rows: (slot, position) pairs; alone: each its slot's only one, and new."""
    slots, positions = torch.tensor(rows, dtype=torch.int32).T.contiguous()
    q = context.normal(len(rows), context.case.heads * context.case.k_dim) * 2
    new = new_rows(context, len(rows)) if alone else None
    got = run(context, q, positions, slots, tiles, new)
    wanted = context.expected(q, positions, slots)
    exact = context.case.k_dtype == context.case.v_dtype == "f32"
    tolerance = TOLERANCE["f32" if exact else "f16"]
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    return q, positions, slots, got


def full(context, length=150):
    for slot, count in ((0, length), (1, length - 37), (2, 3)):
        context.fill(slot, count)
    return context


@pytest.mark.parametrize("k_dtype", CACHE_TYPES)
@pytest.mark.parametrize("v_dtype", CACHE_TYPES)
def test_every_cache_type(k_dtype, v_dtype):
    context = full(Context(Case(k_dtype, v_dtype, 6, 2, 40, 24, softcap=5.0, sinks=True), 150))
    check(context, [(0, 149), (1, 70), (2, 2)], DECODE, alone=True)
    check(context, [(1, 109), (1, 110), (1, 111), (1, 112)], BLOCKS)


@pytest.mark.parametrize("k_dtype", ["f16", "int8", "fp8"])
@pytest.mark.parametrize("v_dtype", ["f16", "int8", "fp8"])
def test_every_cache_type_by_warps(k_dtype, v_dtype):
    softcap = 5.0 if k_dtype == "int8" else 0.0
    context = full(Context(Case(k_dtype, v_dtype, 8, 2, 64, 128, softcap=softcap, sinks=True), 150))
    check(context, [(0, 149), (1, 70), (2, 2)], WARPS, alone=True)
    check(context, [(1, 109), (1, 110), (1, 111), (1, 112), (2, 0)], WARPS)


SHAPES = {
    "mha": Case("int8", "int8", 4, 4, 64, 64),
    "mqa": Case("fp8", "fp8", 8, 1, 64, 64),
    "narrow": Case("f16", "f16", 4, 2, 8, 16),
    "odd": Case("int4", "int4", 2, 1, 5, 33),
    "80 and 96": Case("int8", "fp8", 3, 1, 80, 96),
    "192 and 128": Case("int8", "int8", 3, 1, 192, 128),
    "256": Case("f16", "int4", 2, 1, 256, 256, sinks=True),
    "f32": Case("f32", "f32", 5, 1, 48, 16, sinks=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_heads(name):
    context = full(Context(SHAPES[name], 150))
    check(context, [(0, 149), (2, 0), (1, 64)], DECODE, alone=True)
    check(context, [(0, p) for p in range(131, 150)] + [(2, p) for p in range(3)], BLOCKS)


@pytest.mark.parametrize("window", [1, 20, 64, 70])
@pytest.mark.parametrize("dtype", ["f16", "int8", "int4"])
def test_windows_in_rings(window, dtype):
    context = full(Context(Case(dtype, dtype, 4, 2, 16, 16, window), 300), 300)
    assert context.cache.ring < 150
    check(context, [(0, 300), (1, 263), (2, 2)], DECODE, alone=True)
    check(context, [(0, p) for p in range(270, 300)] + [(2, p) for p in range(3)], BLOCKS)


@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("dtype", ["f32", "int8"])
def test_splits_are_combined(window, dtype):
    context = full(Context(Case(dtype, dtype, 4, 2, 16, 16, window, sinks=True), 2600), 2600)
    check(context, [(1, 2562), (0, 2599), (2, 3)], Tiling(1, 64, 8, 4, 2), alone=True)
    rows = [(0, 2599), (1, 2562), (0, 2048), (2, 0)] if not window else [(0, 2599), (1, 2562), (2, 2)]
    check(context, rows, Tiling(1, 64, 8, 4, 2))
    check(context, [(0, p) for p in range(2595, 2600)] + rows[-1:], Tiling(4, 256, 4, 4, 2))


@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("tiles", [Tiling(1, 128, 4, 8, 1, 8, 2), Tiling(2, 128, 4, 4, 1, 4, 2)])
def test_windows_and_splits_by_warps(window, tiles):
    context = full(Context(Case("int8", "fp8", 7, 1, 128, 64, window, sinks=True), 1100), 1100)
    check(context, [(0, 1099), (1, 1062), (2, 2)], tiles, alone=True)
    check(context, [(0, p) for p in range(1022, 1027)] if not window else [(0, 1098), (0, 1099)], tiles)


PREPARED = [  # case, rope columns, interleaved, norms, Hadamard block
    (Case("f16", "f16", 6, 2, 64, 64), 64, False, False, 0),
    (Case("int8", "int8", 3, 1, 80, 40, 90, 5.0, sinks=True), 20, False, True, 16),
    (Case("int4", "int4", 4, 2, 96, 33), 96, True, False, 32),
    (Case("fp8", "fp8", 2, 2, 64, 64, sinks=True), 0, False, True, 64),
    (Case("f32", "int8", 5, 1, 48, 16), 4, True, False, 0),
    (Case("int8", "f16", 16, 1, 16, 64), 16, False, False, 0),
    (Case("int8", "int8", 24, 1, 16, 16, 300), 16, False, False, 0),
]


PREPARED_BY_WARPS = [
    (Case("f16", "f16", 6, 2, 64, 64), 64, False, False, 0),
    (Case("int8", "int8", 3, 1, 64, 128, 90, 5.0, sinks=True), 20, False, True, 16),
    (Case("fp8", "int8", 16, 2, 128, 64), 96, True, False, 32),
]


def preparation_of(context, positions, dims, interleaved, norms, hadamard):
    q_norm, k_norm = torch.rand(2, context.case.k_dim, generator=context.random) + 0.5
    rope = rotary(positions, dims, 1.0, interleaved)[1] if dims else None
    return Preparation(q_norm if norms else None, k_norm if norms else None, 1e-6, rope, hadamard)


def bits(cache):
    """Of all that a cache holds, not a number or not."""
    tensors = [t for rows in (cache.k, cache.v) for t in (rows.data, rows.scales) if t is not None]
    return torch.cat([tensor.cpu().contiguous().view(torch.uint8).flatten() for tensor in tensors])


@pytest.mark.parametrize("case, dims, interleaved, norms, hadamard", PREPARED)
@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_alone_has_the_bits_of_one_that_was_appended_before(
    case, dims, interleaved, norms, hadamard, splits
):  # fmt: skip
    tiles = Tiling(max(1, 16 // (case.heads // case.kv_heads)), 32, splits, 8, 2)
    check_bits_of_a_row(case, dims, interleaved, norms, hadamard, tiles)


@pytest.mark.parametrize("case, dims, interleaved, norms, hadamard", PREPARED_BY_WARPS)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.usefixtures("rows_by_themselves")
def test_so_it_has_by_warps(case, dims, interleaved, norms, hadamard, splits):
    """Which multiply 8 queries of a row alone, and 16 of a block."""
    tiles = Tiling(max(1, 16 // (case.heads // case.kv_heads)), 64, splits, 4, 1, 4, 4)
    check_bits_of_a_row(case, dims, interleaved, norms, hadamard, tiles)


def check_bits_of_a_row(case, dims, interleaved, norms, hadamard, tiles):
    slots, positions = torch.tensor([(2, 3), (0, 700), (1, 256)], dtype=torch.int32).T.contiguous()
    results = []
    for alone in (True, False):
        context = full(Context(case, 720, seed=3), 700)
        partials = empty_partials(context, 3, tiles)
        for turn in range(2):  # the counters of one launch are the next one's
            preparation = preparation_of(context, positions + turn, dims, interleaved, norms, hadamard)
            q, new = context.normal(3, case.heads * case.k_dim), new_rows(context, 3)
            if not alone:
                k, v = new
                append(k, v, positions + turn, slots, context.cache, preparation, tiles.warps)
            out = run(
                context, q, positions + turn, slots, tiles, new if alone else None, preparation,
                partials=partials,
            )  # fmt: skip
            assert out.isfinite().all()
            results.append(out)
        results.append(bits(context.cache))
    for fused, separate in zip(results[:3], results[3:], strict=True):
        assert torch.equal(fused, separate)


@pytest.mark.parametrize("case, dims, interleaved, norms, hadamard", PREPARED)
def test_queries_are_prepared(case, dims, interleaved, norms, hadamard):
    context = full(Context(case, 150))
    slots, positions = torch.tensor([(0, 149), (1, 112), (2, 3)], dtype=torch.int32).T.contiguous()
    preparation = preparation_of(context, positions, dims, interleaved, norms, hadamard)
    q = context.normal(3, case.heads * case.k_dim) * 2
    got = run(context, q, positions, slots, DECODE, new_rows(context, 3), preparation)
    inv_freq = rotary(positions, dims)[0] if dims else None
    wanted = prepared(
        q, case.heads, preparation.q_norm, 1e-6, inv_freq, positions, interleaved, 1.0, hadamard
    ).flatten(1)  # fmt: skip
    wanted = context.expected(wanted, positions, slots)
    torch.testing.assert_close(got.double(), wanted, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("case", [Case("int8", "int8", 4, 2, 16, 16), Case("f16", "fp8", 3, 1, 16, 16, 90)])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.usefixtures("rows_by_themselves")
def test_a_row_has_the_same_bits_in_any_company(case, splits):
    context = full(Context(case, 300), 300)
    tiles = Tiling(8, 32, splits, 4, 2)
    rows = [(0, p) for p in range(286, 299)] + [(2, 0), (2, 1), (1, 262), (0, 285)]
    q, positions, slots, got = check(context, rows, tiles)
    order = torch.randperm(len(rows), generator=generator(0))
    for some in (order, torch.tensor([5]), torch.arange(4, 9)):
        again = run(context, q[some], positions[some], slots[some], tiles)
        assert torch.equal(again, got[some])


@pytest.mark.parametrize("case", [Case("int8", "int8", 4, 2, 64, 64), Case("f16", "fp8", 3, 1, 64, 64, 90)])
@pytest.mark.usefixtures("rows_by_themselves")
def test_a_row_has_the_same_bits_in_any_company_by_warps(case):
    context = full(Context(case, 300), 300)
    rows = [(0, p) for p in range(250, 263)] + [(2, 0), (1, 262), (0, 249)]
    q, positions, slots, got = check(context, rows, WARPS)
    for some in (torch.tensor([5]), torch.arange(4, 9)):
        again = run(context, q[some], positions[some], slots[some], WARPS)
        assert torch.equal(again, got[some])


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("alone", [True, False])
def test_results_are_written_as_int8_too(group, splits, alone):
    context = full(Context(Case("int8", "f16", 6, 2, 64, 64), 300), 300)
    assert can_quantize(context.cache, 6, group)
    assert not can_quantize(context.cache, 6, 128)  # two heads in a group
    rows = [(0, 299), (1, 3)] if alone else [(0, 297), (0, 298), (0, 299), (1, 3), (1, 4)]
    slots, positions = torch.tensor(rows, dtype=torch.int32).T.contiguous()
    at_once, later = int8_room(len(rows), 384, group), int8_room(len(rows), 384, group)
    new = new_rows(context, len(rows)) if alone else None
    q = context.normal(len(rows), 384)
    out = run(context, q, positions, slots, Tiling(4, 64, splits, 4, 2), new, quantized=at_once)
    quantize(out, later)
    assert torch.equal(at_once.q, later.q) and torch.equal(at_once.scale, later.scale)


def test_results_of_heads_of_96_columns_are_written_as_int8():
    context, tiles = full(Context(Case("f16", "f16", 2, 2, 16, 96), 150)), Tiling(1, 64, 1, 4, 2)
    assert can_quantize(context.cache, 2, 32)
    where = torch.tensor([149], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    at_once, later = int8_room(1, 192, 32), int8_room(1, 192, 32)
    out = run(context, context.normal(1, 32), *where, tiles, new_rows(context, 1), quantized=at_once)
    quantize(out, later)
    assert torch.equal(at_once.q, later.q) and torch.equal(at_once.scale, later.scale)


@pytest.mark.parametrize("tiles", [BLOCKS, WARPS])
def test_what_is_no_number_is_not_seen_before_it(tiles):
    context = full(Context(Case("int8", "int8", 2, 1, 64, 64), 150))
    rows = torch.arange(140, 148, dtype=torch.int32)
    slots, q = torch.zeros_like(rows), context.normal(8, 128)
    before = run(context, q, rows, slots, tiles)
    context.cache.k.scales[0, :, :, 145], context.cache.v.scales[0, :, :, 145] = torch.nan, torch.nan
    context.cache.k.scales[0, :, :, 148:], context.cache.v.scales[0, :, :, 148:] = torch.nan, torch.nan
    got = run(context, q, rows, slots, tiles)
    assert torch.equal(got[:5], before[:5]) and got[5:].isnan().all()


def test_small_scales_of_values_do_not_vanish():
    context = full(Context(Case("fp8", "fp8", 2, 1, 64, 64), 150))
    context.cache.v.scales[0] *= 1e-9
    slots, rows = torch.tensor([[0], [149]], dtype=torch.int32)
    q = context.normal(1, 128)
    wanted = context.expected(q, rows, slots)
    got = run(context, q, rows, slots, WARPS).double()
    assert (got - wanted).abs().max() < 2e-3 * wanted.abs().max()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_bytes_become_f16_exactly(dtype):
    """The assembly that an interpreter does not run, evaluated, for every byte at every place."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.int8 if dtype == "int8" else torch.float8_e4m3fn).half()
    for shift in range(4):
        x, y = (torch.stack([codes.roll(i + shift) for i in range(4 * j, 4 * j + 4)], 1) for j in (0, 5))
        wanted_x, wanted_y = (numbers[codes.long()] for codes in (x, y))
        one = getattr(attention_warps, f"{dtype.upper()}_NUMBERS").value
        got = torch.stack(evaluate(one, 2, [x]), 1).flatten(1)
        torch.testing.assert_close(got, wanted_x, rtol=0, atol=0, equal_nan=True)
        two = getattr(attention_warps, f"{dtype.upper()}_PAIRS").value
        got = torch.stack(evaluate(two, 4, [x, y]), 1)
        torch.testing.assert_close(
            got, torch.stack([wanted_x, wanted_y], 2), rtol=0, atol=0, equal_nan=True
        )


def test_blocks_are_consecutive_rows_of_a_slot():
    positions = torch.tensor([6, 7, 8, 9, 3, 4, 6, 0, 1], dtype=torch.int32)
    slots = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 2], dtype=torch.int32)
    wanted = [[0, 2, 1, 6], [2, 2, 1, 8], [4, 1, 1, 3], [5, 1, 1, 4]]
    wanted += [[6, 1, 1, 6], [7, 1, 0, 0], [8, 1, 2, 1]]
    assert blocks_of(positions, slots, 4).tolist() == wanted
    assert blocks_of(positions[:1], slots[:1], 1).tolist() == [[0, 1, 1, 6]]


def test_tilings_fill_the_device():
    cache = allocate("int8", "int8", 16, 16, 8, 1, 1 << 15, device="meta")
    assert tiling(cache, 32, 1, 1) == Tiling(1, 64, 64, 8, 3)
    short = allocate("int8", "int8", 16, 16, 8, 1, 2176, device="meta")
    assert tiling(short, 32, 1, 1).splits == 16, "the shortest splits of 256 positions, of which 9 hold some"
    assert tiling(cache, 32, 4, 4).rows == 4
    assert tiling(cache, 32, 512, 17).rows == 32 and tiling(cache, 32, 2048, 65).splits == 2
    assert tiling(cache, 32, 1, 64).splits == 2


def test_tilings_by_warps_fill_the_device():
    cache = allocate("int8", "int8", 128, 128, 8, 1, 1 << 15, device="meta")
    assert tiling(cache, 32, 4, 1) == Tiling(4, 128, 32, 8, 1, 8, 2), "256 programs on 264 places"
    assert tiling(cache, 32, 4, 4).splits == 16, "4 rows in two rounds, one block of them on 128 processors"
    assert tiling(cache, 32, 4, 64).splits == 1
    assert tiling(cache, 32, 4, 1).registers(8) == 128
    assert [tiles.parts for tiles in tilings(cache, 32, 4, 1)] == [8, 4, 4, 4, 4, 0]
    assert [tiles.parts for tiles in tilings(cache, 32, 512, 17)] == [0]
    for other in (("int4", "int8", 128), ("int8", "f32", 128), ("int8", "int8", 256), ("f16", "f16", 80)):
        cache = allocate(*other[:2], other[2], other[2], 8, 1, 1 << 15, device="meta")
        assert not tiling(cache, 32, 1, 1).parts


@ahead_of_time
def test_kernels_compile_for_sm_90():
    compiled = compile_launches("triton_attention_launches", 500)
    assert len(compiled) > 25
    for kernel in compiled:
        assert kernel.fits(), kernel.summary()
    check_warps(compiled, BY_WARPS)


@ahead_of_time
@pytest.mark.minutes
def test_every_form_compiles_for_sm_90():
    compiled = compile_launches("triton_more_attention_launches", 900)
    for kernel in compiled:
        assert kernel.fits(), kernel.summary()
    check_warps(compiled, BY_WARPS[::2])


def check_warps(compiled, names):
    by_warps = [k for k in compiled if k.kernel == "_attend_kernel" and k.launch in names]
    assert len(by_warps) == len(names)
    for kernel in by_warps:
        found = [body for body in loops(kernel.ptx) if "mma.sync" in body]
        assert len(found) == 2, "tiles that all rows see, and others"
        for body in found:  # Triton has found the layouts: nothing passes through shared memory
            assert "bar.sync" not in body and "st.shared" not in body, kernel.summary()


def loops(ptx):
    """From every label to the last branch back to it."""
    starts = {match[1]: match.start() for match in re.finditer(r"^(\$L\w+):", ptx, re.M)}
    ends = {match[1]: match.end() for match in re.finditer(r"bra(?:\.uni)?\s+(\$L\w+);", ptx)}
    return [ptx[start : ends[name]] for name, start in starts.items() if ends.get(name, 0) > start]
