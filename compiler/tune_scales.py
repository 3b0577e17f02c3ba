"""Tune the scales of all linears together, so that the model predicts what the float model predicts.

The last stage of EfficientQAT (arXiv 2407.11062, section 3.3): integers and zero points stay, scales are
trained end to end. Here the loss is the KL divergence to the float model's next-token distribution, so that
no labels are learned, and a part of the samples is held out: tuned scales are kept only where the divergence
on those falls. What methods that fit one linear at a time cannot see, how errors meet in attention and in the
logits, is what there is to gain.

All weights are in memory here, unlike in the walk before: meant for small models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..passes.graph import Traced, arguments, aten, is_op, ours, shape
from ..quant import pack
from ..quant.grid import Grid
from ..quant.tensor import QuantizedTensor, dequantize_tensor, quantize_tensor, store_quantized
from . import interpret
from .lower import Lowered, Matrix
from .walk import sample_inputs

DEFAULT_EPOCHS = 2
MOST_OPERATIONS = 5e12  # that are spent where nobody asked for tuning: a few minutes on two processors
MOST_BITS = 4  # wider weights lose too little for scales to matter
WORTHWHILE_KL = 0.005  # nats: a model that loses less is left as it is, unless tuning was asked for
RATE = 4e-3  # of Adam, relative to each scale
BETAS = (0.9, 0.99)
WARM_STEPS = 8
BATCH = 4  # samples a step
HELD_SHARE = 8  # one sample in so many is held out
SEED = 0
# Arrays of the size of the weights, of the values and of the attention scores that are alive at the peak.
WEIGHT_COPIES, VALUE_COPIES, SCORE_COPIES = 5, 3, 3

Samples = Sequence[Sequence[int]]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Tuning:
    """What was done. kl_before, kl_after: nats, mean over the tokens of the held-out samples; kept: whether
    the tuned scales are what the artifact has."""

    epochs: int
    samples: int
    held_samples: int
    kl_before: float
    kl_after: float
    kept: bool

    def __str__(self) -> str:
        told = f"KL to the float model {self.kl_before:.5f}"
        if not self.epochs:
            return f"scales not tuned: {told} on {self.held_samples} calibration samples"
        result = "" if self.kept else "; the scales before are kept"
        return (
            f"scales tuned together, {self.epochs} x {self.samples} samples: {told} -> {self.kl_after:.5f} "
            f"on {self.held_samples} others{result}"
        )

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


@dataclass
class _Tuned:
    """A matrix on ``grid`` with integers q [N, K], whose scales are those of the grid times 1 + change."""

    matrix: QuantizedTensor
    grid: Grid
    q: Tensor
    change: Tensor

    @staticmethod
    def of(matrix: QuantizedTensor) -> _Tuned:
        found, scheme = pack.unpack(matrix.arrays, matrix.scheme, matrix.k), matrix.scheme
        scale = torch.from_numpy(found.scale.astype(np.float32))
        plain = torch.full_like(scale, scheme.numbers.zero_point)
        zero = plain if found.zero is None else torch.from_numpy(found.zero.astype(np.float32))
        grid = Grid(scale, zero, scheme, found.scale.dtype.type)
        q = torch.from_numpy(found.q.astype(np.float32))
        return _Tuned(matrix, grid, q, torch.zeros_like(scale, requires_grad=True))

    def weights(self) -> Tensor:
        """[N, K] f32."""
        return replace(self.grid, scale=self.grid.scale * (1 + self.change)).values(self.q)

    def result(self, w: Tensor) -> QuantizedTensor:
        """The matrix with its new scales; w: the float weights [N, K]."""
        grid = self.grid.with_scale(self.grid.scale * (1 + self.change.detach()))
        return store_quantized(self.matrix.name, w, grid.quantized(self.q), self.matrix.scheme)


class ScaleTuner:
    """Tunes the matrices of ``lowered`` that ``names`` are over ``samples``, of which it holds some out."""

    @staticmethod
    def of(traced: Traced, lowered: Lowered, names: Iterable[str], samples: Samples) -> ScaleTuner | None:
        """For those that are narrow enough. None where there are none, or no sample is left to train on."""
        narrow = [name for name in names if lowered.matrices[name].scheme.numbers.bits <= MOST_BITS]
        return ScaleTuner(traced, lowered, narrow, samples) if narrow and len(samples) > 1 else None

    def __init__(self, traced: Traced, lowered: Lowered, names: Iterable[str], samples: Samples) -> None:
        held = -(-len(samples) // HELD_SHARE)
        self.traced = traced
        self.train, self.held = list(samples[:-held]), list(samples[-held:])
        placeholders = {stored: placeholder for placeholder, stored in lowered.placeholders.items()}
        self.tuned: dict[str, _Tuned] = {}
        self.teacher = {name: lazy.load() for name, lazy in traced.weights.items()}
        self.fixed = dict(self.teacher)
        chosen = set(names)
        for name, matrix in lowered.matrices.items():
            placeholder = placeholders[name]
            if name in chosen and matrix.stored is not None:
                self.tuned[placeholder] = _Tuned.of(matrix.stored())
                del self.fixed[placeholder]
            else:
                self.fixed[placeholder] = _as_stored(matrix, self.teacher[placeholder])

    def run(self, epochs: int, always: bool, progress: Progress) -> tuple[Tuning, list[QuantizedTensor]]:
        """The tuned matrices, none where the ones there are stay. always: even where little is lost."""
        before = self._held_kl()
        if not always and before < WORTHWHILE_KL:
            return Tuning(0, len(self.train), len(self.held), before, before, False), []
        self._train(epochs, progress)
        results = {name: tuned.result(self.teacher[name]) for name, tuned in self.tuned.items()}
        self.fixed |= {name: torch.from_numpy(dequantize_tensor(result)) for name, result in results.items()}
        self.tuned = {}  # what is measured is what would be stored
        after = self._held_kl()
        kept = after < before
        done = Tuning(epochs, len(self.train), len(self.held), before, after, kept)
        return done, list(results.values()) if kept else []

    def _train(self, epochs: int, progress: Progress) -> None:
        changes = [tuned.change for tuned in self.tuned.values()]
        optimizer = torch.optim.Adam(changes, lr=RATE, betas=BETAS)
        generator = torch.Generator().manual_seed(SEED)
        passes = [torch.randperm(len(self.train), generator=generator) for _ in range(epochs)]
        order = torch.cat(passes).tolist()
        batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = RATE * _schedule(step, len(batches))
            optimizer.zero_grad()
            for i in batch:
                kl = self._kl(self.train[i], self._student())
                (kl / len(batch)).backward()
            optimizer.step()
            progress((step + 1) / len(batches))

    def _student(self) -> dict[str, Tensor]:
        return self.fixed | {name: tuned.weights() for name, tuned in self.tuned.items()}

    def _held_kl(self) -> float:
        with torch.no_grad():
            student = self._student()
            tokens = sum(len(sample) for sample in self.held)
            return sum(float(self._kl(s, student)) * len(s) for s in self.held) / tokens

    def _kl(self, sample: Sequence[int], student: Mapping[str, Tensor]) -> Tensor:
        """KL(float model || student), nats, mean over the sample's tokens."""
        inputs = sample_inputs([sample])
        with torch.no_grad():
            expected = functional.log_softmax(interpret.run_with(self.traced, inputs, self.teacher)[0], -1)
        found = functional.log_softmax(interpret.run_with(self.traced, inputs, student)[0], -1)
        return functional.kl_div(found, expected, reduction="sum", log_target=True) / len(sample)


