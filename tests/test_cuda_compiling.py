"""Kernels that are compiled together are those that launches would have compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from triton_device import ahead_of_time

SCRIPT = Path(__file__).parent / "kernels" / "compile_together.py"


def compiled(how: str, folder: Path) -> tuple[dict[str, list[str]], int]:
    """PTX by kernel, and how many kernels were not there when they were launched."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TRITON_CACHE_DIR": str(folder / how), "TRITON_DISABLE_LINE_INFO": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(SCRIPT), how], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    kernels, missing = json.loads(done.stdout)
    return kernels, missing


@ahead_of_time
def test_launches_find_what_was_compiled_together(tmp_path: Path) -> None:
    together, missing = compiled("together", tmp_path)
    assert missing == 1, "all but the one that does not compile"
    alone, missing = compiled("alone", tmp_path)
    assert missing > 8 and together == alone
