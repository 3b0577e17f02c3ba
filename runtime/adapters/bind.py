"""What an adapter's pairs are to a program: which segments of its linears they add to, with which rows of B.

A segment keeps the name of the checkpoint's tensor that it is made of; the manifest's `origins` say how: as
it is, turned (GPT-2's Conv1D, whose A and B are those of any linear), or with its rows in another order.
AWQ scales what linears read and give; the scales stand beside the weights, and A and B follow them. Where
compiling turned it (--rotate), A and B would be of another basis: such artifacts are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gristmill.runtime.adapters.peft import Pair, PeftAdapter, find_name, refuse_not_finite
from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import LOGITS, Program, Segment
from gristmill.runtime.weights_file import TensorSpec, read_header_bytes, read_tensor_offsets

MERGE = "merge it with `gristmill compile --lora`"
HEAD = "lm_head"  # what models call a head that is tied to the embedding
# instruction, segment, format, A [r, K], B [N, r], scale
LowRank = tuple[int, int, str, np.ndarray, np.ndarray, float]


@dataclass(frozen=True)
class Place:
    """A segment of a linear, and how its rows come from the checkpoint's tensor."""

    instruction: int
    number: int
    segment: Segment
    origin: str


def refuse_artifact(artifact: Artifact | None) -> None:
    """Raises GristmillError where compiling changed the basis of the linears' inputs."""
    quantization = {} if artifact is None else artifact.manifest["quantization"]
    changed = None
    if quantization.get("rotated"):
        changed = "--rotate, which turns what linears read and write"
    elif "awq" in str(quantization.get("method")) and not quantization.get("channel_scales"):
        changed = f"--method {quantization['method']} by a version that did not keep how it scaled linears"
    if changed is not None and artifact is not None:
        raise GristmillError(
            f"{artifact.path} was compiled with {changed}, so that adapters do not fit it; compile without "
            "it, or merge the adapter with `gristmill compile --lora`"
        )


class Beside:
    """Vectors that stand beside an artifact's weights, of its segments."""

    def __init__(self, artifact: Artifact | None) -> None:
        self._path = None if artifact is None else artifact.weights_path
        self._scaled = artifact is not None and bool(artifact.manifest["quantization"].get("channel_scales"))

    @cached_property
    def _tensors(self) -> dict[str, tuple[TensorSpec, int]]:
        """The file's tensors by name, each with its offset in the file."""
        if self._path is None:
            return {}
        begin = len(read_header_bytes(self._path))
        return {name: (spec, begin + at) for name, (spec, at) in read_tensor_offsets(self._path).items()}

    def channel_scales(self, segment: Segment) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What AWQ multiplied a segment's columns [k] and rows [n] by, None where it left them: its product
        is diag(rows) W diag(columns) x, of inputs x that were divided by the columns' scales."""
        if not self._scaled:
            return None, None
        return (
            self._read(f"{segment.name}.input_scale", "F32", segment.k),
            self._read(f"{segment.name}.output_scale", "F32", segment.n),
        )

    def rows(self, segment: Segment, count: int) -> np.ndarray:
        """Which rows of the checkpoint's tensor of `count` a segment has, in its order."""
        name = f"{segment.name}.rows"
        rows = self._read(name, "I32", segment.n)
        if rows is None:
            raise GristmillError(
                f"{self._path} does not say which rows {segment.name} has; compile the model again"
            )
        if int(rows.min()) < 0 or int(rows.max()) >= count:
            raise GristmillError(
                f"{self._path}: {name} names rows that there are not; compile the model again"
            )
        return rows

    def _read(self, name: str, dtype: str, count: int) -> np.ndarray | None:
        if self._path is None or name not in self._tensors:
            return None
        spec, offset = self._tensors[name]
        if (spec.dtype, spec.shape) != (dtype, (count,)):
            raise GristmillError(
                f"{self._path}: {name} is no vector of {count} {dtype}; compile the model again"
            )
        kind = np.int32 if dtype == "I32" else np.float32
        return np.array(np.memmap(self._path, kind, "r", offset, (count,)))


