"""Artifacts of one layer for the table of targets, and what each target makes of them."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from programs import Array, Format, Llama, llama, write_artifact
from programs import Program as Built
from tiny import VOCABULARY, byte_tokenizer
from torch import Tensor, nn

import gristmill
from gristmill.export.entry_points import Decode, Prefill
from gristmill.export.support import Target
from gristmill.runtime.artifact import MODEL_CONFIG, Artifact
from gristmill.runtime.program import Program
from gristmill.runtime.pt2.package import DECODE, PACKAGE, PREFILL

BASE = Llama(
    vocabulary=VOCABULARY + 1, hidden=64, intermediate=64, layers=1, heads=2, kv_heads=1, k_dim=32, v_dim=32,
    rope_dims=32,
)  # fmt: skip
INT4 = Format("int4", 32)
ROPE_BASE = 100.0  # of programs.llama
CASES = {
    "f32": BASE,
    "asymmetric": dataclasses.replace(BASE, form=Format("int4", 32, symmetric=False)),
    "order": dataclasses.replace(BASE, form=INT4, order=True),
    "act_int8": dataclasses.replace(BASE, form=INT4, act_group=32),
    "act_float": dataclasses.replace(BASE, form=INT4),
    "window": dataclasses.replace(BASE, window=7),
    "sinks": dataclasses.replace(BASE, sinks=True),
    "heads": dataclasses.replace(BASE, k_dim=16, rope_dims=16),
}
CASES |= {form: dataclasses.replace(BASE, form=Format(form)) for form in ("f16", "bf16", "fp8")}
CASES |= {form: dataclasses.replace(BASE, form=Format(form, 32)) for form in ("int8", "int4", "int3", "int2")}
CASES |= {f"kv_{kv}": dataclasses.replace(BASE, cache=kv) for kv in ("f32", "f16", "int8", "fp8", "int4")}
# What a Llama calls the segments of a layer.
MODULES = {
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "o": ["self_attn.o_proj"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"], "norm": ["input_layernorm"],
    "mlp_norm": ["post_attention_layernorm"],
}  # fmt: skip
ENDS = {"embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}


ROOM = TemporaryDirectory(prefix="targets-")  # until the process ends


@cache
def program(case: str) -> Built:
    return llama(CASES[case])


@cache
def artifact(case: str) -> Path:
    """As the compiler would have written it."""
    built = program(case)
    files = {
        "tokenizer.json": byte_pairs(),
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"},
        MODEL_CONFIG: {"model_type": "llama", "rope_theta": ROPE_BASE},
    }
    return write_artifact(built, Path(ROOM.name) / case, files, {"origins": origins(built)})


def byte_pairs() -> dict[str, Any]:
    """A tokenizer with one merge, without which llama.cpp has no byte pairs."""
    found: dict[str, Any] = json.loads(byte_tokenizer().to_str())
    found["model"]["vocab"]["ab"] = VOCABULARY
    found["model"]["merges"] = [["a", "b"]]
    return found


def origins(built: Built) -> dict[str, list[list[Any]]]:
    """What the checkpoint called each matrix and vector."""
    segments = [s for parts in built.json["weights"].values() for s in parts]
    found = {s["name"]: [[f"{called(s['name'])}.weight", s["n"], "checkpoint"]] for s in segments}
    norms = {name: len(array) for name, array in built.tensors.items() if name.endswith("norm")}
    return found | {name: [[f"{called(name)}.weight", n, "checkpoint"]] for name, n in norms.items()}


def called(name: str) -> str:
    """layers.0.qkv.1 -> model.layers.0.self_attn.k_proj"""
    parts = name.split(".")
    if parts[0] != "layers":
        return ENDS[parts[0]]
    number = int(parts[3]) if len(parts) > 3 else 0
    return f"model.layers.{parts[1]}.{MODULES[parts[2]][number]}"


@cache
def exported(target: Target, case: str) -> Path:
    """The artifact itself where a target runs it. Raises GristmillError where it is refused."""
    return artifact(case) if target.to is None else written(target, case, {})


def written(target: Target, case: str, more: dict[str, Any]) -> Path:
    out = Path(ROOM.name) / f"{target.name}-{case}".replace(" ", "").replace(":", "-")
    assert target.to is not None
    return gristmill.export_checkpoint(artifact(case), out, target.to, force=True, **target.options, **more)


def runs_on(target: Target) -> str:
    """The device; for onnx:cuda the CPU, which runs the same graph."""
    assert target.device is not None
    return "onnx:cpu" if target.device.name == "onnx:cuda" else target.device.name


@cache
def session(target: Target, case: str) -> gristmill.Session:
    return gristmill.load(exported(target, case), runs_on(target), threads=1, max_slots=4)


def write_uncompiled(path: Path, program: Program, *_: object) -> None:
    """In place of pt2_folder.write_package, which compiles for a minute: the program to be compiled."""
    path.write_bytes(program.to_bytes())


def uncompiled_runners(folder: Artifact, weights: dict[str, Tensor]) -> dict[str, nn.Module]:
    """What a package of `write_uncompiled` would have been compiled from."""
    program = Program.from_json(json.loads(folder.read(PACKAGE)))
    return {DECODE: Decode(program, weights), PREFILL: Prefill(program, weights)}


def logits(session: gristmill.Session, tokens: Array, slot: int, sizes: list[int]) -> Array:
    """Of all rows, so many in each forward."""
    parts, at = [], 0
    for size in sizes:
        rows = range(at, at + size)
        parts.append(session.forward(tokens[at : at + size], rows, [slot] * size))
        at += size
    session.reset(slot)
    return np.concatenate(parts)


def settings(path: Path) -> dict[str, Any]:
    """quantization_config of a checkpoint."""
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


class Checkpoint(dict[str, Any]):
    """The tensors of a directory, as readers of formats ask for them."""

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def read(self, name: str) -> Any:
        return self[name].float() if self[name].is_floating_point() else self[name]


def read_back(path: Path) -> Array:
    """The values of the first layer's q_proj."""
    from safetensors.torch import load_file

    from gristmill.quant import rtn
    from gristmill.quant.formats import reader

    tensors = Checkpoint(load_file(path / "model.safetensors"))
    weight = reader(settings(path)).weight(tensors, called("layers.0.qkv.0"))
    assert weight.scheme is not None
    return ordered(rtn.dequantize(weight.read(), weight.scheme), weight.order)


def stored(case: str) -> Array:
    """The same of the artifact."""
    built = program(case)
    rows = built.matrices["layers.0.qkv"][: BASE.heads * BASE.k_dim]
    return ordered(rows, built.tensors.get("layers.0.qkv.order"))


def ordered(w: Array, order: Array | None) -> Array:
    """Columns as the model has them: column j is column order[j] there."""
    if order is None:
        return w
    out = np.empty_like(w)
    out[:, order] = w
    return out
