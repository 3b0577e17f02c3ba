"""Numbers as people read them: three figures and a unit, the same in tables, readings and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Unit = Literal[
    "count",
    "tok/s",
    "seconds",
    "bytes",
    "bytes/s",
    "ops",
    "ops/s",
    "ops/byte",
    "share",
    "increase",
    "factor",
    "nats",
    "perplexity",
    "bits",
    "joules",
    "probability",
    "error",
    "limit",
]
MISSING = "–"
_SPACE = "\u00a0"  # a number stays on one line with its unit
_BINARY = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_TIMES = ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min"))
_DECIMAL = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def figures(value: float, digits: int = 3) -> str:
    """`digits` significant figures, never as a power of ten above 0.0001: 1,234; 48.1; 0.0123."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}") if abs(value) < 10**digits else value
    if abs(value) < 1e-4:
        return f"{value:.{max(0, digits - 2)}e}".replace("-", "−").replace("e−0", "e−")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}".replace("-", "−")


def text(value: float, unit: Unit) -> str:
    """`value` in `unit`, as in report.json, scaled and rounded for reading: 1.2e9 bytes/s is 1.20 GB/s."""
    return _WRITE[unit](value)


def _seconds(value: float) -> str:
    for limit, scale, name in _TIMES:
        if 0 < abs(value) < limit * 0.9995:
            return f"{figures(value * scale)}{_SPACE}{name}"
    return f"{figures(value / 3600)}{_SPACE}h" if value else "0"


def _bytes(value: float) -> str:
    for size, name in _BINARY:
        if abs(value) >= size * 0.9995:
            return f"{figures(value / size)}{_SPACE}{name}"
    return f"{figures(value)}{_SPACE}B" if value else "0"


def _si(name: str) -> Callable[[float], str]:
    def write(value: float) -> str:
        for size, prefix in _DECIMAL:
            if abs(value) >= size * 0.9995:
                return f"{figures(value / size)}{_SPACE}{prefix}{name}"
        return f"{figures(value)}{_SPACE}{name}" if value else "0"

    return write


def _percent(value: float) -> str:
    share = 100 * value
    return f"{figures(share, 2 if abs(share) < 10 else 3)}{_SPACE}%"


def _signed(value: float) -> str:
    sign = "+" if value > 0 else ""
    places = 1 if abs(value) >= 0.0995 else (2 if abs(value) >= 0.00095 else 3)
    if not math.isfinite(value):
        return figures(value)
    return f"{sign}{100 * value:,.{places}f}{_SPACE}%".replace("-", "−")


def _plain(name: str, digits: int = 3) -> Callable[[float], str]:
    return lambda value: f"{figures(value, digits)}{_SPACE}{name}" if name else figures(value, digits)


def _count(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else figures(value)


_WRITE: dict[str, Callable[[float], str]] = {
    "count": _count,
    "tok/s": _plain(""),
    "seconds": _seconds,
    "bytes": _bytes,
    "bytes/s": _si("B/s"),
    "ops": _si("op"),
    "ops/s": _si("op/s"),
    "ops/byte": _plain(""),
    "share": _percent,
    "increase": _signed,
    "factor": _plain("×", 3),
    "nats": _plain(""),
    "perplexity": _plain("", 4),
    "bits": _plain(""),
    "joules": _plain("J"),
    "probability": _percent,
    "error": _plain("", 2),
    "limit": lambda value: f"{100 * value:g}{_SPACE}%",
}
