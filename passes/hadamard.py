"""Orthogonal matrices of +1 and -1, and the rotation that one makes of a weight's rows or columns.

A Hadamard matrix H of order n has entries +1 and -1 and orthogonal rows: H Hᵀ = n I. Multiplied by random
signs and divided by √n it is a rotation that spreads a single large entry over all n coordinates, which is
what makes weights easy to quantize (arXiv 2404.00456, section 3). Powers of two come from Sylvester's
doubling; the widths of models have small odd factors besides, for which Paley's two constructions from the
squares modulo a prime give orders 12, 20, 28, 36, 44 ...; a Kronecker product joins the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SEED = 0
LARGEST_FACTOR = 64  # rows of one Kronecker factor of a power of two: a product by it costs 64 columns
CHUNK_ELEMENTS = 1 << 22  # 32 MiB of float64: what one step of a rotation holds


@dataclass(frozen=True)
class Rotation:
    """Q = diag(signs) (H₁ ⊗ H₂ ⊗ ...) / √size, for every ``size`` consecutive coordinates by themselves.

    factors: Hᵢ [hᵢ, hᵢ] float64 with the product of all hᵢ equal to size; signs: [size] float64, +1 or -1.
    """

    size: int
    factors: tuple[Tensor, ...]
    signs: Tensor

    @staticmethod
    def of(width: int, seed: int = SEED) -> Rotation | None:
        """The rotation of ``width`` coordinates: in one block where a Hadamard matrix of that order can be
        built, else in equal blocks as large as can be. None where not even blocks of four fit.
        """
        size = next((n for n in range(width, 3, -1) if width % n == 0 and orders(n) is not None), None)
        if size is None:
            return None
        built = orders(size)
        assert built is not None
        bits = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed))
        return Rotation(size, tuple(map(hadamard, built)), 1.0 - 2.0 * bits.double())

    def __str__(self) -> str:
        """`Hadamard matrix of order 96 = 12 × 8`."""
        sizes = " × ".join(str(len(f)) for f in self.factors)
        return f"Hadamard matrix of order {self.size}" + (f" = {sizes}" if len(self.factors) > 1 else "")

    def columns(self, w: Tensor, gain: Tensor | None = None) -> Tensor:
        """W diag(gain) Q: w [n, k] with k a multiple of size, gain [k] → [n, k] float32, through float64."""
        out = torch.empty(w.shape, dtype=torch.float32)
        step = max(1, CHUNK_ELEMENTS // w.shape[1])
        for start in range(0, w.shape[0], step):
            part = w[start : start + step].double()
            out[start : start + step] = self.rotate(part if gain is None else part * gain.double())
        return out

    def rows(self, w: Tensor) -> Tensor:
        """Qᵀ W: w [n, k] with n a multiple of size → [n, k] float32. A vector [n] gives Qᵀ w [n]."""
        if w.dim() == 1:
            return self.columns(w[None])[0]
        return self.columns(w.t()).t().contiguous()

    def rotate(self, x: Tensor) -> Tensor:
        """x Q in float64 for x [n, k]; one small product for every factor.

        A product moves the axis that it transforms to the end, so all axes stand in their places afterwards.
        """
        y = x.reshape(-1, self.size) * self.signs
        for factor in self.factors:
            y = y.reshape(len(y), len(factor), -1).transpose(1, 2) @ factor
            y = y.reshape(len(y), self.size)
        return (y / math.sqrt(self.size)).reshape(x.shape)


def orders(n: int) -> tuple[int, ...] | None:
    """Orders of Hadamard matrices that can be built, with the product n; None where there are none.

    >>> orders(4096), orders(5120), orders(96), orders(18)
    ((64, 64), (20, 64, 4), (12, 8), None)
    """
    odd = n
    while odd % 2 == 0:
        odd //= 2
    first = odd
    while odd > 1 and n % first == 0 and _paley(first) == 0:
        first *= 2
    if n % first:
        return None
    rest, found = n // first, [first] if first > 1 else []
    while rest > 1:
        found.append(min(rest, LARGEST_FACTOR))
        rest //= found[-1]
    return tuple(found)


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix [n, n] float64 of an order that `orders` names: H Hᵀ = n I exactly."""
    kind = _paley(n)
    if kind == 0:
        return _sylvester(n)
    return _paley_one(n - 1) if kind == 1 else _paley_two(n // 2 - 1)


def _paley(n: int) -> int:
    """Which of Paley's constructions gives order n = 4 m with m odd or not: 1, 2, or 0 for neither."""
    if n % 4 or n & (n - 1) == 0:
        return 0
    if _is_prime(n - 1):  # 3 modulo 4
        return 1
    return 2 if _is_prime(n // 2 - 1) and n % 8 == 4 else 0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _sylvester(n: int) -> Tensor:
    """H₂ₙ = [[H, H], [H, -H]]."""
    h, two = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    while len(h) < n:
        h = torch.kron(two, h)
    assert len(h) == n, f"{n} is no power of two"
    return h


def _bordered(q: int, corner: float) -> Tensor:
    """[[0, 1], [corner, χ(i - j)]] of order q + 1: χ is 1 for squares modulo q, -1 for others, 0 for 0."""
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)]).double()
    index = torch.arange(q)
    out = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    out[0, 1:], out[1:, 0] = 1.0, corner
    out[1:, 1:] = chi[(index[:, None] - index) % q]
    return out


def _paley_one(q: int) -> Tensor:
    """Order q + 1 for a prime q = 3 modulo 4: the bordered matrix is skew, and I + S is Hadamard."""
    return torch.eye(q + 1, dtype=torch.float64) + _bordered(q, -1.0)


def _paley_two(q: int) -> Tensor:
    """Order 2 (q + 1) for a prime q = 1 modulo 4, where the bordered matrix C is symmetric."""
    one, two = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    identity = torch.eye(q + 1, dtype=torch.float64)
    return torch.kron(_bordered(q, 1.0), one.double()) + torch.kron(identity, two.double())
