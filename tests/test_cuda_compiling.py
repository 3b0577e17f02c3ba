"""Kernels that are compiled together are those that launches would have compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from triton_device import ahead_of_time

SCRIPT = """
from functools import partial

import triton
from compile_sm90 import _compile_only, use_no_device
from triton_linear_launches import call

from gristmill.kernels.triton.matrix import meta_matrix
from gristmill.runtime.cuda.compiling import compiled_together

launches = [
    partial(call, meta_matrix("int4", 512, 1024, 128), 1, act_group=128, handover=False),
    partial(call, meta_matrix("fp8", 512, 1024), 2),
    partial(call, meta_matrix("bf16", 512, 1024), 16),
]
use_no_device()
with compiled_together():
    for launch in launches * 2:
        launch()
compiled, asked = [], []
triton.knobs.runtime.jit_cache_hook = lambda **about: asked.append(about["repr"])
_compile_only(lambda kernel, grid, log: compiled.append(kernel.name))
for launch in launches:
    launch()
print(sorted(compiled), len(asked))
"""


@ahead_of_time
def test_launches_find_what_was_compiled_together(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TRITON_CACHE_DIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, timeout=300
    )
    kernels = ["decode_kernel", "integer_kernel", "quantize_kernel", "tensor_core_kernel"]
    assert (done.returncode, done.stdout) == (0, f"{kernels} 0\n"), done.stderr
