"""What each target can, as the table of docs/targets.md: `python -m gristmill.export.support >
docs/targets.md`.

Cells come from the code that acts on them: runtime/devices.py, the exporters' own formats and checks. A row
of the table is a feature, a column a target; a new target is one entry of TARGETS. tests/test_targets.py does
what each cell says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gristmill.export import gguf_tensors, onnx_folder, onnx_weights, targets
from gristmill.export.onnx_folder import OnnxOptions
from gristmill.export.onnx_half import takes_half
from gristmill.runtime.devices import DEVICES, Device
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import CACHE_TYPES, CacheSpec, Segment

FLOATS, INTEGERS = ("f32", "f16", "bf16"), ("int8", "int4", "int3", "int2")
RUNS = {
    "batch": "sequences of a batch are multiplied together",
    "chunks": "prefill in chunks",
    "speculation": "speculation: prompt lookup, draft model",
    "copies": "beams and shared prefixes (slots are copied)",
    "hidden": "hidden states (`forward_hidden`, contrastive search)",
    "alike": "a row's bits do not depend on its batch",
    "adapters": "adapters beside the weights (`--adapter`), see [lora.md](lora.md)",
    "bench": "`gristmill bench`",
    "profile": "`bench --profile`",
    "tune": "`gristmill tune`",
    "threads": "`--threads`",
    "pages": "`--hugepages`, `--pin`",
    "ranks": "`--tensor-parallel`",
}
WEIGHTS = {name: name for name in (*FLOATS, *INTEGERS, "fp8")} | {
    "asymmetric": "int4 with zero points",
    "order": "int4 with a column order (act-order)",
}
ACTIVATIONS = {"act_int8": "int8 activations", "act_float": "float activations"}
CACHES = {f"kv_{dtype}": dtype for dtype in CACHE_TYPES}
SHAPES = {"window": "sliding window", "sinks": "attention sinks", "heads": "keys and values of other widths"}
GROUPS = {
    "Sessions": RUNS, "Weights": WEIGHTS, "Activations": ACTIVATIONS, "KV cache": CACHES, "Attention": SHAPES,
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """mark: "yes"; "as": done, in the way that `note` says; "no": refused in words that hold `note`; "-": a
    matter of the program that reads what is written."""

    mark: str
    note: str = ""

    def __str__(self) -> str:
        if self.mark in ("yes", "no") and self.note:
            return f"{self.mark}: {self.note}"
        return {"as": self.note, "-": ""}.get(self.mark, self.mark)


Cells = dict[str, Cell]
YES, OTHER = Cell("yes"), Cell("-")


@dataclass(frozen=True)
class Target:
    """name: what is given to --device or --to. device: what runs it, of `load`; None: another program. to,
    options: of the export; None: an artifact runs as it is. make: the cells of all features but those of
    sessions."""

    name: str
    make: Callable[[Target], Cells]
    device: Device | None = None
    to: str | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def cells(self) -> Cells:
        return _sessions(self.device) | self.make(self)


def _sessions(device: Device | None) -> Cells:
    """As runtime/devices.py says."""
    if device is None:
        return dict.fromkeys(RUNS, OTHER)
    return dict.fromkeys(RUNS, YES) | {
        "batch": YES if device.batched else Cell("as", "one after the other"),
        "alike": YES if device.alike else Cell("as", "within rounding"),
        "adapters": YES if device.adapters else Cell("no", "adapters at run time are for device 'cpu'"),
        "bench": YES if device.bench else Cell("no", "bench does not measure the memory"),
        "profile": YES if device.profile else Cell("no", "its runtime has its own"),
        "tune": YES if device.tune else Cell("no", "has nothing to tune"),
        "threads": YES if device.threads else Cell("no", "for device 'cpu'"),
        "pages": YES if device.pages else Cell("no", "for device 'cpu'"),
        "ranks": _ranks(device),
    }


def _ranks(device: Device) -> Cell:
    if not device.ranks:
        return Cell("no", "for devices 'cpu' and 'cuda'")
    return Cell("as", "by NCCL, never run on GPUs") if device.name == "cuda" else YES


def _all(target: Target) -> Cells:
    """What runs a Program as it is."""
    return dict.fromkeys((*WEIGHTS, *ACTIVATIONS, *CACHES, *SHAPES), YES)


def _torchscript(target: Target) -> Cells:
    kept = {name: Cell("as", "rounded so, kept in f32") for name in CACHES if name != "kv_f32"}
    return _all(target) | {"act_int8": Cell("as", "rounded so, multiplied in f32")} | kept


def _pt2(target: Target) -> Cells:
    """As in TorchScript, but that activations are never rounded."""
    return _torchscript(target) | {"act_int8": Cell("as", "by floats")}


def _onnx(target: Target) -> Cells:
    options = OnnxOptions(**target.options)
    half = options.activations == "f16"
    floats = "in f16" if half else "by floats"
    activations = {
        "act_int8": Cell("as", floats) if half or options.plain else YES,
        "act_float": Cell("as", floats) if half else YES,
    }
    wide = YES if options.plain else Cell("no", "are not for ONNX Runtime's GroupQueryAttention")
    caches = {f"kv_{dtype}": _onnx_cache(dtype, options) for dtype in CACHE_TYPES}
    weights = {name: _onnx_weight(name, options) for name in WEIGHTS}
    return weights | activations | caches | {"window": YES, "sinks": YES, "heads": wide}


def _onnx_weight(name: str, options: OnnxOptions) -> Cell:
    form = name if name in (*FLOATS, *INTEGERS, "fp8") else "int4"
    if options.activations == "f16" and not takes_half(onnx_weights.Kind.of(Segment("", form, 64, 64))):
        return Cell("as", "multiplied in f32")
    bits = onnx_weights.BITS.get(form)
    if options.plain and bits is not None:
        bits = max(bits, onnx_weights.PLAIN_BITS)
    return YES if bits is None or form == f"int{bits}" else Cell("as", f"in {bits} bits")


def _onnx_cache(dtype: str, options: OnnxOptions) -> Cell:
    try:
        (found,) = onnx_folder.caches([CacheSpec(1, 8, 8, dtype, dtype)], options)
    except GristmillError:
        return Cell("no", "export with --kv f32")
    return YES if found.k_dtype == dtype else Cell("as", f"in {found.k_dtype}")


def _gguf(target: Target) -> Cells:
    rounded = "rounded anew"
    weights = dict.fromkeys(FLOATS, YES) | {
        name: Cell("as", gguf_tensors.SMALLEST[name]) for name in (*INTEGERS, "fp8")
    }
    weights["fp8"] = Cell("as", f"{gguf_tensors.SMALLEST['fp8']}, {rounded}")
    weights |= {"asymmetric": Cell("as", "q4_1, q5_0 or q8_0"), "order": Cell("as", f"f16, {rounded}")}
    shapes = {
        "window": Cell("as", "the file's context is the window"),
        "sinks": Cell("no", "has attention sinks"),
        "heads": Cell("no", "does not rotate whole heads, with values as wide as keys"),
    }
    return weights | dict.fromkeys((*ACTIVATIONS, *CACHES), OTHER) | shapes


def _checkpoint(target: Target) -> Cells:
    """A quantized Hugging Face directory: integers of some bits, the rest as floats."""
    bits = targets.BITS[target.name]
    cells = dict.fromkeys(FLOATS, Cell("no", "has no integer linears")) | {"fp8": Cell("no", "format fp8")}
    for name in INTEGERS:
        cells[name] = YES if int(name.removeprefix("int")) in bits else Cell("no", f"format {name}")
    ordered = YES if target.name in targets.ORDERED else Cell("no", "a column order")
    cells |= {"asymmetric": YES, "order": ordered}
    return cells | dict.fromkeys((*ACTIVATIONS, *CACHES, *SHAPES), OTHER)


TARGETS = (
    Target("cpu", _all, DEVICES["cpu"]),
    Target("cuda", _all, DEVICES["cuda"]),
    Target("onnx:cpu", _onnx, DEVICES["onnx:cpu"], "onnx"),
    Target("onnx:cpu, --plain", _onnx, DEVICES["onnx:cpu"], "onnx", {"plain": True}),
    Target("onnx:cuda, --activations f16", _onnx, DEVICES["onnx:cuda"], "onnx", {"activations": "f16"}),
    Target("torchscript", _torchscript, DEVICES["torchscript"], "torchscript"),
    Target("pt2:cpu", _pt2, DEVICES["pt2:cpu"], "pt2"),
    Target("gguf", _gguf, to="gguf"),
    *(Target(name, _checkpoint, to=name) for name in targets.PLANNERS),
)

HEAD = """\
# Targets

