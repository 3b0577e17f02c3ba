"""The append kernel in Triton, in Triton's interpreter or on a device, against formulas in float64."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from interpreter import quantize_cache
from triton_caches import prepared, ring_rows, rotary, stored
from triton_device import DEVICE, generator, on_device  # noqa: F401  (the fixture is for all)

from gristmill.kernels.triton.append import Preparation, append
from gristmill.kernels.triton.cache import allocate, copy_slot, layer_bytes
from gristmill.runtime.program import CACHE_TYPES, CacheSpec

EPS = 1e-6


def test_rope_tables_are_as_good_at_large_positions():
    positions = torch.tensor([0, 1, 4095, 131071], dtype=torch.int32)
    inv_freq, table = rotary(positions, 6, 1.25)
    angle = (positions[:, None].float() * inv_freq).double()  # the angle is rounded, its sine is not
    torch.testing.assert_close(table.cos.double(), angle.cos() * 1.25, rtol=0.0, atol=3e-7)
    torch.testing.assert_close(table.sin.double(), angle.sin() * 1.25, rtol=0.0, atol=3e-7)


CASES = [  # kv heads, head, rope columns, interleaved, scale, norm, Hadamard block
    (2, 8, 8, False, 1.0, False, 0),
    (3, 80, 20, False, 1.5, True, 16),
    (1, 96, 96, True, 1.0, False, 32),
    (1, 64, 0, False, 1.0, True, 64),
    (1, 5, 4, True, 1.0, False, 0),
    (2, 128, 96, False, 1.0, True, 128),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("warps", [1, 8])
def test_heads_are_normed_turned_and_appended(case, warps):
    kv_heads, dim, dims, interleaved, scale, normed, block = case
    torch.manual_seed(0)
    positions = torch.tensor([3, 4, 0, 7], dtype=torch.int32)
    slots = torch.tensor([1, 1, 0, 2], dtype=torch.int32)
    k, v = torch.randn(4, 2 * kv_heads * dim + 3)[:, 3:].split(kv_heads * dim, 1)
    norm = torch.rand(dim) + 0.5 if normed else None
    inv_freq, rope = rotary(positions, dims, scale, interleaved) if dims else (None, None)
    cache = allocate("f32", "f32", dim, dim, kv_heads, 3, 9, device=DEVICE)
    preparation = Preparation(None, norm, EPS, rope, block)
    append(k, v, positions, slots, cache, preparation, warps)
    settings = (norm, EPS, inv_freq, positions, interleaved, scale, block)
    wanted = prepared(k, kv_heads, *settings)
    where = (slots.long(), slice(None), positions.long())
    torch.testing.assert_close(stored(cache.k)[where], wanted, rtol=1e-5, atol=2e-6)
    assert torch.equal(cache.v.data[where], v.unflatten(1, (kv_heads, -1)))
    queries = torch.full((4, k.shape[1] + 1), torch.nan)[:, 1:]
    append(k, v, positions, slots, cache, Preparation(norm, norm, EPS, rope, block), warps, k, queries)
    torch.testing.assert_close(queries.double(), wanted.flatten(1), rtol=1e-5, atol=2e-6)
    cache.k.data[where], cache.v.data[where] = 0, 0
    assert not cache.k.data.any() and not cache.v.data.any()  # nothing else was written


def appended(x, dtype, warps=1):
    """What a cache of one head gives back for rows x [T, D]."""
    cache = allocate(dtype, dtype, x.shape[1], x.shape[1], 1, 1, len(x), device=DEVICE)
    positions = torch.arange(len(x), dtype=torch.int32)
    append(x, x, positions, torch.zeros_like(positions), cache, warps=warps)
    keys, values = stored(cache.k)[0, 0], stored(cache.v)[0, 0]
    torch.testing.assert_close(keys, values, rtol=0.0, atol=0.0, equal_nan=True)
    return keys


@pytest.mark.parametrize("dtype", CACHE_TYPES)
@pytest.mark.parametrize("dim", [1, 8, 31, 80, 128])
@pytest.mark.parametrize("warps", [1, 8])
def test_rows_are_rounded_as_the_cpu_rounds_them(dtype, dim, warps):
    torch.manual_seed(dim)
    x = torch.randn(4, dim)
    x[0], x[1] = 0.0, 7.25
    x[3, dim // 2] *= 30
    got = appended(x, dtype, warps)
    for row, back in zip(x.cpu(), got.cpu(), strict=True):
        wanted = quantize_cache(row.numpy(), dtype) if row.any() else np.zeros(dim)
        # a number in the middle of two may go either way, and two grids may be as good as each other
        error, least = np.square(back.numpy() - row.numpy()).sum(), np.square(wanted - row.numpy()).sum()
        assert abs(error - least) <= 1e-4 * least + 1e-12 * float(row.square().sum())
        step = (0.08 if dtype == "int4" else 0.01) * np.ptp(row.numpy())
        assert np.abs(back.numpy() - wanted).max() <= step + 1e-6


def test_e4m3_rounds_to_nearest_even():
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    for values in (codes, middles, middles * 1.001, middles * 0.999):
        x = torch.cat([values, -values, torch.tensor([448.0])])[None]
        assert torch.equal(appended(x, "fp8")[0], x[0].to(torch.float8_e4m3fn).double())


@pytest.mark.parametrize("dtype", CACHE_TYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_spoils_its_row_alone(dtype, bad):
    x = torch.randn(3, 40, generator=generator(0))
    clean = appended(x, dtype, 4)
    x[1, 3] = bad
    got = appended(x, dtype, 4)
    assert not got[1, 3].isfinite()
    assert torch.equal(got[::2], clean[::2])


def test_a_ring_wraps_and_a_prefix_is_copied():
    ring = ring_rows(3, 100, 2)
    assert (ring, ring_rows(0, 100, 2), ring_rows(99, 100, 2)) == (5, 100, 100)
    cache = allocate("int8", "int4", 8, 8, 2, 2, ring, window=3, device=DEVICE)
    torch.manual_seed(0)
    for position in range(7):
        x = torch.randn(1, 16) + position * 10
        append(x, x, torch.tensor([position]).int(), torch.tensor([1]).int(), cache)
    means = stored(cache.k)[1].mean((0, 2))
    assert [round(float(m) / 10) for m in means] == [5, 6, 2, 3, 4]
    copy_slot([cache], 1, 0, 2)
    for part in (stored(cache.k), stored(cache.v)):
        assert torch.equal(part[0, :, :2], part[1, :, :2]) and not part[0, :, 2:].any()
    copy_slot([cache], 1, 0, 7)
    assert torch.equal(stored(cache.v)[0], stored(cache.v)[1])


@pytest.mark.parametrize("dtype", CACHE_TYPES)
def test_rows_from_a_start_are_copied_and_no_others(dtype):
    ring = 5
    for start, length in [(0, 0), (0, 3), (2, 3), (1, 5), (3, 7), (4, 6), (9, 12), (7, 12), (3, 99)]:
        cache = allocate(dtype, dtype, 40, 8, 2, 2, ring, device="cpu")
        for part in (cache.k, cache.v):
            for tensor in [t for t in (part.data, part.scales) if t is not None]:
                tensor[1].fill_(1)
        copy_slot([cache], 1, 0, length, start)
        rows = {position % ring for position in range(start, length)}
        for part in (cache.k, cache.v):
            assert {r for r in range(ring) if (part.data[0, :, r] == 1).all()} == rows
            assert {r for r in range(ring) if part.data[0, :, r].any()} == rows
            if part.scales is not None:
                assert {r for r in range(ring) if (part.scales[0, :, :, r] == 1).all()} == rows
                assert {r for r in range(ring) if part.scales[0, :, :, r].any()} == rows


@pytest.mark.parametrize("dtype", CACHE_TYPES)
def test_bytes_are_what_is_allocated(dtype):
    cache = allocate(dtype, "f16", 96, 64, 2, 3, 7, device=DEVICE)
    tensors = [t for part in (cache.k, cache.v) for t in (part.data, part.scales) if t is not None]
    assert sum(t.nbytes for t in tensors) == layer_bytes(dtype, "f16", 96, 64, 2, 3, 7)
    if dtype != "int4":  # whose rows are whole blocks of 64 columns here
        spec = CacheSpec(2, 96, 64, dtype, "f16")
        assert layer_bytes(dtype, "f16", 96, 64, 2, 3, 7) == spec.row_bytes() * 3 * 7
