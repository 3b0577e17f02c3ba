"""What a compile may be asked for. Read by the command line and by Python alike; imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from gristmill.quant.request import parse_bits, parse_keep, parse_size
from gristmill.quant.scheme import FORMATS, GROUP_SIZES, Format
from gristmill.runtime.decoding.options import refuse_unknown
from gristmill.runtime.errors import GristmillError

WEIGHTS = tuple(FORMATS)
FLOAT_WEIGHTS = tuple(name for name, numbers in FORMATS.items() if not numbers.scaled)
INTEGER_GROUP = 128  # columns per scale of integer linears, unless asked otherwise
METHOD_NAMES = ("rtn", "rtn+search", "gptq", "awq", "awq+gptq")
CALIBRATION = (
    "calibration",
    "samples",
    "sample_length",
    "resume",
    "act_order",
    "damping",
    "asymmetric_error",
    "tune_epochs",
)
KV_TYPES = ("f32", "f16", "int8", "fp8", "int4")


@dataclass(frozen=True)
class CacheFormat:
    """Types of cached keys and values; ``rotate``: a Hadamard transform on queries and keys before."""

    k: str
    v: str
    rotate: bool = False

    def __str__(self) -> str:
        return (self.k if self.k == self.v else f"{self.k}/{self.v}") + (" rotated" if self.rotate else "")


@dataclass(frozen=True)
class CompileOptions:
    """None means: chosen from the others, see the properties below; `of` checks that they go together.

    weights: format of the linear layers; None: int4, or as they are in a checkpoint that is quantized already
    (a format given here rounds its weights anew). group_size: columns per scale, 32, 64, 128 or "row".
    asymmetric: zero points. embedding, head: formats of the two ends (a tied pair is one matrix). kv: type of
    the cache; kv_k, kv_v: of its keys, of its values; kv_rotate: rotate queries and keys so that no column of
    a key stands out. max_len, max_slots, max_tokens: positions per slot, sequences, and rows of one forward
    that the artifact is planned for. text: file of held text for the gate; gate_tokens: how many of its
    tokens; max_ppl_increase (0.02 or "2%") and max_kl (nats): what the gate lets pass; device: where it runs
    the artifact, cpu or cuda. rotate: turn the residual stream by a Hadamard matrix, or refuse.

    method: how integers are chosen, see quant.methods. calibration: a text file, a JSONL file or a hub data
    set, None for Python's own library; samples, sample_length: how much of it, in tokens. resume: go on with
    a calibration that was killed. act_order, damping, asymmetric_error: of GPTQ. tune_epochs: passes over the
    samples that tune all scales together, None: 2 for small models by GPTQ, else 0. bits: average stored bits
    per weight; size: of the weights file, such as "400MB"; either lets every linear have its own width.
    keep: formats by pattern, such as "f16:head". lora: folders of PEFT adapters, merged into the weights
    before they are rounded; several add up. activations: what integer weights are multiplied by, int8 or f32.

    explain: keep the pass ledger in the result;
    check_passes: run each pass's before and after.
    """

    weights: str | None = None
    group_size: int | str | None = None
    asymmetric: bool = False
    embedding: str | None = None
    head: str | None = None
    kv: str | None = None
    kv_k: str | None = None
    kv_v: str | None = None
    kv_rotate: bool = False
    max_len: int | None = None
    max_slots: int = 8
    max_tokens: int = 512
    text: str | None = None
    gate: bool = True
    gate_tokens: int | None = None
    max_ppl_increase: float | None = None
    max_kl: float | None = None
    device: str = "cpu"
    rotate: bool = False
    method: str = "rtn"
    calibration: str | None = None
    samples: int = 64
    sample_length: int = 512
    resume: bool = False
    act_order: bool = True
    damping: float = 0.01
    asymmetric_error: bool = True
    tune_epochs: int | None = None
    bits: float | None = None
    size: str | None = None
    keep: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    activations: str = "int8"
    explain: bool = False
    check_passes: bool = False
    force: bool = False

    @staticmethod
    def of(**values: Any) -> CompileOptions:
        """Options from keywords. Raises GristmillError that says which one does not fit and what does."""
        refuse_unknown(values, [field.name for field in fields(CompileOptions)], "compile")
        for name in ("text", "calibration"):
            if values.get(name) is not None:
                values[name] = str(values[name])
        if "keep" in values:
            values["keep"] = (values["keep"],) if isinstance(values["keep"], str) else tuple(values["keep"])
        if "lora" in values:
            given = values["lora"]
            values["lora"] = tuple(map(str, (given,) if isinstance(given, (str, PathLike)) else given))
        if isinstance(values.get("max_ppl_increase"), str):
            values["max_ppl_increase"] = parse_percent(values["max_ppl_increase"])
        options = CompileOptions(**values)
        options._check_formats()
        options._check_numbers()
        options._check_gate()
        options._check_calibration()
        return options

    def group(self, numbers: Format) -> int:
        """Columns per scale of linears in a format; 0 = the whole row. Small floats need no groups."""
        if self.group_size is None:
            return INTEGER_GROUP if numbers.integer else 0
        return 0 if self.group_size == "row" or not numbers.scaled else int(self.group_size)

    @property
    def linear_format(self) -> str:
        """Format of the linears that a checkpoint holds as floats."""
        return self.weights or "int4"

    @property
    def embedding_format(self) -> str:
        """int8 unless asked otherwise; float models stay as they are."""
        return self.embedding or (self.linear_format if self.linear_format in FLOAT_WEIGHTS else "int8")

    @property
    def head_format(self) -> str:
        return self.head or (self.linear_format if self.linear_format in FLOAT_WEIGHTS else "int8")

    @property
    def cache_format(self) -> CacheFormat:
        """f32 for f32 weights, whose numbers are then those of the reference; otherwise f16."""
        both = self.kv or ("f32" if self.linear_format == "f32" else "f16")
        return CacheFormat(self.kv_k or both, self.kv_v or both, self.kv_rotate)

    def _check_formats(self) -> None:
        for name in ("weights", "embedding", "head"):
            if getattr(self, name) is not None:
                _one_of(name, getattr(self, name), WEIGHTS)
        for name in ("kv", "kv_k", "kv_v"):
            if getattr(self, name) is not None:
                _one_of(name, getattr(self, name), KV_TYPES)
        if self.kv_rotate is True and self.cache_format.k in ("f32", "f16"):
            raise GristmillError(
                f"kv_rotate needs quantized keys, got {self.cache_format.k}; use kv_k int4, fp8 or int8"
            )
        if self.group_size is not None:
            _one_of("group_size", self.group_size, (*GROUP_SIZES, "row"))
        formats = [FORMATS[f] for f in (self.linear_format, self.embedding_format, self.head_format)]
        if self.group_size is not None and not any(f.scaled for f in formats):
            raise GristmillError(
                f"group_size needs weights with scales, got weights {self.linear_format}; "
                f"use {_names(scaled=True)}"
            )
        if self.asymmetric and not FORMATS[self.linear_format].integer:
            raise GristmillError(
                f"asymmetric needs integer weights, got weights {self.linear_format}; "
                f"use {_names(integer=True)}"
            )

    def _check_numbers(self) -> None:
        _count("max_len", self.max_len, 1, optional=True)
        _count("max_slots", self.max_slots, 1)
        _count("max_tokens", self.max_tokens, 1)
        _count("gate_tokens", self.gate_tokens, 2, optional=True)
        for name in ("max_ppl_increase", "max_kl"):
            bound = getattr(self, name)
            if bound is not None and (
                isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 <= bound < math.inf
            ):
                raise GristmillError(f"{name} is {bound!r}, expected a number from 0")
        flags = (
            "asymmetric", "gate", "rotate", "kv_rotate", "resume", "act_order", "asymmetric_error",
            "explain", "check_passes", "force",
        )  # fmt: skip
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise GristmillError(f"{name} is {getattr(self, name)!r}, expected True or False")

    def _check_gate(self) -> None:
        asked = [
            name
            for name in ("text", "gate_tokens", "max_ppl_increase", "max_kl")
            if getattr(self, name) is not None
        ]
        _one_of("device", self.device, ("cpu", "cuda"))
        if self.device != "cpu":
            asked.append("device")
        if asked and not self.gate:
            raise GristmillError(f"{asked[0]} is for the gate, which is off; leave out one of the two")

    def _check_calibration(self) -> None:
        _one_of("method", self.method, METHOD_NAMES)
        _one_of("activations", self.activations, ("int8", "f32"))
        _count("samples", self.samples, 1)
        _count("sample_length", self.sample_length, 16)
        _count("tune_epochs", self.tune_epochs, 0, optional=True)
        if (
            isinstance(self.damping, bool)
            or not isinstance(self.damping, (int, float))
            or not 0 < self.damping <= 1
        ):
            raise GristmillError(f"damping is {self.damping!r}, expected a number above 0, at most 1")
        if self.bits is not None:
            parse_bits(self.bits)
        if self.size is not None:
            parse_size(self.size)
        for text in self.keep:
            parse_keep(text)
        if self.bits is not None and self.size is not None:
            raise GristmillError("bits and size are two ways to give one budget; leave out one of them")
        asked = [f.name for f in fields(self) if f.name in CALIBRATION and getattr(self, f.name) != f.default]
        if asked and self.method == "rtn" and not (self.bits or self.size):
            raise GristmillError(
                f"{asked[0]} is for calibrated methods; add method gptq (or awq, awq+gptq ...)"
            )
        if self.method not in ("gptq", "awq+gptq"):
            own = [n for n in asked if n in ("act_order", "damping", "asymmetric_error")]
            if own:
                raise GristmillError(f"{own[0]} is for method gptq or awq+gptq, got {self.method}")

    def for_quantization(self) -> dict[str, Any]:
        """The options that the quantized weights depend on."""
        names = (
            "weights", "group_size", "asymmetric", "embedding", "head", "max_len", "rotate", "method",
            "act_order", "damping", "asymmetric_error", "tune_epochs", "bits", "size", "keep",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def parse_percent(text: str) -> float:
    """ "2%" or "0.02" -> 0.02; a bare number from 1 is refused, for it could mean either."""
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / 100 if text.strip().endswith("%") else float(number)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf or (share >= 1 and not text.strip().endswith("%")):
        raise GristmillError(f"max_ppl_increase is {text!r}, expected a percentage such as 2% (or 0.02)")
    return share


def _names(**properties: bool) -> str:
    """The formats with these properties, as a list in words."""
    found = [n for n, f in FORMATS.items() if all(getattr(f, p) == v for p, v in properties.items())]
    return f"{', '.join(found[:-1])} or {found[-1]}"


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or value not in known:
        raise GristmillError(f"{name} is {value!r}, expected one of {', '.join(map(str, known))}")


def _count(name: str, value: Any, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if type(value) is not int or not least <= value < 2**31:
        raise GristmillError(f"{name} is {value!r}, expected an integer from {least}")