def default_epochs(traced: Traced, tokens: int) -> int:
    """How often to go over ``tokens`` where nobody said: small models are tuned, large ones not."""
    return DEFAULT_EPOCHS if operations(traced, tokens, DEFAULT_EPOCHS) <= MOST_OPERATIONS else 0


def operations(traced: Traced, tokens: int, epochs: int) -> float:
    """Of the products: forwards of both models, and the backward, which is two more."""
    return 8.0 * weight_count(traced) * tokens * epochs


def peak_bytes(traced: Traced, sample_length: int) -> float:
    """Float weights, integers, the weights that they mean with gradients, and one sample's values."""
    nodes = [node for node, _ in interpret.steps(traced)]
    values = sum(shape(node)[-1] for node in nodes if not is_op(node, aten.slice.Tensor))
    heads = sum(arguments(node)["heads"] for node in nodes if is_op(node, ours.attention.default))
    return 4.0 * (
        WEIGHT_COPIES * weight_count(traced)
        + VALUE_COPIES * sample_length * values
        + SCORE_COPIES * heads * sample_length**2
    )


def weight_count(traced: Traced) -> int:
    """Weights of all linears."""
    found = {w.name for n, _ in interpret.steps(traced) if is_op(n, ours.linear.default) for w in
             arguments(n)["weights"]}  # fmt: skip
    return sum(math.prod(traced.weights[name].shape) for name in found)


def _schedule(step: int, steps: int) -> float:
    """Share of the rate: a short rise, then half a cosine down to 0."""
    return min(1.0, (step + 1) / WARM_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _as_stored(matrix: Matrix, w: Tensor) -> Tensor:
    """The weights [N, K] that the artifact will hold for w."""
    if matrix.stored is None and matrix.scheme.format == "f32":
        return w
    held = quantize_tensor(matrix.name, w, matrix.scheme) if matrix.stored is None else matrix.stored()
    return torch.from_numpy(dequantize_tensor(held))
