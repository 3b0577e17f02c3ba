"""Attention in Triton, in Triton's interpreter or on a device, against float64 over the same stored cache."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from compile_sm90 import compile_launches
from triton_caches import Case, Context
from triton_device import DEVICE, ahead_of_time, generator, on_device  # noqa: F401  (the fixture is for all)
from triton_matrices import int8_room
from triton_ptx import evaluate

from gristmill.kernels.triton import attention_warps
from gristmill.kernels.triton.attention import (
    Tiling,
    allocate_partials,
    attend,
    blocks_of,
    can_quantize,
    tiling,
    tilings,
)
from gristmill.kernels.triton.cache import allocate
from gristmill.kernels.triton.quantize import quantize
from gristmill.runtime.program import CACHE_TYPES

TOLERANCE = {"f32": 2e-5, "f16": 2e-3}  # of f32 products, and of queries and probabilities rounded to f16
DECODE, BLOCKS = Tiling(1, 64, 1, 4, 2), Tiling(8, 32, 1, 4, 2)
BY_WARPS = [f"attention {dtype} {rows}" for dtype in ("f16", "int8", "fp8") for rows in (1, 4)]
WARPS = Tiling(4, 64, 1, 4, 1, 4, 4)  # which go through the context by themselves


def run(context, q, positions, slots, tiles, blocks=True, quantized=None):
    case = context.case
    out = torch.full((len(q), case.heads * case.v_dim + 2), torch.nan)[:, 1:-1]
    table = blocks_of(positions, slots, tiles.rows) if blocks else None
    if table is not None:  # unused ones at the end
        table = torch.cat([table, torch.zeros(2, 4, dtype=torch.int32)])
    partials = allocate_partials(len(q), case.heads, tiles.splits, case.v_dim, DEVICE)
    for tensor in (partials.m, partials.l, partials.acc):
        tensor.fill_(torch.nan)
    rest = (case.softcap, context.sinks, table, partials, quantized)
    attend(q, context.cache, positions, slots, case.scale, tiles, out, *rest)
    return out


def check(context, rows, tiles, blocks=True):
    """rows: (slot, position) pairs."""
    slots, positions = torch.tensor(rows, dtype=torch.int32).T.contiguous()
    q = context.normal(len(rows), context.case.heads * context.case.k_dim) * 2
    got = run(context, q, positions, slots, tiles, blocks)
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
    check(context, [(0, 149), (1, 70), (2, 2)], DECODE)
    check(context, [(1, 109), (1, 110), (1, 111), (1, 112)], BLOCKS)


@pytest.mark.parametrize("k_dtype", ["f16", "int8", "fp8"])
@pytest.mark.parametrize("v_dtype", ["f16", "int8", "fp8"])
def test_every_cache_type_by_warps(k_dtype, v_dtype):
    softcap = 5.0 if k_dtype == "int8" else 0.0
    context = full(Context(Case(k_dtype, v_dtype, 8, 2, 64, 128, softcap=softcap, sinks=True), 150))
    check(context, [(0, 149), (1, 70), (2, 2)], WARPS, blocks=False)
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
    check(context, [(0, 149), (2, 0), (1, 63), (1, 64)], DECODE, blocks=False)
    check(context, [(0, p) for p in range(131, 150)] + [(2, p) for p in range(3)], BLOCKS)


@pytest.mark.parametrize("window", [1, 20, 64, 70])
@pytest.mark.parametrize("dtype", ["f16", "int8", "int4"])
def test_windows_in_rings(window, dtype):
    context = full(Context(Case(dtype, dtype, 4, 2, 16, 16, window), 300), 300)
    assert context.cache.ring < 150
    check(context, [(0, 299), (1, 262), (2, 1)], DECODE)
    check(context, [(0, p) for p in range(270, 300)] + [(2, p) for p in range(3)], BLOCKS)


@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("dtype", ["f32", "int8"])
def test_splits_are_combined(window, dtype):
    context = full(Context(Case(dtype, dtype, 4, 2, 16, 16, window, sinks=True), 2600), 2600)
    rows = [(0, 2599), (1, 2562), (0, 2048), (2, 0)] if not window else [(0, 2599), (1, 2562), (2, 2)]
    check(context, rows, Tiling(1, 64, 8, 4, 2))
    check(context, [(0, p) for p in range(2595, 2600)] + rows[-1:], Tiling(4, 256, 4, 4, 2))


@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("tiles", [Tiling(1, 128, 4, 8, 1, 8, 2), Tiling(2, 128, 4, 4, 1, 4, 2)])
def test_windows_and_splits_by_warps(window, tiles):
    context = full(Context(Case("int8", "fp8", 7, 1, 128, 64, window, sinks=True), 1100), 1100)
    check(context, [(0, 1099), (1, 1062), (2, 2), (2, 0)], tiles, blocks=False)
    check(context, [(0, p) for p in range(1022, 1027)] if not window else [(0, 1098), (0, 1099)], tiles)


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
        for blocks in (True, False):  # tiles of 16 queries and of 8
            again = run(context, q[some], positions[some], slots[some], WARPS, blocks)
            assert torch.equal(again, got[some])


@pytest.mark.parametrize("group", [32, 64])
def test_combined_splits_are_written_as_int8_too(group):
    context, tiles = full(Context(Case("int8", "f16", 4, 2, 64, 64), 160)), Tiling(1, 64, 4, 4, 2)
    assert can_quantize(context.cache, 4, tiles, group)
    assert not can_quantize(context.cache, 4, tiles, 128)  # two heads in a group
    assert not can_quantize(context.cache, 4, Tiling(1, 64, 1, 4, 2), group)  # nothing to combine
    slots, positions = torch.tensor([(0, 149), (1, 3)], dtype=torch.int32).T.contiguous()
    at_once, later = int8_room(2, 256, group), int8_room(2, 256, group)
    out = run(context, context.normal(2, 256), positions, slots, tiles, False, at_once)
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
    assert tiling(cache, 32, 4, 1).registers() == 128
    assert [tiles.parts for tiles in tilings(cache, 32, 4, 1)] == [8, 8, 4, 4, 4, 0]
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
    by_warps = [k for k in compiled if k.kernel == "_attend_kernel" and k.launch in BY_WARPS]
    assert len(by_warps) == len(BY_WARPS)
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
