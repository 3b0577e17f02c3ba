"""Packing: what goes in comes out, and the bytes lie where the artifact's description says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill.quant import pack
from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import Scheme

SIZES = st.integers(1, 5), st.integers(1, 300)


def random_quantized(n: int, k: int, scheme: Scheme, seed: int) -> Quantized:
    draw = np.random.default_rng(seed)
    numbers, groups = scheme.numbers, scheme.groups(k)
    q = draw.integers(numbers.low, numbers.high + 1, (n, k)).astype(numbers.dtype)
    zero = draw.integers(numbers.low, numbers.high + 1, (n, groups)).astype(numbers.dtype)
    return Quantized(
        q, draw.random((n, groups), np.float32).astype(np.float16), None if scheme.symmetric else zero
    )


@given(
    *SIZES,
    st.sampled_from(["int8", "int4", "int3", "int2"]),
    st.sampled_from([0, 32, 64, 128]),
    st.booleans(),
    st.integers(0, 9),
)
def test_unpack_undoes_pack(n: int, k: int, name: str, group: int, symmetric: bool, seed: int) -> None:
    scheme = Scheme(name, group, symmetric).normalize(k)
    quantized = random_quantized(n, k, scheme, seed)
    back = pack.unpack(pack.stored_arrays(quantized, scheme), scheme, k)
    np.testing.assert_array_equal(back.q, quantized.q)
    np.testing.assert_array_equal(back.scale, quantized.scale)
    if quantized.zero is None:
        assert back.zero is None
    else:
        np.testing.assert_array_equal(back.zero, quantized.zero)


@given(*SIZES, st.integers(0, 9))
def test_int4_bytes_follow_the_definition(n: int, k: int, seed: int) -> None:
    scheme = Scheme("int4", 32, symmetric=False).normalize(k)
    quantized = random_quantized(n, k, scheme, seed)
    arrays = pack.stored_arrays(quantized, scheme)
    weight, zero = arrays["weight"], arrays["zero"]
    assert quantized.zero is not None
    assert weight.dtype == zero.dtype == np.uint8
    assert weight.shape == (n, -(-k // 64) * 32)
    assert zero.shape == (n, -(-scheme.groups(k) // 2))
    for row in range(n):
        for column in range(weight.shape[1] * 2):
            block, within = divmod(column, 64)
            nibble = weight[row, block * 32 + within % 32] >> (4 * (within // 32)) & 15
            assert nibble == (quantized.q[row, column] if column < k else 8)
        for group in range(scheme.groups(k)):
            assert zero[row, group // 2] >> (4 * (group % 2)) & 15 == quantized.zero[row, group]


@given(st.sampled_from(["int3", "int2"]), *SIZES, st.integers(0, 9))
def test_int3_and_int2_bytes_follow_the_definition(name: str, n: int, k: int, seed: int) -> None:
    scheme = Scheme(name, 32, symmetric=False).normalize(k)
    quantized = random_quantized(n, k, scheme, seed)
    arrays = pack.stored_arrays(quantized, scheme)
    weight, size = arrays["weight"], {"int3": 24, "int2": 16}[name]
    assert weight.dtype == np.uint8
    assert weight.shape == (n, -(-k // 64) * size)
    assert arrays["zero"].shape == (n, -(-scheme.groups(k) // 2))
    for row in range(n):
        for column in range(-(-k // 64) * 64):
            block, c = weight[row, column // 64 * size :], column % 64
            value = block[c % 16] >> c // 16 * 2 & 3
            if name == "int3":
                value |= (block[16 + c // 8] >> c % 8 & 1) << 2
            assert value == (quantized.q[row, column] if column < k else scheme.numbers.zero_point)


def test_fp8_rows_are_their_bits_padded_with_zeros() -> None:
    q = np.arange(130, dtype=np.uint8).reshape(2, 65)
    weight = pack.pack_weight(Quantized(q, np.ones((2, 1), np.float16), None), Scheme("fp8"))
    assert weight.shape == (2, 128)
    np.testing.assert_array_equal(weight[:, :65], q)
    assert not weight[:, 65:].any()


def test_int8_rows_are_padded_with_zeros_to_whole_blocks() -> None:
    q = np.full((2, 65), -128, np.int8)
    weight = pack.pack_weight(Quantized(q, np.ones((2, 1), np.float16), None), Scheme("int8"))
    assert weight.shape == (2, 128)
    assert (weight[:, :65] == -128).all()
    assert not weight[:, 65:].any()


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_float_formats_round_as_torch_does(name: str) -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(9, 70, generator=torch.manual_seed(1)) * 100
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]
    expected = values.to(dtype).float().numpy()
    np.testing.assert_array_equal(pack.decode_float(pack.encode_float(values.numpy(), name)), expected)
