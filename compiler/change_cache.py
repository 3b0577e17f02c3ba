"""Another cache type for an artifact that is there: its weights are copied, not computed again.

Types of cached keys and values stand in the program alone, so the result is what a compile with that type
gives, byte for byte but for the seconds in its manifest. The gate measures it like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.artifact import PROGRAM, WEIGHTS, Artifact, open_artifact
from ..runtime.artifact_writer import ArtifactWriter
from ..runtime.errors import GristmillError
from ..runtime.program import Program
from ..runtime.weights_file import read_header_bytes, read_tensors
from .exports import Export
from .load import load_source
from .options import CompileOptions
from .pipeline import accept, float_model

Progress = Callable[[str, float], None]
BLOCK_BYTES = 64 << 20
OWN = (  # fields of a manifest that the writer makes
    "kind", "format", "manifest_sha256", "content_id", "weights_header_sha256", "files",
)  # fmt: skip
REWRITTEN = (PROGRAM, WEIGHTS, "selftest.json", "evaluation.json")


def change_cache(
    model: str, base: str | Path, out: str | Path, options: CompileOptions, progress: Progress | None = None,
    export: Export | None = None,
) -> Path:  # fmt: skip
    """Writes `base` to `out` with the cache of `options`; the rest of them are what `base` was made with.

    model: what `base` was compiled from, for the gate. Raises GristmillError for another model, and as a
    compile does.
    """
    report = progress or (lambda stage, fraction: None)
    kv = options.cache_format
    assert not kv.rotate, "a rotated cache has another program"
    with ArtifactWriter(out, options.force) as writer:
        report("load", 0.0)
        source, opened = load_source(model), open_artifact(base)
        if opened.manifest["source"]["sha256"] != source.hashes:
            raise GristmillError(f"{base} was compiled from another model than {model}")
        opened.verify()
        program = Program.from_json(opened.json(PROGRAM))
        program.caches = [replace(cache, k_dtype=kv.k, v_dtype=kv.v) for cache in program.caches]
        _copy_weights(writer, opened, report)
        writer.write_bytes(PROGRAM, program.to_bytes())
        for name in opened.files.keys() - set(REWRITTEN):
            writer.write_bytes(name, opened.read(name))
        manifest = {key: value for key, value in opened.manifest.items() if key not in OWN}
        manifest["quantization"] = {**manifest["quantization"], "kv": str(kv)}
        report("trace", 0.0)
        traced = float_model(source, export).traced if options.gate else None
        accept(writer, manifest, traced, source, options, report)
        return writer.commit(manifest)


def _copy_weights(writer: ArtifactWriter, opened: Artifact, report: Progress) -> None:
    """The same tensors in the same order, so the same bytes."""
    header = read_header_bytes(opened.weights_path)
    entries: dict[str, Any] = json.loads(header[8:])
    tensors = list(read_tensors(opened.weights_path).values())
    weights = writer.declare_weights(tensors, entries.get("__metadata__"))
    data = np.memmap(opened.weights_path, np.uint8, "r", offset=len(header))
    for count, tensor in enumerate(tensors):
        first, end = entries[tensor.name]["data_offsets"]
        for at in range(first, end, BLOCK_BYTES):
            weights.write(tensor.name, data[at : min(at + BLOCK_BYTES, end)])
        report("weights", (count + 1) / len(tensors))
