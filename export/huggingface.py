"""An artifact → a quantized Hugging Face directory that transformers and vLLM load.

Weights are not rounded again: quantized linears go over integer by integer, everything else as floats that
hold its values exactly. The directory is written beside its place and renamed when complete.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from gristmill.export.folder import COPIED, Progress, new_folder
from gristmill.export.safetensors import TensorFile, smallest_float
from gristmill.export.targets import PLANNERS, Facts, Plan, plan_gptq
from gristmill.export.weights import Contents
from gristmill.quant.formats import gptq
from gristmill.runtime.artifact import MODEL_CONFIG, Artifact, open_artifact
from gristmill.runtime.errors import GristmillError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST_PARTS = 5  # tensors of a quantized layer


def export_checkpoint(
    artifact: str | Path,
    out: str | Path,
    to: str,
    checkpoint_format: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the artifact's model to the directory `out` as `gptq`, `awq` or `compressed-tensors`.

    checkpoint_format: `gptq` (v1) or `gptq_v2`, for gptq; None: v1 where all readers agree about it. force:
    replace an earlier export. Raises GristmillError for what the format cannot express, leaving nothing.
    """
    planner = _planner(to, checkpoint_format)
    opened = open_artifact(artifact)
    if MODEL_CONFIG not in opened.files:
        raise GristmillError(
            f"{opened.path} has no {MODEL_CONFIG}, which a {to} checkpoint needs: it was compiled from a "
            "module or a TorchScript file, and not from a Hugging Face directory"
        )
    contents = Contents(opened)
    layers = [_facts(contents, n) for n in range(len(contents.layers))]
    if not layers:
        raise GristmillError(f"{opened.path} has no integer linears that {to} could hold; compile with int4")
    plan = planner(layers, _float_linears(contents))
    with new_folder(out, force, _is_export) as staging:
        _write(staging, opened, contents, layers, plan, progress or (lambda stage, fraction: None))
    return Path(out).resolve()


def _planner(to: str, checkpoint_format: str | None) -> Any:
    if to not in PLANNERS:
        known = ", ".join([*PLANNERS, "gguf", "onnx", "torchscript", "pt2"])
        raise GristmillError(f"export to {to!r} is not supported; expected {known}")
    if checkpoint_format is None:
        return PLANNERS[to]
    if to != "gptq" or checkpoint_format not in gptq.CHECKPOINT_FORMATS:
        raise GristmillError(
            f"checkpoint format {checkpoint_format!r} of {to} is not known; expected "
            f"{' or '.join(gptq.CHECKPOINT_FORMATS)}, with gptq"
        )
    return partial(plan_gptq, checkpoint_format=checkpoint_format)


def _facts(contents: Contents, number: int) -> Facts:
    layer = contents.layers[number]
    has_zero_0 = False
    if not layer.segment.symmetric:
        *_, zero, _ = contents.layer(layer)
        has_zero_0 = bool((zero == 0).any())
    return Facts(layer, contents.tensor(f"{layer.segment.name}.scale").dtype.name, has_zero_0)


def _float_linears(contents: Contents) -> list[str]:
    """Modules that a server would take for quantized linears, but are not: the head among them."""
    linears = {i.weight for i in contents.program.instructions if i.op == "linear"}
    names = {s.name for key in linears if key for s in contents.program.weights[key]}
    found = [contents.origins[n][0][0].removesuffix(".weight") for n in contents.floats if n in names]
    return sorted({*found, "lm_head"})


def _write(
    folder: Path, opened: Artifact, contents: Contents, layers: list[Facts], plan: Plan, progress: Progress
) -> None:
    modules = [facts.layer.name for facts in layers]
    vectors = dict(contents.vectors())
    names = [f"{m}.weight_zero_point" for m in modules for _ in range(MOST_PARTS)]
    total = len(layers) + len(contents.floats)
    with TensorFile(folder / WEIGHTS, [*names, *contents.segments, *vectors]) as file:
        for count, facts in enumerate(layers):
            for suffix, array in plan.tensors(facts, contents.layer(facts.layer)).items():
                file.write(f"{facts.layer.name}.{suffix}", array)
            progress("weights", (count + 1) / total)
        for count, name in enumerate(contents.floats):
            tensor, values = contents.float_matrix(name)
            file.write(tensor, smallest_float(values))
            progress("weights", (len(layers) + count + 1) / total)
        for name, values in vectors.items():
            file.write(name, smallest_float(values))
    config = opened.json(MODEL_CONFIG)
    kinds = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    config |= dict.fromkeys(kinds, "float16") | {"quantization_config": plan.settings}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for name in COPIED:
        if name in opened.files:
            (folder / name).write_bytes(opened.read(name))


def _is_export(names: set[str]) -> bool:
    return {CONFIG, WEIGHTS} <= names <= {CONFIG, WEIGHTS, *COPIED}
