"""What becomes of the weights that a checkpoint holds quantized: kept as they are, or rounded anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..passes.graph import Traced
from ..quant.request import Keep, keep_scheme, parse_keep
from ..quant.scheme import Scheme
from .load import Source
from .lower import Assign, Lowered, round_anew
from .options import CompileOptions
from .quantized import QuantizedCheckpoint

FLOATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class Foreign:
    """The choice for one compile. checkpoint None: the model is a float one, and nothing differs.

    anew: everything is rounded anew; ends: which of embedding and head are; keeps: formats that were asked
    for some matrices, which win.
    """

    checkpoint: QuantizedCheckpoint | None
    anew: bool
    ends: frozenset[str]
    keeps: Sequence[Keep]

    def before_passes(self, traced: Traced) -> None:
        """Passes keep apart what is stored differently, so they have to know."""
        for lazy in traced.weights.values():
            if self.anew or keep_scheme(self.keeps, lazy.names[0].removesuffix(".weight"), "") is not None:
                lazy.quantized = None

    def after_passes(self, traced: Traced) -> None:
        """The passes show what the head is: forget quantized forms where a format for a role is asked."""
        if self.checkpoint:
            roles = {keep.pattern for keep in self.keeps}
            round_anew(traced, roles | self.ends)

    def assign(self, assign: Assign) -> Assign:
        """Linears that the checkpoint left as floats, beside others that it quantized, stay what they are;
        embedding and head too where it is whole."""
        checkpoint, keeps = self.checkpoint, self.keeps
        if checkpoint is None or self.anew:
            return assign

        def as_stored(role: str, name: str) -> Scheme:
            stored = f"{name}.weight"
            asked = keep_scheme(keeps, name, role) is not None or role in self.ends
            if asked or not (role == "linear" or checkpoint.reader.whole) or stored not in checkpoint:
                return assign(role, name)
            found = checkpoint.quantized(stored)
            if found is not None:  # its values were changed: the same numbers again, as far as they are ours
                return found.scheme or assign(role, name)
            return Scheme(FLOATS.get(checkpoint.dtype(stored), "f32"))

        return as_stored

    def record(self, lowered: Lowered) -> dict[str, Any]:
        """For the manifest: the method that quantized the checkpoint, and the matrices taken over from it."""
        if self.checkpoint is None:
            return {}
        reader = self.checkpoint.reader
        record: dict[str, Any] = {"method": reader.method, "kept": kept(lowered)}
        if reader.dequantized and not self.anew:
            record["dequantized"] = dict(reader.dequantized)
        return {"checkpoint": record}

    def summary(self, lowered: Lowered) -> dict[str, Any]:
        """A line for people."""
        if self.checkpoint is None:
            return {}
        reader, layers, count = self.checkpoint.reader, len(self.checkpoint.layers), len(kept(lowered))
        total = layers + sum(reader.dequantized.values())
        text = f"{reader.method}: {count} of {total} quantized matrices kept as they are"
        if count < layers or (self.anew and total):
            text += ", the others rounded anew from their values"
        elif reader.dequantized:
            kinds = ", ".join(f"{number} {kind}" for kind, number in reader.dequantized.items())
            text += f"; {kinds} dequantized to f16: no format here holds them exactly"
        return {"checkpoint": text}


def of(source: Source, options: CompileOptions) -> Foreign:
    """Whatever decides how integers are chosen (format, method, budget, rotation) rounds everything anew."""
    checkpoint = source.checkpoint if isinstance(source.checkpoint, QuantizedCheckpoint) else None
    asked = (options.weights, options.bits, options.size)
    anew = options.rotate or options.method != "rtn" or any(value is not None for value in asked)
    keeps = [parse_keep(text) for text in options.keep]
    ends = frozenset(role for role in ("embedding", "head") if getattr(options, role) is not None)
    return Foreign(checkpoint, anew, ends, keeps)


def kept(lowered: Lowered) -> list[str]:
    """Names of the matrices in the form in which the checkpoint holds them."""
    return [name for name, matrix in lowered.matrices.items() if matrix.lazy.quantized is not None]
