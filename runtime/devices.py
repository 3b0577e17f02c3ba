"""The devices of `load`: the one place that says what each can do, which `load`, `bench`, the commands and
the table of docs/targets.md go by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """exported: what the folders it runs were exported to, which names a package of the runtime; None: it
    runs artifacts. threads: whether `threads` is for it. pages: `hugepages` and `pin`. ranks:
    `tensor_parallel`. bench: `bench` measures the memory it is held against. profile: instructions are timed
    one by one. tune: products are. batched: rows of many sequences are multiplied together. adapters: rows
    may have one. alike: a row's bits do not depend on the rows beside it."""

    name: str
    exported: str | None = None
    threads: bool = True
    pages: bool = False
    ranks: bool = False
    bench: bool = True
    profile: bool = False
    tune: bool = False
    batched: bool = False
    adapters: bool = False
    alike: bool = False


DEVICES = {
    device.name: device
    for device in (
        Device(
            "cpu", pages=True, ranks=True, profile=True, batched=True, adapters=True, alike=True,
        ),
        Device("cuda", threads=False, ranks=True, profile=True, tune=True, batched=True),
        Device("onnx:cpu", exported="onnx"),
        Device("onnx:cuda", exported="onnx", bench=False),
        Device("torchscript", exported="torchscript"),
        Device("pt2:cpu", exported="pt2"),
    )
}
EXPORTS = {device.name: device.exported for device in DEVICES.values() if device.exported is not None}
