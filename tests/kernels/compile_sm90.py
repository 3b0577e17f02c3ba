"""Compiles Triton kernels for an H100 or H200 (sm_90) on a machine that has none.

`compile_launches("module")` starts a Python without TRITON_INTERPRET, in which the module's `launches()`
yields named calls of launch functions on tensors of the device "meta". What they would launch is compiled as
it would be at run time, with the same specialization of arguments, and nothing runs:

    def launches() -> Iterator[Launch]:
        yield "int4, one row", lambda: linear(torch.empty(1, 4096, device="meta"), ...)

Registers and spills are what ptxas reports. Nothing is taken from Triton's cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "build" / "sm90"
SHARED_BYTES = 227 << 10  # that a block of an sm_90 may use
Launch = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Compiled:
    """One kernel of a launch: its grid, and what it takes of a multiprocessor; registers are per thread."""

    launch: str
    kernel: str
    grid: tuple[int, ...]
    warps: int
    shared_bytes: int
    registers: int
    spill_bytes: int
    ptx: str

    def fits(self) -> bool:
        """Whether it can run, and keeps all it computes with in registers."""
        return self.shared_bytes <= SHARED_BYTES and self.spill_bytes == 0 and self.grid_is_legal()

    def grid_is_legal(self) -> bool:
        most = (2**31 - 1, 65535, 65535)
        return all(0 < size <= limit for size, limit in zip(self.grid, most))

    def summary(self) -> str:
        return (
            f"{self.launch}: {self.kernel}{self.grid} {self.warps} warps, {self.shared_bytes} B shared, "
            f"{self.registers} registers, {self.spill_bytes} B spilled"
        )


def compile_launches(module: str, seconds: float = 300) -> list[Compiled]:
    """Every kernel that the launches of `module`, a module on sys.path, would start, in their order.

    The processes that share a run of the tests share what one of them has compiled.
    """
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return _parsed(_compiled(module, seconds))
    SHARED.mkdir(parents=True, exist_ok=True)
    for file in SHARED.iterdir():
        if not file.name.startswith(run):
            file.unlink(missing_ok=True)
    with open(SHARED / f"{run}-{module}", "a+") as shared:  # the system ends the lock with the process
        fcntl.flock(shared, fcntl.LOCK_EX)
        shared.seek(0)
        lines = shared.read()
        if not lines:
            lines = _compiled(module, seconds)
            shared.write(lines)
            shared.flush()
    return _parsed(lines)


def _parsed(lines: str) -> list[Compiled]:
    return [
        Compiled(**{**fields, "grid": tuple(fields["grid"])})
        for fields in map(json.loads, lines.splitlines())
    ]


def _compiled(module: str, seconds: float) -> str:
    """A line of JSON for every kernel."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    with tempfile.TemporaryDirectory() as cache:
        environment |= {
            "TRITON_CACHE_DIR": cache,
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_DISABLE_LINE_INFO": "1",
            "GRISTMILL_OVERLAP": "1",
        }
        done = subprocess.run(
            [sys.executable, __file__, module],
            capture_output=True,
            text=True,
            env=environment,
            timeout=seconds,
        )
    assert done.returncode == 0, f"{module} does not compile:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def use_no_device() -> None:
    """Lets Triton compile for sm_90 in this process; launches would fail."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    no_device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(no_device)


def compile_only(record: Callable[..., None]) -> None:
    """Lets every launch of this process compile for sm_90, be recorded, and stop there."""
    from triton.runtime.jit import JITFunction

    use_no_device()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        record(kernel, grid, log.getvalue())
        return kernel

    JITFunction.run = compile_only


def _numbers(log: str) -> tuple[int, int]:
    """Registers and spilled bytes in a log of `ptxas -v`."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert len(registers) == 1 and len(spills) == 2, f"not a log of one kernel by ptxas:\n{log}"
    return int(registers[0]), sum(map(int, spills))


def _main(module: str) -> None:
    numbers: dict[int, tuple[int, int]] = {}  # of a kernel by its id; a second launch finds it compiled
    kernels = []
    current = ""

    def record(kernel: Any, grid: Any, log: str) -> None:
        kernels.append(kernel)
        if id(kernel) not in numbers:
            numbers[id(kernel)] = _numbers(log)
        registers, spills = numbers[id(kernel)]
        metadata = kernel.metadata
        compiled = Compiled(
            current, kernel.name, tuple(grid), metadata.num_warps, metadata.shared, registers, spills,
            kernel.asm["ptx"],
        )  # fmt: skip
        sys.stdout.write(json.dumps(asdict(compiled)) + "\n")

    compile_only(record)
    launches: Iterator[Launch] = importlib.import_module(module).launches()
    for current, launch in launches:  # noqa: B007  (record reads it)
        launch()


if __name__ == "__main__":
    _main(sys.argv[1])
