"""Quantize a graph's linears by a calibrated method, walking a calibration set through it.

Two phases at most, and a last stage. `prepare` walks the float model: AWQ's channel scales are searched and
folded as each linear is met, and what every format would cost is measured where a budget of bits asks for it.
`quantize` walks the model that results: each linear is quantized for the inputs that the quantized linears
before it give, and its output computed with the new weights. Last, small models have all their scales tuned
together (tune_scales).

Until then only one linear's weights are in memory at a time; quantized ones go to the store.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.graph import Traced, arguments, is_op, ours, shape
from ..quant.grid import scale_type
from ..quant.hessian import Moments
from ..quant.methods import Calibrated, Input, Method, quantize_calibrated
from ..quant.rtn import Quantized
from ..quant.scheme import Scheme
from ..quant.tensor import (
    QuantizedTensor,
    dequantize_tensor,
    quantize_tensor,
    refuse_unusable,
    store_quantized,
)
from . import scale_channels
from .calibration_set import CalibrationSet
from .calibration_store import CalibrationStore, Point
from .lower import Lowered
from .sensitivity import Sensitivity
from .tune_scales import ScaleTuner, Tuning, default_epochs
from .walk import Walk

SAVE_EVERY_S = 15.0  # at least between two points: a point holds one value of the whole set
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE_BYTES = 1 << 20  # chunks of values are larger, what searches pieces of weights is smaller
PREPARE, QUANTIZE = "prepare", "quantize"
TUNED = ".tuned"  # version of a matrix in the store
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Recipe:
    """How to quantize. method: by its name in quant.methods; asymmetric_error: GPTAQ's term; tune_epochs: see
    `epochs`."""

    name: str
    method: Method
    act_order: bool = True
    damping: float = 0.01
    asymmetric_error: bool = True
    tune_epochs: int | None = None

    def epochs(self, traced: Traced, tokens: int) -> int:
        """Passes over ``tokens`` that tune the scales: as asked for, else some for small models by GPTQ."""
        if self.tune_epochs is not None:
            return self.tune_epochs
        return default_epochs(traced, tokens) if self.method.gptq else 0


@dataclass
class Calibration:
    """records: per matrix the scheme, the method, relative output errors before and after, and seconds.
    tuning: what tuning the scales did; those errors are from before it."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuning: Tuning | None = None
    warnings: list[str] = field(default_factory=list)


class Calibrator:
    """Runs the phases; ``point`` is where an earlier run had come to."""

    def __init__(
        self,
        traced: Traced,
        samples: CalibrationSet,
        recipe: Recipe,
        store: CalibrationStore,
        point: Point | None,
        progress: Progress,
    ) -> None:
        self.traced, self.samples, self.recipe, self.store = traced, samples, recipe, store
        self.point = point or Point(PREPARE, 0)
        self.progress = progress
        self.saved = time.monotonic()
        _give_back_freed_memory()
        scale_channels.apply(traced, self.point.factors)

    def prepare(self, lowered: Lowered, choices: Sequence[Scheme] = ()) -> dict[str, dict[str, float]]:
        """Search channel scales; given choices, measure their costs: matrix name → scheme → cost."""
        sensitivity = Sensitivity(lowered, choices, self.point.records)
        if self.point.phase == PREPARE and (self.recipe.method.awq or choices):
            walk = self._start(PREPARE)
            while not walk.done:
                node = walk.node
                if is_op(node, ours.linear.default):
                    self._scale(walk, node, lowered)
                    sensitivity.measure(walk, node)
                residual = sensitivity.residual_of(walk, node)
                walk.advance()
                sensitivity.weigh(walk, node, residual)
                self._passed(walk, None)
            sensitivity.finish()
        if self.point.phase == PREPARE:
            self._save(QUANTIZE, 0, {})
        return sensitivity.costs

    def _scale(self, walk: Walk, node: fx.Node, lowered: Lowered) -> None:
        if not self.recipe.method.awq:
            return
        site = scale_channels.find_site(self.traced, node)
        if site is None:
            return
        scheme_of = partial(_integer_scheme, self.traced, lowered)
        factors = scale_channels.search(walk, site, scheme_of, self.recipe.method.gptq)
        scale_channels.apply(self.traced, factors)
        for key, factor in factors.items():
            self.point.factors[key] = self.point.factors.get(key, torch.ones_like(factor)) * factor

    def quantize(self, lowered: Lowered) -> Calibration:
        """Quantize every integer linear; matrices get their stored form."""
        recipe, records = self.recipe, self.point.records
        walk = self._start(QUANTIZE, "own.")
        reference = self._start(QUANTIZE, "float.") if recipe.asymmetric_error else None
        visitor = _Quantizer(self, lowered, walk, reference)
        while not walk.done:
            walk.advance(visitor.visit)
            if reference is not None:
                reference.advance()
            self._passed(walk, reference)
        for name, matrix in lowered.matrices.items():
            if name in records.get("matrices", {}):
                matrix.stored = _reader(self.store, name)
        tuning = self._tune(lowered)
        return Calibration(records.get("matrices", {}), tuning, _warnings(self.samples, records))

    def _tune(self, lowered: Lowered) -> Tuning | None:
        """Replace the stored forms of tuned matrices. A resumed run tunes from the beginning."""
        epochs = self.recipe.epochs(self.traced, self.samples.tokens)
        if not epochs:
            return None
        records = self.point.records.get("matrices", {})
        names = [name for name, record in records.items() if record["method"] == self.recipe.name]
        tuner = ScaleTuner.of(self.traced, lowered, names, self.samples.samples)
        if tuner is None:
            return None
        asked = self.recipe.tune_epochs is not None
        tuning, results = tuner.run(epochs, asked, partial(self.progress, "tune"))
        for tensor in results:
            self.store.save_matrix(tensor, TUNED)
            lowered.matrices[tensor.name].stored = _reader(self.store, tensor.name, TUNED)
        return tuning

    def _start(self, phase: str, prefix: str = "own.") -> Walk:
        walk = Walk(self.traced, self.samples.samples)
        if self.point.phase == phase and self.point.at:
            values = {k.removeprefix(prefix): v for k, v in self.point.values.items() if k.startswith(prefix)}
            walk.restore(self.point.at, values)
        return walk

    def _passed(self, walk: Walk, reference: Walk | None) -> None:
        """After a node: tell how far it is, and save the point now and then."""
        share = walk.at / len(walk.steps)
        self.progress("prepare" if self.point.phase == PREPARE else "quantize", share)
        if walk.at_boundary and time.monotonic() - self.saved >= SAVE_EVERY_S:
            values = {f"own.{k}": v for k, v in walk.state().items()}
            if reference is not None:
                values |= {f"float.{k}": v for k, v in reference.state().items()}
            self._save(self.point.phase, walk.at, values)

    def _save(self, phase: str, at: int, values: dict[str, Tensor]) -> None:
        self.point.phase, self.point.at, self.point.values = phase, at, values
        self.store.save(self.point)
        self.point.values = {}
        self.saved = time.monotonic()


