"""The quantization stage of a compile: formats are assigned, and where the method asks for it, calibrated.

Rounding to nearest needs nothing here: matrices are rounded while they are written. Other methods walk a
calibration set through the graph first; what they make waits in a store beside the artifact, which is
removed once the artifact is complete, and is what --resume goes on from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..passes.graph import Traced
from ..quant.methods import METHODS
from ..runtime.errors import GristmillError
from ..runtime.program import Limits
from ..runtime.tokenizer import Tokenizer
from . import foreign, scale_channels
from .calibrate import Calibration, Calibrator, Recipe
from .calibration_set import CalibrationSet, calibration_set
from .calibration_store import CalibrationStore, StoreFull
from .estimate import Estimate, estimate
from .formats import Formats
from .load import Source
from .lower import Lowered, lower
from .options import CompileOptions

Progress = Callable[[str, float], None]
Note = Callable[[str], None]


@dataclass
class Quantized:
    """What the rest of the compile needs: the lowered program, whose matrices bring their stored form where a
    method made it, and what there is to tell."""

    lowered: Lowered
    method: str = "rtn"
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    budget: str | None = None
    estimate: Estimate | None = None
    store: CalibrationStore | None = None

    def clear(self) -> None:
        """The artifact is complete: nothing is left to resume."""
        if self.store is not None:
            self.store.clear()


def quantize(
    traced: Traced, source: Source, options: CompileOptions, limits: Limits, tokenizer: Mapping[str, bytes],
    out: Path, versions: Mapping[str, str], report: Progress, note: Note,
) -> Quantized:  # fmt: skip
    """Lower the graph with every matrix's format decided and, for calibrated methods, its integers chosen."""
    formats = Formats.of(options)
    assign = foreign.of(source, options).assign(formats.scheme)
    build = partial(
        lower,
        traced,
        assign,
        options.cache_format,
        limits,
        float_activations=options.activations == "f32",
    )
    lowered = build()
    formats.check(lowered)
    method = METHODS[options.method]
    if not (method.calibrated or formats.has_budget):
        return Quantized(lowered)
    _refuse_floats(lowered, options)
    samples = calibration_set(
        options.calibration, Tokenizer.of_files(tokenizer), options.samples, options.sample_length
    )
    asymmetric = method.gptq and options.asymmetric_error
    recipe = Recipe(
        options.method, method, options.act_order, options.damping, asymmetric, options.tune_epochs
    )
    expected = estimate(traced, samples, recipe, formats.choices() if formats.has_budget else [])
    note(f"calibration: {samples.name}, {len(samples.samples)} samples, {samples.tokens} tokens; {expected}")
    for warning in _set_warnings(lowered, samples, options):
        note(f"warning: {warning}")
    store = CalibrationStore(out, _identity(source, options, samples, versions))
    run = Calibrator(traced, samples, recipe, store, store.open(options.resume), report)
    try:
        lowered, decided, result = _run(run, formats, lowered, build)
    except GristmillError as error:
        if not isinstance(error, StoreFull):  # nothing else is mended by going on
            store.clear()
        raise
    for warning in result.warnings:
        note(f"warning: {warning}")
    if result.tuning is not None:
        note(str(result.tuning))
    about = {
        "text": samples.name,
        "sha256": samples.sha256,
        "samples": len(samples.samples),
        "sample_length": samples.length,
    }
    tuning = result.tuning.record() if result.tuning is not None else None
    return Quantized(lowered, options.method, result.records, about, tuning, decided, expected, store)


def _run(
    run: Calibrator, formats: Formats, lowered: Lowered, build: Callable[[], Lowered]
) -> tuple[Lowered, str | None, Calibration]:
    """Both phases; between them a budget decides the formats, and the graph is lowered anew."""
    costs = run.prepare(lowered, formats.choices() if formats.has_budget else [])
    decided = None
    if formats.has_budget:
        decided = formats.choose(lowered, costs)
        lowered = build()
    result = run.quantize(lowered) if run.recipe.method.calibrated else Calibration()
    lowered.channel_scales = scale_channels.stored(lowered.placeholders, run.point.factors)
    return lowered, decided, result


def _refuse_floats(lowered: Lowered, options: CompileOptions) -> None:
    if not any(m.scheme.is_integer and lowered.roles[n] == "linear" for n, m in lowered.matrices.items()):
        raise GristmillError(
            f"method {options.method} needs integer weights, got weights {options.linear_format}; "
            "use int4 or int8"
        )


def _set_warnings(lowered: Lowered, samples: CalibrationSet, options: CompileOptions) -> list[str]:
    """A set too small for the widths: H = sum x x^T has at most as many dimensions as there are rows."""
    widest = max(m.lazy.shape[1] for n, m in lowered.matrices.items() if lowered.roles[n] != "embedding")
    found = []
    if len(samples.samples) < options.samples:
        found.append(
            f"{samples.name} has {len(samples.samples)} samples of {samples.length} tokens, "
            f"not {options.samples}; give a longer text"
        )
    if samples.tokens < 2 * widest:
        found.append(
            f"{samples.tokens} calibration tokens are few for linears of {widest} inputs: second moments "
            f"have too low a rank; give --samples {-(-2 * widest // samples.length)} or more"
        )
    return found


def _identity(
    source: Source, options: CompileOptions, samples: CalibrationSet, versions: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that the calibrated weights depend on."""
    return {
        "model": source.hashes,
        "options": options.for_quantization(),
        "calibration": samples.sha256,
        "versions": dict(versions),
        "torch_threads": torch.get_num_threads(),
    }
