"""Round to nearest: error bounds, ragged shapes, and the inputs that break quantizers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gristmill.quant import e4m3, rtn, tensor
from gristmill.quant.scheme import FORMATS, GROUP_SIZES, Scheme, parse
from gristmill.quant.tensor import dequantize_tensor, quantize_tensor
from gristmill.runtime.errors import GristmillError

GROUPS = (0, *GROUP_SIZES)
INTEGER = [Scheme(n, g, s) for n, f in FORMATS.items() if f.integer for g in GROUPS for s in (True, False)]
FP8 = [Scheme("fp8", g) for g in GROUPS]
FLOAT = [parse(n) for n, f in FORMATS.items() if not f.scaled]


def weights(n: int, k: int, seed: int = 0, spread: float = 0.02) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((n, k)) * spread).astype(np.float32)


def steps(scale: NDArray[np.floating], group: int, k: int) -> NDArray[np.float32]:
    """The scale of every column, [N, k]."""
    return np.repeat(np.abs(scale.astype(np.float32)), group or k, axis=1)[:, :k]


@given(
    st.integers(1, 4), st.integers(1, 300), st.sampled_from(INTEGER), st.integers(0, 9), st.floats(1e-3, 10)
)
def test_every_weight_is_within_half_a_step(n: int, k: int, scheme: Scheme, seed: int, spread: float) -> None:
    w = weights(n, k, seed, spread)
    quantized = rtn.quantize(w, scheme)
    error = np.abs(rtn.dequantize(quantized, scheme) - w)
    step = steps(quantized.scale, scheme.normalize(k).group_size, k)
    # Rounding the scale to f16 moves the ends of the range by levels * 2**-11 steps; the smaller signed
    # scale of few bits may clip by up to one step, where q is at the end of its range.
    slack = scheme.numbers.levels * 2.0**-11
    ends = (quantized.q == scheme.numbers.low) | (quantized.q == scheme.numbers.high)
    clipped = ends if scheme.symmetric and scheme.numbers.bits < 8 else np.zeros_like(ends)
    assert (error <= step * (0.5 + slack + clipped * 0.5)).all()


@pytest.mark.parametrize("scheme", INTEGER, ids=str)
def test_integers_are_the_nearest_for_the_stored_scale(scheme: Scheme) -> None:
    w, numbers = weights(3, 200), scheme.numbers
    quantized = rtn.quantize(w, scheme)
    best = np.abs(rtn.dequantize(quantized, scheme) - w)
    for shift in (-1, 1):
        q = np.clip(quantized.q.astype(int) + shift, numbers.low, numbers.high).astype(numbers.dtype)
        other = np.abs(rtn.dequantize(rtn.Quantized(q, quantized.scale, quantized.zero), scheme) - w)
        assert (best <= other + 1e-9).all()


@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
def test_the_signed_scale_is_taken_only_where_it_is_better(name: str) -> None:
    scheme = Scheme(name, 32)
    w = weights(64, 256)
    groups, numbers = rtn.grouped(w, 32), scheme.numbers
    below, above = numbers.zero_point, numbers.high - numbers.zero_point
    error = ((rtn.dequantize(rtn.quantize(w, scheme), scheme) - w) ** 2).reshape(groups.shape).sum(-1)

    def squared_error(scale: NDArray[Any]) -> NDArray[np.float32]:
        step = scale.astype(np.float16).astype(np.float32)[..., None]
        missed = np.clip(np.rint(groups / step), -below, above) * step - groups
        return np.asarray((missed**2).sum(-1))

    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
    plain, signed = squared_error(np.abs(largest) / above), squared_error(-largest / below)
    np.testing.assert_allclose(error, np.minimum(plain, signed), rtol=1e-5)
    assert error.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("scheme", [*INTEGER, *FP8], ids=str)
def test_zero_groups_and_zero_weights_stay_exactly_zero(scheme: Scheme) -> None:
    w = weights(4, 160)
    w[0] = 0
    w[1, :128] = 0
    w[2, ::3] = 0
    decoded = dequantize_tensor(quantize_tensor("w", w, scheme))
    assert np.isfinite(decoded).all()
    assert (decoded[w == 0] == 0).all()


@pytest.mark.parametrize("scheme", [*INTEGER, *FP8], ids=str)
@pytest.mark.parametrize("value", [1.0, -1.0, 1e-6, -3e4])
def test_constant_rows(scheme: Scheme, value: float) -> None:
    w = np.full((2, 96), value, np.float32)
    np.testing.assert_allclose(dequantize_tensor(quantize_tensor("w", w, scheme)), w, rtol=2**-10)


def test_int8_asymmetric_reaches_both_ends() -> None:
    w = np.linspace(-1, 3, 256, dtype=np.float32)[None]
    quantized = rtn.quantize(w, Scheme("int8", 0, symmetric=False))
    assert quantized.q.min() == -128
    assert quantized.q.max() == 127
    assert quantized.zero is not None
    assert quantized.zero[0, 0] == -64


def test_int8_symmetric_never_holds_minus_128() -> None:
    assert rtn.quantize(weights(8, 300), Scheme("int8")).q.min() >= -127


@pytest.mark.parametrize("k", [1, 31, 33, 64, 65, 130])
def test_a_group_wider_than_the_row_is_the_row(k: int) -> None:
    wide = quantize_tensor("w", weights(3, k), Scheme("int4", 128))
    assert wide.scheme.group_size == (0 if k <= 128 else 128)
    row = quantize_tensor("w", weights(3, k), Scheme("int4", 128 if k > 128 else 0))
    for a, b in zip(wide.tensors, row.tensors, strict=True):
        np.testing.assert_array_equal(a.array, b.array)


def test_a_short_last_group_has_a_scale_of_its_own() -> None:
    w = weights(2, 70)
    w[:, 64:] *= 1e-3
    whole, last = rtn.quantize(w, Scheme("int8", 64)), rtn.quantize(w[:, 64:], Scheme("int8"))
    np.testing.assert_array_equal(whole.scale[:, 1:], last.scale)
    np.testing.assert_array_equal(whole.q[:, 64:], last.q)


@pytest.mark.parametrize("scheme", [*INTEGER, *FP8], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9, 3e37])
def test_scales_that_f16_cannot_hold_are_f32(scheme: Scheme, size: float) -> None:
    w = weights(3, 130)
    w[1] *= np.float32(size)
    stored = quantize_tensor("w", w, scheme)
    assert stored.tensors[1].dtype == "F32"
    decoded = dequantize_tensor(stored)
    error = np.linalg.norm((decoded[1] - w[1]) / np.float32(size)) / np.linalg.norm(w[1] / np.float32(size))
    assert error < {"int8": 0.02, "fp8": 0.04, "int4": 0.25, "int3": 0.5, "int2": 0.9}[scheme.format]


@pytest.mark.parametrize("scheme", [*INTEGER, *FP8, *FLOAT], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_numbers_are_refused_by_name(scheme: Scheme, bad: float) -> None:
    w = weights(5, 70)
    w[3, 69] = bad
    with pytest.raises(GristmillError, match=r"layers\.0\.q holds NaN"):
        quantize_tensor("layers.0.q", w, scheme)


def test_f16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(GristmillError, match="bf16 or f32"):
        quantize_tensor("w", np.full((2, 2), 70000, np.float32), Scheme("f16"))


@pytest.mark.parametrize("scheme", [*INTEGER, *FP8, *FLOAT], ids=str)
def test_chunks_types_and_containers_do_not_change_the_bytes(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = torch.from_numpy(weights(50, 150)).bfloat16()
    whole = quantize_tensor("w", w, scheme)
    monkeypatch.setattr(tensor, "CHUNK_WEIGHTS", 1000)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    chunked = quantize_tensor("w", w.float().numpy(), scheme)
    assert whole.relative_error == chunked.relative_error
    for a, b in zip(whole.tensors, chunked.tensors, strict=True):
        assert (a.name, a.dtype) == (b.name, b.dtype)
        np.testing.assert_array_equal(a.array, b.array)


def test_stored_tensor_names_sizes_and_error() -> None:
    w = weights(6, 200)
    stored = quantize_tensor("q", w, Scheme("int4", 64, symmetric=False))
    shapes = {t.name: (t.dtype, t.array.shape) for t in stored.tensors}
    assert shapes == {"q.weight": ("U8", (6, 128)), "q.scale": ("F16", (6, 4)), "q.zero": ("U8", (6, 2))}
    expected = {"name": "q", "format": "int4", "n": 6, "k": 200, "group": 64, "symmetric": False}
    assert stored.segment() == expected
    error = ((dequantize_tensor(stored) - w) ** 2).sum() / (w**2).sum()
    assert stored.relative_error == pytest.approx(error, rel=1e-4)
    assert quantize_tensor("b", w, Scheme("bf16")).tensors[0].dtype == "BF16"


def test_e4m3_is_what_torch_has() -> None:
    bits = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(bits).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(e4m3.decode(bits), expected)
    numbers = bits[np.isfinite(expected)]
    np.testing.assert_array_equal(e4m3.encode(e4m3.decode(numbers)), numbers)


def test_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    values = np.unique(e4m3.decode(np.arange(127, dtype=np.uint8)))
    middles = (values[1:] + values[:-1]) / 2
    near = np.concatenate([values, middles, np.nextafter(middles, 0), np.nextafter(middles, 500)])
    x = np.concatenate([near, -near, weights(1, 4096, spread=40)[0], weights(1, 4096, spread=2.0**-8)[0]])
    expected = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(e4m3.encode(x), expected)
    beyond = np.array([449, 465, 1e30, np.inf], np.float32)
    for sign in (1, -1):
        np.testing.assert_array_equal(e4m3.decode(e4m3.encode(sign * beyond)), [sign * 448] * 4)


@pytest.mark.parametrize("scheme", FP8, ids=str)
def test_fp8_weights_are_the_nearest_for_the_stored_scale(scheme: Scheme) -> None:
    w = weights(3, 200)
    quantized = rtn.quantize(w, scheme)
    scaled = w / steps(quantized.scale, scheme.normalize(200).group_size, 200)
    values = e4m3.decode(np.arange(127, dtype=np.uint8))
    least = np.abs(np.abs(scaled)[..., None] - values).min(-1)
    np.testing.assert_allclose(np.abs(e4m3.decode(quantized.q) - scaled), least, atol=1e-4)
    assert (np.abs(e4m3.decode(quantized.q)).max(-1) >= 416).all()  # each row reaches the end of the range