class _Quantizer:
    """Replaces weights by quantized ones, node by node."""

    def __init__(self, run: Calibrator, lowered: Lowered, walk: Walk, reference: Walk | None) -> None:
        self.run, self.lowered, self.walk, self.reference = run, lowered, walk, reference
        self.records = run.point.records.setdefault("matrices", {})

    def visit(self, node: fx.Node) -> Mapping[str, Tensor]:
        if is_op(node, ours.embedding.default):
            return self._round(arguments(node)["weight"])
        if not is_op(node, ours.linear.default):
            return {}
        weights = arguments(node)["weights"]
        done: dict[str, Tensor] = {}
        todo = []
        for weight in weights:
            scheme = _integer_scheme(self.run.traced, self.lowered, weight.name)
            if scheme is None or self._name(weight) in self.records:
                done |= self._round(weight)
            else:
                todo.append((weight, scheme))
        return done | self._calibrate(node, todo) if todo else done

    def _name(self, weight: fx.Node) -> str:
        return self.lowered.placeholders[weight.name]

    def _round(self, weight: fx.Node) -> dict[str, Tensor]:
        """A matrix that calibration does not quantize as the artifact will hold it, or one that is done."""
        name = self._name(weight)
        lazy = self.run.traced.weights[weight.name]
        if name in self.records:
            tensor = self.run.store.matrix(name)
        elif not scale_channels.is_float(lazy) or self.lowered.matrices[name].scheme.format == "f32":
            return {}
        else:
            start = time.perf_counter()
            scheme = self.lowered.matrices[name].scheme
            tensor = quantize_tensor(name, lazy.load(), scheme)
            if not scheme.is_integer:
                return {weight.name: torch.from_numpy(dequantize_tensor(tensor))}
            self.run.store.save_matrix(tensor)
            self.records[name] = _record(tensor.scheme, "rtn", None, None, time.perf_counter() - start)
        return {weight.name: torch.from_numpy(dequantize_tensor(tensor))}

    def _calibrate(self, node: fx.Node, todo: list[tuple[fx.Node, Scheme]]) -> dict[str, Tensor]:
        start = time.perf_counter()
        recipe = self.run.recipe
        shared = Input.of(self._moments(node), recipe.method, recipe.act_order, recipe.damping)
        if shared.dead:
            self.run.point.records.setdefault("dead", {})[self._name(todo[0][0])] = shared.dead
        groups: dict[tuple[Scheme, type], list[tuple[fx.Node, Tensor]]] = {}
        for weight, scheme in todo:
            w = self._load(weight)
            groups.setdefault((scheme, scale_type(w, scheme)), []).append((weight, w))
        out: dict[str, Tensor] = {}
        for (scheme, scale_dtype), group in groups.items():
            part = shared.of_rows(self._rows(node, [weight for weight, _ in group]))
            stacked = torch.cat([w for _, w in group])
            result = quantize_calibrated(stacked, part, scheme, scale_dtype, recipe.method)
            seconds, first = time.perf_counter() - start, 0
            for weight, w in group:
                rows = slice(first, first + len(w))
                share = seconds * len(w) / len(stacked)
                out[weight.name] = self._keep(weight, w, result, rows, scheme, share)
                first += len(w)
            start = time.perf_counter()
        return out

    def _rows(self, node: fx.Node, weights: list[fx.Node]) -> Tensor:
        """The output columns of a linear that some of its weights compute."""
        spans, first = {}, 0
        for weight in arguments(node)["weights"]:
            spans[weight] = torch.arange(first, first + self.run.traced.weights[weight.name].shape[0])
            first += len(spans[weight])
        return torch.cat([spans[weight] for weight in weights])

    def _moments(self, node: fx.Node) -> Moments:
        x, residual = arguments(node)["x"], _corrected_residual(node)
        chunks = self.walk.values[x]
        if self.reference is None:
            moments = Moments(chunks[0].shape[-1])
            for chunk in chunks:
                moments.add(chunk[0])
            return moments
        moments = Moments(chunks[0].shape[-1], True, 0 if residual is None else shape(residual)[-1])
        for i, chunk in enumerate(chunks):
            behind = None if residual is None else _behind(self.walk, self.reference, residual, i)
            moments.add(chunk[0], self.reference.values[x][i][0], behind)
        return moments

    def _load(self, weight: fx.Node) -> Tensor:
        w = self.run.traced.weights[weight.name].load()
        refuse_unusable(self._name(weight), w.numpy())
        return w

    def _keep(
        self, weight: fx.Node, w: Tensor, result: Calibrated, rows: slice, scheme: Scheme, seconds: float
    ) -> Tensor:
        """Store one matrix of the result; returns its weights as the artifact holds them."""
        q = result.quantized
        part = Quantized(q.q[rows], q.scale[rows], None if q.zero is None else q.zero[rows])
        tensor = store_quantized(self._name(weight), w, part, scheme)
        self.run.store.save_matrix(tensor)
        energy, before, after = (float(t[rows].sum()) for t in (result.energy, result.rtn, result.error))
        size = max(energy, 1e-300)
        record = _record(tensor.scheme, self.run.recipe.name, before / size, after / size, seconds)
        self.records[tensor.name] = record
        return torch.from_numpy(dequantize_tensor(tensor))