def bind(adapter: PeftAdapter, program: Program, artifact: Artifact | None) -> list[LowRank]:
    """The pairs as an executor takes them. Raises GristmillError for what does not fit, or only merges."""
    refuse_artifact(artifact)
    _refuse_unmergeable(adapter)
    places, beside = _places(program, artifact), Beside(artifact)
    found: list[LowRank] = []
    for module, pair in adapter.pairs.items():
        name = find_name(module, places)
        if name is None:
            kinds = sorted({known.rpartition(".")[2] for known in places})
            raise adapter.error(f"the model has no linear {module}; its linears are {', '.join(kinds)}")
        found += _pairs(adapter, pair, places[name], beside)
    return found


def _refuse_unmergeable(adapter: PeftAdapter) -> None:
    """What adds to no linear's product."""
    if adapter.replaced:
        raise adapter.error(
            f"it brings whole parameters ({min(adapter.replaced)}), which run time leaves alone; {MERGE}"
        )
    for module, pair in adapter.pairs.items():
        what = None
        if pair.embedding:
            what = "an embedding, and adapters at run time are of linears"
        elif pair.magnitude is not None:
            what = "changed by DoRA, which adapters at run time are not"
        elif pair.bias is not None:
            what = "given a bias (lora_bias), which adapters at run time have not"
        if what is not None:
            raise adapter.error(f"{module} is {what}; {MERGE}")


def _places(program: Program, artifact: Artifact | None) -> dict[str, list[Place]]:
    """The segments of linears by the module that the checkpoint's tensor belongs to."""
    origins: Mapping[str, Any] = {} if artifact is None else artifact.manifest.get("origins", {})
    places: dict[str, list[Place]] = {}
    head: list[Place] = []
    for index, instruction in enumerate(program.instructions):
        if instruction.op != "linear" or instruction.weight is None:
            continue
        for number, segment in enumerate(program.weights[instruction.weight]):
            parts = origins.get(segment.name) or [[f"{segment.name}.weight", segment.n, "checkpoint"]]
            name, _, origin = parts[0]
            place = Place(index, number, segment, str(origin))
            places.setdefault(str(name).removesuffix(".weight"), []).append(place)
            if instruction.out.value == LOGITS:
                head.append(place)
    if head and not any(name.rpartition(".")[2] == HEAD for name in places):
        places[HEAD] = head
    return places


def _pairs(adapter: PeftAdapter, pair: Pair, places: list[Place], beside: Beside) -> Iterator[LowRank]:
    n, k = sum({p.segment.name: p.segment.n for p in places}.values()), places[0].segment.k
    if pair.a.shape[1] != k:
        raise adapter.wrong_shape(pair.module, "lora_A", pair.a.shape, f"[{pair.rank}, {k}]")
    if pair.b.shape[0] != n:
        raise adapter.wrong_shape(pair.module, "lora_B", pair.b.shape, f"[{n}, {pair.rank}]")
    if pair.rank > k:
        raise adapter.error(f"{pair.module} has rank {pair.rank}, more than its {k} inputs; {MERGE}")
    for stored in (pair.a, pair.b):
        refuse_not_finite(adapter, pair.module, stored.floats())
    same = pair.a.dtype == pair.b.dtype
    for place in places:
        if place.origin not in ("checkpoint", "transposed", "rows"):
            raise adapter.error(f"{pair.module} was changed when it was compiled; {MERGE}")
        read, given = beside.channel_scales(place.segment)
        as_stored = same and read is None and given is None
        a, b = (pair.a.bits, pair.b.bits) if as_stored else (pair.a.floats(), pair.b.floats())
        if place.origin == "rows":
            b = b[beside.rows(place.segment, n)]
        if read is not None:
            a = a * read
        if given is not None:
            b = b * given[:, None]
        kind = pair.a.dtype.lower() if as_stored else "f32"
        first, second = np.ascontiguousarray(a), np.ascontiguousarray(b)
        yield place.instruction, place.number, kind, first, second, pair.scale
