"""The memory that one artifact takes over time: a process of its own loads it, takes in a prompt and decodes,
and this one looks at it from outside, so that nothing else is counted and nothing in it is slowed down.

Resident are the pages that were touched: weights are mapped from the file and count as they are read, a cache
as it fills. On a GPU the figures are of the device's memory as torch holds it for the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gristmill.report.schema import Memory, MemorySample
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.report import read_program

PERIOD = 0.01  # seconds between samples
MOST_SAMPLES = 200  # that are kept
PAGE = os.sysconf("SC_PAGE_SIZE")
CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from gristmill.report.memory import child; child()"
)


@dataclass(frozen=True)
class MemoryOptions:
    """How the artifact is loaded (see `load`), and how many tokens it takes in and decodes."""

    device: str = "cpu"
    threads: int | None = None
    max_len: int | None = None
    max_slots: int | None = None
    prompt: int = 128
    tokens: int = 32


@dataclass(frozen=True)
class Loaded:
    """memory: as the report has it; load_seconds: of `gristmill.load` in a new process, files as cached as
    they were."""

    memory: Memory
    load_seconds: float


def measure_memory(artifact: str | Path, options: MemoryOptions | None = None) -> Loaded:
    """Runs an artifact in a process of its own. Raises GristmillError as it does there."""
    plain = stored_memory(artifact)
    options = options or MemoryOptions()
    given = {"artifact": str(Path(artifact).resolve()), **vars(options)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        began = time.monotonic()
        command = [sys.executable, "-c", CHILD, json.dumps(sys.path), json.dumps(given)]
        with subprocess.Popen(command, stdout=out, stderr=errors) as process:
            samples = _watch(process, began)
        found = _result(process, out, errors)
    stages = [(at - began, name) for name, at in found["stages"]]
    memory = replace(
        plain,
        kv_bytes=found["kv_bytes"],
        resident_bytes=found["resident_bytes"],
        peak_bytes=found["peak_bytes"],
        over_time=_named(samples, stages) if options.device == "cpu" else (),
    )
    return Loaded(memory, found["load_seconds"])


def stored_memory(artifact: str | Path) -> Memory:
    """What the artifact's manifest says, without running it."""
    opened, _ = read_program(artifact)
    bits = opened.manifest.get("bits_per_weight")
    size = sum(entry.size for entry in opened.files.values())
    return Memory(size, float(bits) if isinstance(bits, (int, float)) else None, None, None, None)


def _watch(process: subprocess.Popen[Any], began: float) -> list[tuple[float, int]]:
    """(seconds, resident bytes) until the process ends."""
    samples = []
    statm = Path(f"/proc/{process.pid}/statm")
    while process.poll() is None:
        with suppress(OSError, IndexError):  # it ends just now
            samples.append((time.monotonic() - began, int(statm.read_text().split()[1]) * PAGE))
        time.sleep(PERIOD)
    return [sample for sample in samples if sample[1]]  # one that has ended has none


def _result(process: subprocess.Popen[Any], out: Any, errors: Any) -> dict[str, Any]:
    for file in (out, errors):
        file.seek(0)
    lines = out.read().splitlines()
    found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if process.returncode == 0 and "error" not in found:
        return dict(found)
    reason = found.get("error") or next(iter(reversed(errors.read().splitlines())), "no message")
    if process.returncode < 0:
        reason = f"signal {-process.returncode}: {reason}"
    raise GristmillError(f"running the artifact in a process of its own failed: {reason}")


def _named(samples: list[tuple[float, int]], stages: list[tuple[float, str]]) -> tuple[MemorySample, ...]:
    """The samples with the stage that had begun last; of many, evenly spaced ones and the highest."""
    step = -(-len(samples) // MOST_SAMPLES)
    highest = max(samples, key=lambda sample: sample[1], default=None)
    kept = [sample for i, sample in enumerate(samples) if i % step == 0 or sample == highest]
    return tuple(
        MemorySample(
            round(at, 4), size, [name for begin, name in stages if begin <= at or name == "start"][-1]
        )
        for at, size in kept
    )


def child() -> None:
    """What runs in the process that is watched; its argument is `measure_memory`'s, as JSON."""
    try:
        found = _run(json.loads(sys.argv[2]))
    except GristmillError as error:
        found = {"error": str(error)}
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)  # what the interpreter does to end is not the artifact's


def _run(given: dict[str, Any]) -> dict[str, Any]:
    from gristmill.report.forwards import decode_seconds
    from gristmill.runtime.profile import random_ids, take_in
    from gristmill.runtime.session import load

    stages = [("start", 0.0), ("load", time.monotonic())]
    how = {name: given[name] for name in ("device", "threads", "max_len", "max_slots")}
    session = load(given["artifact"], **how)
    stages.append(("prefill", time.monotonic()))
    with session.slot() as slot:
        prompt = max(1, min(given["prompt"], session.max_len - given["tokens"]))
        take_in(session, slot, random_ids(session, prompt))
        stages.append(("decode", time.monotonic()))
        decode_seconds(session, [slot], prompt, min(given["tokens"], session.max_len - prompt))
        resident, peak = _device_bytes() if given["device"] == "cuda" else _host_bytes()
    return {
        "stages": stages,
        "load_seconds": stages[2][1] - stages[1][1],
        "kv_bytes": session.memory["kv_bytes"],
        "resident_bytes": resident,
        "peak_bytes": peak,
    }


def _host_bytes() -> tuple[int, int]:
    """Resident now, and at most so far; the kernel's own count, which a short peak does not slip through."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def _device_bytes() -> tuple[int, int]:
    import torch

    return torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
