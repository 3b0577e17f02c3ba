"""Devices by their data sheets, and where each figure comes from.

Peaks are dense: a data sheet's figure "with sparsity" is halved. Memory is in binary gigabytes, as the driver
counts what a sheet calls GB; where GDDR6 keeps ECC in itself (A10, A40, L4, L40S), a sixteenth less. PCIe is
one direction of the sheet's bidirectional figure. Clocks are boost clocks, of which the sheet's f32 peak is
processors * lanes * 2 * clock.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from gristmill.report.attained import Attained, Attention, Product, assumed
from gristmill.runtime.errors import GristmillError

GIB = 1 << 30
GEN4, GEN5 = 32e9, 64e9  # bytes per second of 16 PCIe lanes, one direction
KINDS = ("gpu", "cpu")


@dataclass(frozen=True)
class DeviceSpec:
    """One device. bandwidth, pcie_bandwidth: bytes per second; *_ops: dense operations per second with
    operands of that type, 0 where it has none (f16_ops: f16 and bf16); processors: multiprocessors, or
    threads of a CPU; clock: Hz; cache_bytes: of the last cache, where it counts; attained: what a probe
    measured, else the tables of `report.attained` hold."""

    name: str
    kind: str
    memory_bytes: int
    bandwidth: float
    f32_ops: float
    processors: int
    source: str
    f16_ops: float = 0.0
    fp8_ops: float = 0.0
    int8_ops: float = 0.0
    clock: float = 0.0
    pcie_bandwidth: float = 0.0
    cache_bytes: int = 0
    attained: Attained | None = None

    @property
    def kernels(self) -> Attained:
        """What kernels attain on it: measured, or assumed."""
        return self.attained or assumed(self)

    def peak(self, name: str, integer: bool) -> tuple[float, str]:
        """Operations per second of products with weights in a format, and the number type that they are
        multiplied in: bf16 on GPUs beside all but f32 weights; on CPUs int8 where activations are integers,
        else f32."""
        if self.kind == "gpu":
            return (self.f32_ops, "f32") if name == "f32" else (self.f16_ops, "bf16")
        return (self.int8_ops, "int8") if integer and self.int8_ops else (self.f32_ops, "f32")


def _gpu(
    name: str, gib: float, gb_s: float, tera: tuple[float, float, float, float], processors: int, ghz: float,
    pcie: float, source: str,
) -> DeviceSpec:  # fmt: skip
    """tera: 10^12 dense operations per second in f32, f16, fp8, int8."""
    f32, f16, fp8, int8 = (1e12 * figure for figure in tera)
    return DeviceSpec(
        name, "gpu", int(gib * GIB), gb_s * 1e9, f32, processors, source, f16, fp8, int8, ghz * 1e9, pcie
    )


_SHEET = "NVIDIA data sheet"
DEVICES: dict[str, DeviceSpec] = {
    "h200": _gpu("H200 SXM", 141, 4800, (67, 989, 1979, 1979), 132, 1.98, GEN5,
                 f"{_SHEET} H200 (SXM); multiprocessors, clock: H100 white paper"),
    "h100": _gpu("H100 SXM", 80, 3350, (67, 989, 1979, 1979), 132, 1.98, GEN5,
                 f"{_SHEET} H100 (SXM5); multiprocessors, clock: H100 white paper"),
    "h100-nvl": _gpu("H100 NVL", 94, 3900, (60, 835, 1671, 1671), 132, 1.785, GEN5, f"{_SHEET} H100 (NVL)"),
    "h100-pcie": _gpu("H100 PCIe", 80, 2000, (51, 756, 1513, 1513), 114, 1.755, GEN5,
                      f"{_SHEET} H100 (PCIe); multiprocessors, clock: H100 white paper"),
    "a100-80gb": _gpu("A100 SXM 80 GB", 80, 2039, (19.5, 312, 0, 624), 108, 1.41, GEN4,
                      f"{_SHEET} A100 80GB (SXM); multiprocessors, clock: A100 white paper"),
    "a100-80gb-pcie": _gpu("A100 PCIe 80 GB", 80, 1935, (19.5, 312, 0, 624), 108, 1.41, GEN4,
                           f"{_SHEET} A100 80GB (PCIe)"),
    "a100-40gb": _gpu("A100 SXM 40 GB", 40, 1555, (19.5, 312, 0, 624), 108, 1.41, GEN4,
                      f"{_SHEET} A100 40GB; A100 white paper"),
    "a30": _gpu("A30", 24, 933, (10.3, 165, 0, 330), 56, 1.44, GEN4, f"{_SHEET} A30"),
    "a10": _gpu("A10", 22.5, 600, (31.2, 125, 0, 250), 72, 1.695, GEN4,
                f"{_SHEET} A10; multiprocessors, clock: GA102 white paper"),
    "a40": _gpu("A40", 45, 696, (37.4, 149.7, 0, 299.3), 84, 1.74, GEN4,
                f"{_SHEET} A40; multiprocessors, clock: GA102 white paper"),
    "l4": _gpu("L4", 22.5, 300, (30.3, 121, 242, 242), 58, 2.04, GEN4,
               f"{_SHEET} L4; multiprocessors, clock: Ada white paper"),
    "l40s": _gpu("L40S", 45, 864, (91.6, 362, 733, 733), 142, 2.52, GEN4,
                 f"{_SHEET} L40S; multiprocessors, clock: Ada white paper"),
    "rtx-3090": _gpu("GeForce RTX 3090", 24, 936, (35.6, 71, 0, 284), 82, 1.695, GEN4,
                     "NVIDIA GA102 white paper, appendix; bf16 with f32 sums"),
    "rtx-4090": _gpu("GeForce RTX 4090", 24, 1008, (82.6, 165.2, 330.3, 660.6), 128, 2.52, GEN4,
                     "NVIDIA Ada white paper, appendix; bf16 and fp8 with f32 sums"),
    "rtx-5090": _gpu("GeForce RTX 5090", 32, 1792, (104.8, 209.5, 419, 838), 170, 2.407, GEN5,
                     "NVIDIA RTX Blackwell white paper, appendix; bf16 and fp8 with f32 sums"),
}  # fmt: skip

_REQUIRED = [f.name for f in fields(DeviceSpec) if f.default is MISSING]
Kind = TypeVar("Kind", Attained, Attention, Product)


def read_device(path: str | Path) -> DeviceSpec:
    """A device from a JSON file with the fields of DeviceSpec, as `gristmill plan --json` prints it.

    Raises GristmillError for a field that is unknown, missing or no such number.
    """
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise GristmillError(f"{path}: not valid JSON ({error}); expected the fields of a device") from None
    return _device(found, str(path))


def _device(found: Any, where: str) -> DeviceSpec:
    _refuse_strange(found, [f.name for f in fields(DeviceSpec)], _REQUIRED, where)
    for name in ("name", "kind", "source"):
        if not isinstance(found[name], str) or not found[name]:
            raise GristmillError(f"{where}: {name} is {found[name]!r}, expected a text")
    if found["kind"] not in KINDS:
        raise GristmillError(f"{where}: kind is {found['kind']!r}, expected gpu or cpu")
    needed = ["memory_bytes", "bandwidth", "f32_ops", "processors"]
    needed += ["f16_ops", "clock"] if found["kind"] == "gpu" else []
    for name in (f.name for f in fields(DeviceSpec) if f.type in ("int", "float")):
        if name in found or name in needed:
            _number(found.get(name, 0), f"{where}: {name}", name in needed, name in _COUNTS)
    attained = found.get("attained")
    measured = None if attained is None else _attained(attained, f"{where}: attained")
    return DeviceSpec(**{**found, "attained": measured})


_COUNTS = ("memory_bytes", "processors", "cache_bytes")


def _attained(found: Any, where: str) -> Attained:
    names = [f.name for f in fields(Attained)]
    _refuse_strange(found, names, [name for name in names if name not in ("gate", "misses")], where)
    for name in ("linear", "attend", "other", "forward", "gate"):
        _number(found.get(name, 0.0), f"{where}.{name}", False, False)
    tables = {"products": Product, "attention": Attention}
    for table in tables:
        if not isinstance(found[table], dict) or not found[table]:
            raise GristmillError(f"{where}.{table}: expected an object of formats")
    rows: dict[str, Any] = {
        table: {name: _row(kind, row, f"{where}.{table}.{name}") for name, row in found[table].items()}
        for table, kind in tables.items()
    }
    return Attained(**{**found, **rows, "misses": _misses(found.get("misses", []), f"{where}.misses")})


def _misses(found: Any, where: str) -> tuple[tuple[int, float], ...]:
    pairs = isinstance(found, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in found)
    if not pairs:
        raise GristmillError(f"{where} is {found!r}, expected a list of [bytes, share]")
    for size, share in found:
        _number(size, f"{where}: a size", True, True)
        _number(share, f"{where}: a share", False, False)
    sizes = [size for size, _ in found]
    if sizes != sorted(set(sizes)) or any(share > 1 for _, share in found):
        raise GristmillError(f"{where}: expected sizes that ascend and shares of at most 1, got {found!r}")
    return tuple((size, float(share)) for size, share in found)


def _row(kind: type[Kind], found: Any, where: str) -> Kind:
    names = [f.name for f in fields(kind)]
    _refuse_strange(found, names, ["reached", "rate"], where)
    for name, value in found.items():
        if value is not None:
            _number(value, f"{where}.{name}", name in ("reached", "rate", "one"), False)
    return kind(**{name: value for name, value in found.items() if value is not None})


def _refuse_strange(found: Any, known: list[str], required: list[str], where: str) -> None:
    if not isinstance(found, dict):
        raise GristmillError(f"{where}: expected an object with {', '.join(required)}")
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise GristmillError(f"{where}: unknown field {name!r}; {hint}")
    missing = [name for name in required if name not in found]
    if missing:
        raise GristmillError(f"{where}: {', '.join(missing)} missing; a device needs {', '.join(required)}")


def _number(value: Any, what: str, positive: bool, count: bool) -> None:
    kinds = (int,) if count else (int, float)
    fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0 or (positive and not value):
        expected = "a whole number" if count else "a number"
        raise GristmillError(f"{what} is {value!r}, expected {expected} {'above' if positive else 'from'} 0")


def device_json(spec: DeviceSpec) -> dict[str, Any]:
    """What `read_device` reads back."""
    found = asdict(spec)
    if spec.attained is None:
        del found["attained"]
        return found
    for row in found["attained"]["products"].values():
        if math.isinf(row["one"]):  # which JSON has no number for
            row["one"] = None
    return found


def known_device(text: str) -> DeviceSpec:
    """A device of the table, or of a JSON file. Raises GristmillError for a name that is neither."""
    if text in DEVICES:
        return DEVICES[text]
    if Path(text).is_file():
        return read_device(text)
    near = difflib.get_close_matches(text, [*DEVICES, "cpu"], 1)
    raise GristmillError(
        f"device {text!r} is neither known nor a file; "
        + (f"did you mean {near[0]}?" if near else "")
        + f" known: cpu, {', '.join(DEVICES)}"
    )
