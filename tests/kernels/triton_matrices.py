"""Weight matrices in the stored layout, with what they stand for; without numbers, for compiling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from triton_device import DEVICE

from gristmill.kernels.triton import quantize as activations
from gristmill.kernels.triton.matrix import FLOATS, Matrix
from gristmill.quant.pack import stored_arrays
from gristmill.quant.rtn import Quantized
from gristmill.quant.scheme import Scheme

FORMATS = ("f32", "f16", "bf16", "fp8", "int8", "int4", "int3", "int2")


def random_matrix(
    fmt: str, n: int, k: int, group: int = 0, symmetric: bool = True, seed: int = 0, scale_type: str = "f16"
) -> tuple[Matrix, Tensor]:
    """A matrix of random bits and its weights [n, k] in f64, whose sums of k products are near 1."""
    rng, size = np.random.default_rng(seed), k**-0.5
    if fmt in FLOATS:
        data = torch.from_numpy(rng.standard_normal((n, k)) * size).to(FLOATS[fmt])
        return Matrix(fmt, n, k, 0, True, data), data.double()
    scheme = Scheme(fmt, group, symmetric)
    numbers, groups = scheme.numbers, scheme.groups(k)
    low, high = (0, 255) if fmt == "fp8" else (numbers.low, numbers.high)
    q = rng.integers(low, high + 1, (n, k)).astype(numbers.dtype)
    if fmt == "fp8":
        q[q & 0x7F == 0x7F] = 1  # no NaN
    shape = (n, groups)
    spread = 100.0 if fmt == "fp8" else (high - low) / 4
    scale = (rng.random(shape) + 0.5).astype(np.float32) * (size / spread)
    stored = torch.from_numpy(scale).to(FLOATS[scale_type])
    zero = None if symmetric else rng.integers(low, high + 1, shape).astype(numbers.dtype)
    arrays = stored_arrays(Quantized(q, scale, zero), scheme)
    values = torch.from_numpy(q).view(torch.float8_e4m3fn) if fmt == "fp8" else torch.from_numpy(q)
    column = np.arange(k) // (group or k)
    zeros = torch.from_numpy(np.full(shape, numbers.zero_point) if zero is None else zero).double()
    weights = (values.double() - zeros[:, column]) * stored.double()[:, column]
    packed = None if zero is None else torch.from_numpy(arrays["zero"])
    return Matrix(fmt, n, k, group, symmetric, torch.from_numpy(arrays["weight"]), stored, packed), weights


def int8_room(rows: int, k: int, group: int) -> activations.Quantized:
    """For activations, with numbers in it that must all be overwritten."""
    parts = activations.room(rows, k, group)
    q, scale = (torch.full(shape, 7, dtype=dtype, device=DEVICE) for shape, dtype in parts)
    return activations.Quantized(q, scale, group)
