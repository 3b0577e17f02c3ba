"""Joules that a piece of work takes, where the machine tells: RAPL's counters of a processor's packages,
NVML's of a GPU. Both count all that runs there, whoever started it, and what it takes to be idle."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from gristmill.report.schema import Energy

POWERCAP = Path("/sys/class/powercap")
SMI_PERIOD = 0.1  # seconds between two readings of a GPU's power


class Meter(Protocol):
    """Counts from `begin` to `end`, which gives joules."""

    source: str

    def begin(self) -> None: ...

    def end(self) -> float: ...


def measure_energy(work: Callable[[], int], device: str = "cpu") -> Energy | None:
    """Joules per token of ``work``, which says how many tokens it was; None where nothing is exposed."""
    meter = gpu_meter() if device == "cuda" else rapl_meter()
    if meter is None:
        return None
    meter.begin()
    try:
        tokens = work()
    finally:
        joules = meter.end()
    return Energy(joules / tokens, meter.source) if joules > 0 else None


class Rapl:
    """Counters of microjoules that begin again at 0 beyond a limit; begin to end must be shorter than that
    takes, which is a minute or more."""

    def __init__(self, domains: list[Path]) -> None:
        self.source = "RAPL"
        self._domains = domains
        self._before: list[int] = []

    def begin(self) -> None:
        self._before = [_number(domain / "energy_uj") for domain in self._domains]

    def end(self) -> float:
        total = 0
        for domain, before in zip(self._domains, self._before, strict=True):
            spent = _number(domain / "energy_uj") - before
            total += spent if spent >= 0 else spent + _number(domain / "max_energy_range_uj")
        return total / 1e6


def rapl_meter(root: Path = POWERCAP) -> Rapl | None:
    """Of all processor packages; None where the system has no counters or keeps them to itself."""
    packages: dict[str, Path] = {}  # some systems show one package by two interfaces
    for domain in sorted(root.glob("*")):
        try:
            name = (domain / "name").read_text().strip()
            if name.startswith("package"):
                _number(domain / "energy_uj")
                packages.setdefault(name, domain)
        except (OSError, ValueError):
            continue
    return Rapl(list(packages.values())) if packages else None


class Nvml:
    """The counter of millijoules that GPUs since Volta have."""

    def __init__(self, library: Any, handle: Any) -> None:
        self.source = "NVML"
        self._read: Callable[[], int] = lambda: library.nvmlDeviceGetTotalEnergyConsumption(handle)
        self._before = self._read()

    def begin(self) -> None:
        self._before = self._read()

    def end(self) -> float:
        return (self._read() - self._before) / 1e3


class Smi:
    """nvidia-smi's reading of the power, every SMI_PERIOD seconds, times the seconds."""

    def __init__(self, program: str, device: str) -> None:
        self.source = "NVML, power by nvidia-smi"
        query = ["--query-gpu=power.draw", "--format=csv,noheader,nounits", f"--id={device}"]
        self._command = [program, *query, f"--loop-ms={round(1e3 * SMI_PERIOD)}"]
        self._watts: list[float] = []

    def begin(self) -> None:
        self._watts = []
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._began = time.perf_counter()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._watts.append(float(line))
            except ValueError:  # "[N/A]"
                continue

    def end(self) -> float:
        seconds = time.perf_counter() - self._began
        self._process.terminate()
        self._process.wait()
        self._reader.join()
        return seconds * sum(self._watts) / len(self._watts) if self._watts else 0.0


def gpu_meter() -> Nvml | Smi | None:
    """Of the current GPU of torch, by the package nvidia-ml-py where it is there, else by nvidia-smi."""
    import torch

    if not torch.cuda.is_available():
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    return _nvml(uuid) or _smi(uuid)


def _nvml(uuid: str) -> Nvml | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return Nvml(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError:  # no driver, or a GPU without the counter
        return None


def _smi(uuid: str) -> Smi | None:
    program = shutil.which("nvidia-smi")
    return Smi(program, uuid) if program else None


def _number(path: Path) -> int:
    return int(path.read_text())
