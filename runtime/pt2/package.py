"""The AOTInductor package of an exported folder: its entry points, loaded without weights."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

PACKAGE = "model.pt2"
DECODE, PREFILL = "decode", "prefill"


def opened_package(path: Path) -> dict[str, Any]:
    """Each entry point by name. Raises RuntimeError or ValueError for what is no package of both."""
    from torch.export.pt2_archive._package import load_pt2

    runners = load_pt2(str(path), run_single_threaded=True).aoti_runners
    if not {DECODE, PREFILL} <= runners.keys():
        raise ValueError(f"it has the entry points {sorted(runners)}, expected {DECODE} and {PREFILL}")
    return runners


def this_machine() -> dict[str, str]:
    """What a package is tied to: one system, instruction set and version of torch."""
    return {
        "device": "cpu", "torch": torch.__version__.split("+")[0], "system": platform.system(),
        "machine": platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
