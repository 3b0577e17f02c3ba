"""hadamard: the matrices are orthogonal, and products by factors are products by the whole."""

import pytest
import torch

from gristmill.passes.hadamard import Rotation, hadamard, orders

MODEL_WIDTHS = (
    64, 128, 256, 512, 576, 768, 896, 960, 1024, 1152, 1280, 1536, 1600, 2048, 2304, 2560, 2880, 3072, 3584,
    4096, 5120, 5376, 6144, 6656, 7168, 8192,
)  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 4, 64, 12, 20, 28, 36, 44, 60, 68, 76, 84, 104, 108])
def test_hadamard_matrices(n):
    h = hadamard(n)
    assert h.shape == (n, n)
    assert set(h.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("width", [4, 8, 12, 24, 40, 48, 64, 80, 96, 112, 172, 208, 256, 576, 100, 52])
def test_rotations_are_orthogonal(width):
    rotation = Rotation.of(width)
    assert rotation is not None
    assert width % rotation.size == 0
    q = rotation.rotate(torch.eye(width, dtype=torch.float64))
    assert float((q @ q.T - torch.eye(width)).abs().max()) < 1e-13
    assert float((q.abs() * rotation.size**0.5 - (q != 0).double()).abs().max()) < 1e-14
    assert {float(s) for s in rotation.signs} == {1.0, -1.0} or width == 4


@pytest.mark.parametrize("width", MODEL_WIDTHS)
def test_widths_of_models_take_one_block(width):
    rotation = Rotation.of(width)
    assert rotation is not None
    assert rotation.size == width
    assert max(len(f) for f in rotation.factors) <= 200  # a product by a factor stays cheap


@pytest.mark.parametrize("width, size", [(52, 4), (100, 20), (184, 8)])
def test_other_widths_take_blocks(width, size):
    rotation = Rotation.of(width)
    assert rotation is not None
    assert rotation.size == size
    assert orders(width) is None


@pytest.mark.parametrize("width", [1, 2, 3, 6, 15, 45, 90])
def test_widths_without_a_rotation(width):
    assert Rotation.of(width) is None


def test_rows_columns_and_gain():
    generator = torch.Generator().manual_seed(0)
    rotation = Rotation.of(12)
    assert rotation is not None
    q = torch.block_diag(*[rotation.rotate(torch.eye(12, dtype=torch.float64))] * 2).double()
    w, gain = torch.randn(5, 24, generator=generator), torch.rand(24, generator=generator)
    torch.testing.assert_close(rotation.columns(w, gain), (w.double() * gain @ q).float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(rotation.rows(w.t()), (q.T @ w.double().t()).float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(rotation.rows(w[0]), (w[0].double() @ q).float(), rtol=0, atol=1e-7)


def test_chunks_do_not_change_the_result(monkeypatch):
    rotation = Rotation.of(20)
    assert rotation is not None
    w = torch.randn(33, 20, generator=torch.Generator().manual_seed(0))
    whole = rotation.columns(w)
    monkeypatch.setattr("gristmill.passes.hadamard.CHUNK_ELEMENTS", 70)
    assert torch.equal(rotation.columns(w), whole)


def test_signs_follow_the_seed():
    first, again, other = Rotation.of(64), Rotation.of(64), Rotation.of(64, seed=1)
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.signs, again.signs)
    assert not torch.equal(first.signs, other.signs)
