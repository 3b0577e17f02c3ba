"""Quantize the weights one matrix at a time and stream them into the artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..quant.tensor import QuantizedTensor, quantize_tensor, stored_shapes
from ..runtime.artifact_writer import ArtifactWriter
from ..runtime.errors import GristmillError
from ..runtime.weights_file import TensorSpec
from .lower import Lowered, Matrix

Progress = Callable[[str, float], None]


def write_weights(
    writer: ArtifactWriter, lowered: Lowered, metadata: dict[str, str], progress: Progress
) -> dict[str, float]:
    """Write weights.safetensors; returns the relative squared error of every quantized matrix by name.

    The file's header comes first and names every dtype. Scales are f16; a matrix whose scales need f32 is
    found while it is quantized, and the file is begun again with that known: rare, and cheaper than
    looking at every weight twice.
    """
    wide = {matrix.name for matrix in lowered.matrices.values() if matrix.wide}
    while True:
        found = _write_once(writer, lowered, metadata, wide, progress)
        if isinstance(found, dict):
            return found
        wide.add(found)


def _write_once(
    writer: ArtifactWriter, lowered: Lowered, metadata: dict[str, str], wide: set[str], progress: Progress
) -> dict[str, float] | str:
    """The errors, or the name of a matrix that needs f32 scales and was declared with f16 ones."""
    weights = writer.declare_weights(_specs(lowered, wide), metadata)
    errors: dict[str, float] = {}
    for count, matrix in enumerate(lowered.matrices.values()):
        tensor = matrix.stored() if matrix.stored else _rounded(matrix)
        if _scale_dtype(tensor) == "F32" and matrix.name not in wide:
            return matrix.name
        for stored in tensor.tensors:
            weights.write(stored.name, np.ascontiguousarray(stored.array))
        errors[matrix.name] = tensor.relative_error
        progress("weights", (count + 1) / len(lowered.matrices))
    for name, lazy in lowered.vectors.items():
        vector = lazy.load().numpy().astype(np.float32)
        if not np.isfinite(vector).all():
            raise GristmillError(f"weight {name!r} has values that are not finite; the checkpoint is damaged")
        weights.write(name, np.ascontiguousarray(vector))
    for name, beside in (lowered.orders | lowered.channel_scales).items():
        weights.write(name, np.ascontiguousarray(beside))
    return errors


def _rounded(matrix: Matrix) -> QuantizedTensor:
    return quantize_tensor(matrix.name, matrix.lazy.load(), matrix.scheme)


def _scale_dtype(tensor: QuantizedTensor) -> str | None:
    return next((t.dtype for t in tensor.tensors if t.name.endswith(".scale")), None)


def _specs(lowered: Lowered, wide: set[str]) -> Iterator[TensorSpec]:
    for matrix in lowered.matrices.values():
        scale_dtype = np.float32 if matrix.name in wide else np.float16
        n, k = matrix.lazy.shape
        for stored in stored_shapes(matrix.name, n, k, matrix.scheme, scale_dtype):
            yield TensorSpec(*stored)
    for name, lazy in lowered.vectors.items():
        yield TensorSpec(name, "F32", tuple(lazy.shape))
    for name, order in lowered.orders.items():
        yield TensorSpec(name, "I32", order.shape)
    for name, scale in lowered.channel_scales.items():
        yield TensorSpec(name, "F32", scale.shape)