def _give_back_freed_memory() -> None:
    """Let glibc take large blocks from the system and return them when freed, and keep the smaller ones.

    By default it learns to keep blocks of up to 32 MiB, which is what chunks of values are: the heap then is
    as large as its holes make it. Small blocks come and go all the time, and fresh pages for each of them
    would take a third of the time. Other allocators are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


def _corrected_residual(node: fx.Node) -> fx.Node | None:
    """The residual that a linear can make up for: nothing but a sum stands between its product and it."""
    a = arguments(node)
    plain = a["activation"] == "none" and not a["glu"] and not a["softcap"] and a["scale"] == 1
    return a["residual"] if plain else None


def _behind(walk: Walk, reference: Walk, node: fx.Node, chunk: int) -> Tensor:
    """What a value of the float model has more [T, width]."""
    return reference.values[node][chunk][0] - walk.values[node][chunk][0]


def _integer_scheme(traced: Traced, lowered: Lowered, placeholder: str) -> Scheme | None:
    """The scheme of a matrix that is to be quantized to integers, else None."""
    name = lowered.placeholders.get(placeholder)
    if name is None or not scale_channels.is_float(traced.weights[placeholder]):
        return None
    scheme = lowered.matrices[name].scheme
    return scheme if scheme.is_integer else None


def _record(
    scheme: Scheme, method: str, before: float | None, after: float | None, seconds: float
) -> dict[str, Any]:
    return {
        "scheme": str(scheme),
        "method": method,
        "error_rtn": before,
        "error": after,
        "seconds": round(seconds, 3),
    }


def _reader(store: CalibrationStore, name: str, version: str = "") -> Callable[[], QuantizedTensor]:
    return lambda: store.matrix(name, version)


def _warnings(samples: CalibrationSet, records: Mapping[str, Any]) -> list[str]:
    return [
        f"{count} inputs of {name} were 0 in every calibration token: their weights are rounded to nearest"
        for name, count in records.get("dead", {}).items()
    ]
