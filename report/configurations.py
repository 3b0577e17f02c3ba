"""The configurations of a sweep: formats of weights, methods, cache formats and devices, multiplied out.

A method only says how integers are chosen, so weights of other formats appear once for each cache format,
with no method. Asked for nothing, the grid is a short list that answers the questions most asked, each by a
pair of points that differ in one thing: what do fewer bits cost, what does GPTQ give back, what does an
int8 cache cost by itself and on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gristmill.compiler.options import KV_TYPES, METHOD_NAMES
from gristmill.quant.scheme import FORMATS
from gristmill.runtime.errors import GristmillError

WEIGHTS, METHODS, KV = ("f16", "int8", "int4", "int3"), ("rtn", "gptq"), ("f16",)  # where some are asked for
DEVICES = ("cpu", "cuda")
DEFAULT = (
    ("f16", "", "f16"),
    ("f16", "", "int8"),
    ("int8", "rtn", "f16"),
    ("int4", "rtn", "f16"),
    ("int4", "gptq", "f16"),
    ("int4", "gptq", "int8"),
    ("int3", "gptq", "f16"),
)  # weights, method, cache


@dataclass(frozen=True)
class Configuration:
    """method: "" for weights that are no integers; kv: a type, or two as in "int8/int4" (keys/values)."""

    weights: str
    method: str
    kv: str

    @property
    def name(self) -> str:
        """For files and ids: "int4-gptq-kv-f16"."""
        return "-".join(filter(None, (self.weights, self.method, "kv", self.kv.replace("/", "-"))))

    @property
    def label(self) -> str:
        """For people: "int4 gptq, KV f16"."""
        return f"{' '.join(filter(None, (self.weights, self.method)))}, KV {self.kv}"

    @property
    def calibrated(self) -> bool:
        return self.method not in ("", "rtn")

    def compile_options(self) -> dict[str, Any]:
        """Its part of CompileOptions."""
        keys, _, values = self.kv.partition("/")
        cache = {"kv_k": keys, "kv_v": values} if values else {"kv": keys}
        return {"weights": self.weights, **({"method": self.method} if self.method else {}), **cache}

    def sweep_options(self) -> list[str]:
        """The words that ask `gristmill report` for this configuration alone."""
        method = ["--methods", self.method] if self.method else []
        return ["--weights", self.weights, *method, "--kv", self.kv]


def grid(
    weights: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    kv: Sequence[str] | None = None,
) -> tuple[Configuration, ...]:
    """All combinations that differ, in the order of their names; None: DEFAULT where all are, else WEIGHTS,
    METHODS, KV. Raises GristmillError for names that are not known."""
    if weights is methods is kv is None:
        return tuple(Configuration(*names) for names in DEFAULT)
    known_kv = (*KV_TYPES, *(f"{k}/{v}" for k in KV_TYPES for v in KV_TYPES if k != v))
    chosen = names("weights", WEIGHTS if weights is None else weights, tuple(FORMATS))
    ways = names("methods", METHODS if methods is None else methods, METHOD_NAMES)
    caches = names("kv", KV if kv is None else kv, known_kv)
    found = (
        Configuration(w, method if FORMATS[w].integer else "", cache)
        for w in chosen
        for method in ways
        for cache in caches
    )
    return tuple(dict.fromkeys(found))


def names(option: str, given: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Names without doubles; GristmillError for one that is not known."""
    found = tuple(dict.fromkeys(given))
    for name in found:
        if name not in known:
            shown = [k for k in known if "/" not in k]
            raise GristmillError(f"--{option} has {name!r}, expected some of {', '.join(shown)}")
    if not found:
        raise GristmillError(f"--{option} is empty, expected some of {', '.join(known)}")
    return found


def split(text: str | None) -> tuple[str, ...] | None:
    """ "f16, int8" -> ("f16", "int8"); None stays None."""
    if text is None:
        return None
    return tuple(piece.strip() for piece in text.split(",") if piece.strip())
