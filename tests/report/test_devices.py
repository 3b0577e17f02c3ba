"""Known devices, devices from a file, and what is assumed of their kernels."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gristmill.compiler.options import KV_TYPES, WEIGHTS
from gristmill.report.attained import FEW_ROWS, LANES, Attention, Product, assumed
from gristmill.report.devices import DEVICES, device_json, known_device, read_device
from gristmill.runtime.errors import GristmillError

CPU = {
    "name": "a CPU", "kind": "cpu", "memory_bytes": 8 << 30, "bandwidth": 30e9, "f32_ops": 2e11,
    "int8_ops": 1.2e12, "processors": 2, "source": "made up",
}  # fmt: skip


def file_of(folder: Path, fields: Any) -> str:
    path = folder / "device.json"
    path.write_text(json.dumps(fields))
    return str(path)


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_known_devices_are_consistent(name: str) -> None:
    """The f32 peak follows from the clock: of 128 lanes on most devices, 64 on A100 and A30."""
    spec = DEVICES[name]
    lanes = 64 if name.startswith(("a100", "a30")) else LANES
    assert spec.processors * lanes * 2 * spec.clock == pytest.approx(spec.f32_ops, rel=0.01)
    assert spec.f16_ops > spec.f32_ops and spec.int8_ops >= spec.fp8_ops
    assert spec.memory_bytes / 2**30 in (22.5, 24, 32, 40, 45, 80, 94, 141)
    assert 1e11 < spec.bandwidth < 1e13 and spec.pcie_bandwidth in (32e9, 64e9)
    assert "NVIDIA" in spec.source


def test_a_device_from_a_file_is_the_device(tmp_path: Path) -> None:
    for spec in DEVICES.values():
        assert read_device(file_of(tmp_path, device_json(spec))) == spec
    found = known_device(file_of(tmp_path, CPU))
    assert (found.bandwidth, found.int8_ops, found.f16_ops, found.attained) == (30e9, 1.2e12, 0, None)


def test_what_was_measured_travels_in_the_file(tmp_path: Path) -> None:
    spec = known_device(file_of(tmp_path, CPU))
    measured = replace(spec, attained=replace(assumed(spec), misses=((1 << 20, 0.0), (1 << 25, 1.0))))
    assert math.isinf(measured.kernels.products["int4"].one)
    assert read_device(file_of(tmp_path, device_json(measured))) == measured


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bandwith": 1.0}, "unknown field 'bandwith'; did you mean bandwidth"),
        ({"bandwidth": None}, "bandwidth is None, expected a number above 0"),
        ({"bandwidth": "30 GB/s"}, "bandwidth is '30 GB/s', expected a number above 0"),
        ({"memory_bytes": 1.5}, "memory_bytes is 1.5, expected a whole number above 0"),
        ({"processors": True}, "processors is True"),
        ({"kind": "tpu"}, "kind is 'tpu', expected gpu or cpu"),
        ({"kind": "gpu"}, "f16_ops is 0, expected a number above 0"),
        ({"f32_ops": 0}, "f32_ops is 0, expected a number above 0"),
        ({"int8_ops": -1}, "int8_ops is -1, expected a number from 0"),
        ({"name": ""}, "name is '', expected a text"),
        ({"attained": {"products": {}}}, "attained: attention, linear, .* missing"),
    ],
)
def test_bad_fields_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(GristmillError, match=message):
        read_device(file_of(tmp_path, {**CPU, **change}))


@pytest.mark.parametrize(
    "where, change, message",
    [
        ("products", {}, "attained.products: expected an object of formats"),
        ("products", {"int4": {"reached": 1}}, "products.int4: rate missing"),
        ("products", {"int4": {"reached": 0, "rate": 1}}, "int4.reached is 0, expected a number above 0"),
        ("attention", {"f16": {"reached": 1, "rat": 1}}, "unknown field 'rat'; did you mean rate"),
        ("misses", [[100, 0.5], [50, 1]], "attained.misses: expected sizes that ascend"),
        ("misses", [[100, 2]], "misses: expected sizes that ascend and shares of at most 1"),
        ("misses", [100], "misses is .*, expected a list of"),
        ("linear", -1, "attained.linear is -1, expected a number from 0"),
    ],
)
def test_bad_measurements_are_named(tmp_path: Path, where: str, change: Any, message: str) -> None:
    spec = known_device(file_of(tmp_path, CPU))
    fields = device_json(replace(spec, attained=assumed(spec)))
    fields["attained"][where] = change
    with pytest.raises(GristmillError, match=message):
        read_device(file_of(tmp_path, fields))


def test_files_that_are_no_devices(tmp_path: Path) -> None:
    with pytest.raises(GristmillError, match="expected an object with name"):
        read_device(file_of(tmp_path, [CPU]))
    with pytest.raises(GristmillError, match="bandwidth missing; a device needs"):
        read_device(file_of(tmp_path, {k: v for k, v in CPU.items() if k != "bandwidth"}))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(GristmillError, match="broken.json: not valid JSON"):
        known_device(str(tmp_path / "broken.json"))
    with pytest.raises(GristmillError, match="'h20' is neither known nor a file; did you mean h200"):
        known_device("h20")


@pytest.mark.parametrize("name", ["h200", "l4"])
def test_every_format_is_assumed(tmp_path: Path, name: str) -> None:
    for spec in (DEVICES[name], known_device(file_of(tmp_path, CPU))):
        attained = assumed(spec)
        assert set(WEIGHTS) <= set(attained.products) and set(KV_TYPES) == set(attained.attention)
        for product in attained.products.values():
            assert 0 < product.reached <= 1 and 0 < product.rate <= max(spec.f16_ops, spec.int8_ops)
    gpu = assumed(DEVICES[name])
    assert gpu.product("int8", 0).one == gpu.product("int8", 128).one, "one count for int8 activations"
    assert gpu.product("int4", 0) == gpu.product("int4", 128)


def test_products_by_hand() -> None:
    product = Product(1.0, rate=1000.0, unpack=6.0, one=50.0, more=0.5, finish=0.25)
    one = 100 / 50 + 4 * 0.25  # 100 weights at 50 a second, four rows
    assert product.compute_seconds(4, 25, 1) == one
    assert product.compute_seconds(4, 25, FEW_ROWS) == one * (1 + 0.5 * (FEW_ROWS - 1))
    assert product.compute_seconds(4, 25, 14) == 2 * 100 * (14 + 6) / 1000
    plain = Product(1.0, rate=1000.0, unpack=6.0)
    assert plain.compute_seconds(4, 25, 1) == 2 * 100 * (1 + 6) / 1000
    assert Attention(1.0, 100.0, unpack=3.0).compute_seconds(800, 4) == 8.0 * (1 + 3 / 4)