What each target can, generated by `python -m gristmill.export.support > docs/targets.md` from the code that
acts on it. `tests/test_targets.py` does what a cell says, on a program of one layer, and sees the words of
each refusal; what `cuda` does is tested in Triton's interpreter, by tests that it names. `onnx:cuda` was
never run on a GPU: its folder is tested on ONNX Runtime's CPU provider, which runs the same f16 operators.
Cells of `pt2:cpu` are tested on the torch modules that its packages are compiled from, since each package
takes a minute; tests/test_pt2_export.py compiles one, of int4 with zero points.

The first seven columns are devices of `load` and `--device`, those of ONNX, TorchScript and AOTInductor for
exported folders (a folder of ONNX also runs in ONNX Runtime GenAI, see [export.md](export.md)); the others
are formats of `export --to` for other programs. Empty: a matter of that program. `no: ...`: refused, with
these words in the error. Sampling, constraints and all else that chooses tokens is the same on every device.
"""


def table() -> str:
    """docs/targets.md."""
    cells = {target.name: target.cells() for target in TARGETS}
    return "\n".join([HEAD, *_lines(cells)]) + "\n"


def _lines(cells: dict[str, Cells]) -> Iterator[str]:
    for group, features in GROUPS.items():
        yield f"## {group}\n"
        yield "| | " + " | ".join(f"`{name}`" for name in cells) + " |"
        yield "|---" * (len(cells) + 1) + "|"
        for feature, label in features.items():
            yield f"| {label} | " + " | ".join(str(found[feature]) for found in cells.values()) + " |"
        yield ""


if __name__ == "__main__":
    import sys

    sys.stdout.write(table().rstrip("\n") + "\n")
