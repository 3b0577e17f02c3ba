"""Round to nearest: error bounds, ragged shapes, and the inputs that break quantizers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gristmill.quant import rtn, tensor
from gristmill.quant.scheme import GROUP_SIZES, Scheme, parse
from gristmill.quant.tensor import dequantize_tensor, quantize_tensor
from gristmill.runtime.errors import GristmillError

INTEGER = [Scheme(f, g, s) for f in ("int8", "int4") for g in (0, *GROUP_SIZES) for s in (True, False)]


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
    # Rounding the scale to f16 moves the ends of the range by levels * 2**-11 steps; the eighth-smaller
    # signed int4 scale may clip by up to one step, where q is at the end of its range.
    slack = scheme.numbers.levels * 2.0**-11
    ends = (quantized.q == scheme.numbers.low) | (quantized.q == scheme.numbers.high)
    clipped = ends if scheme.symmetric and scheme.format == "int4" else np.zeros_like(ends)
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


def test_the_signed_scale_is_taken_only_where_it_is_better() -> None:
    scheme = Scheme("int4", 32)
    w = weights(64, 256)
    groups = rtn.grouped(w, 32)
    error = ((rtn.dequantize(rtn.quantize(w, scheme), scheme) - w) ** 2).reshape(groups.shape).sum(-1)
    step = (np.abs(groups).max(-1) / 7).astype(np.float16).astype(np.float32)[..., None]
    plain = ((np.clip(np.rint(groups / step), -8, 7) * step - groups) ** 2).sum(-1)
    assert (error <= plain * (1 + 1e-5)).all()
    assert error.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("scheme", INTEGER, ids=str)
def test_zero_groups_and_zero_weights_stay_exactly_zero(scheme: Scheme) -> None:
    w = weights(4, 160)
    w[0] = 0
    w[1, :128] = 0
    w[2, ::3] = 0
    decoded = dequantize_tensor(quantize_tensor("w", w, scheme))
    assert np.isfinite(decoded).all()
    assert (decoded[w == 0] == 0).all()


@pytest.mark.parametrize("scheme", INTEGER, ids=str)
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


@pytest.mark.parametrize("scheme", INTEGER, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9, 3e37])
def test_scales_that_f16_cannot_hold_are_f32(scheme: Scheme, size: float) -> None:
    w = weights(3, 130)
    w[1] *= np.float32(size)
    stored = quantize_tensor("w", w, scheme)
    assert stored.tensors[1].dtype == "F32"
    decoded = dequantize_tensor(stored)
    error = np.linalg.norm((decoded[1] - w[1]) / np.float32(size)) / np.linalg.norm(w[1] / np.float32(size))
    assert error < (0.02 if scheme.format == "int8" else 0.25)


@pytest.mark.parametrize("scheme", [*INTEGER, parse("f32"), parse("bf16"), parse("f16")], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_numbers_are_refused_by_name(scheme: Scheme, bad: float) -> None:
    w = weights(5, 70)
    w[3, 69] = bad
    with pytest.raises(GristmillError, match=r"layers\.0\.q holds NaN"):
        quantize_tensor("layers.0.q", w, scheme)


def test_f16_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(GristmillError, match="bf16 or f32"):
        quantize_tensor("w", np.full((2, 2), 70000, np.float32), Scheme("f16"))


@pytest.mark.parametrize("scheme", [*INTEGER, parse("f32"), parse("bf16"), parse("f16")], ids=str)
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
