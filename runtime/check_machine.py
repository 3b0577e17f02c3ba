"""Whether this machine can run an artifact, before anything is mapped: what it lacks, and what to do."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from gristmill.runtime import machine
from gristmill.runtime.artifact import FORMAT_VERSION, Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.footprint import kv_bytes
from gristmill.runtime.program import Program
from gristmill.runtime.session import native

CPU_RESERVE = 32 << 20  # what a process takes besides weights, caches and values
QUICK = ("avx512vnni", "avx512", "avx2")  # instruction sets that integer products are written for


@dataclass(frozen=True)
class Requirement:
    """One thing that an artifact needs. missing: it cannot run; else `remedy` says what would be better."""

    what: str
    needed: str
    found: str
    missing: bool = False
    remedy: str = ""

    @property
    def verdict(self) -> str:
        return "missing" if self.missing else "slow" if self.remedy else "ok"


def check_machine(artifact: Artifact, program: Program, device: str = "cpu") -> list[Requirement]:
    """What the artifact needs of this machine on `device` ("cpu" or "cuda"), and what is here.

    Memory is that of the artifact's own max_len and max_slots. Raises GristmillError for other devices.
    """
    if device not in ("cpu", "cuda"):
        raise GristmillError(f"device is {device!r}, expected cpu or cuda: others run exported folders")
    version = Requirement("format", f"{artifact.manifest['format']}", f"reads up to {FORMAT_VERSION}")
    return [version, *(_cpu(artifact, program) if device == "cpu" else [_cuda(artifact, program)])]


def facts(found: list[Requirement]) -> dict[str, Any]:
    """For JSON."""
    requirements = [{**asdict(r), "verdict": r.verdict} for r in found]
    return {"ok": not any(r.missing for r in found), "requirements": requirements}


def _cpu(artifact: Artifact, program: Program) -> list[Requirement]:
    limits = program.limits
    caches = kv_bytes(program, limits.max_len, limits.max_slots)
    needed, free = caches + program.arena_bytes + CPU_RESERVE, machine.available_memory_bytes()
    smaller = f"load with less than max_len {limits.max_len} or max_slots {limits.max_slots}"
    weights, whole = artifact.weights_path.stat().st_size, _physical_memory()
    best = native().isas()[0]
    quick = best in QUICK
    return [
        _memory("memory for caches and values", needed, free, smaller, missing=True),
        _memory(
            "memory for weights, mapped", weights + needed, whole,
            "they are read from the disk for every token; compile to fewer bits", missing=False,
        ),
        Requirement(
            "instructions", "AVX2 or AVX-512", best,
            remedy="" if quick else "portable kernels run, about a tenth as fast",
        ),
    ]  # fmt: skip


def _memory(what: str, needed: int, found: int | None, remedy: str, missing: bool) -> Requirement:
    if found is None:
        return Requirement(what, _mib(needed), "the system does not say")
    short = needed > found
    return Requirement(what, _mib(needed), _mib(found), short and missing, remedy if short else "")


def _mib(count: int) -> str:
    return f"{-(-count // (1 << 20)):,} MiB"


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _cuda(artifact: Artifact, program: Program) -> Requirement:
    from gristmill.runtime.cuda import device_for

    limits = program.limits
    try:
        device_for(program, artifact.weights_path, limits.max_len, limits.max_slots)
    except GristmillError as error:
        return Requirement("GPU", "packages, device, memory", "lacking", True, str(error))
    return Requirement("GPU", "packages, device, memory", "all three")
