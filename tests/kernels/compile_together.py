"""Compiles launches for sm_90, "together" or "alone", in a process of its own; see test_cuda_compiling.py.

Prints PTX by kernel, and how many kernels were not there when they were launched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from compile_sm90 import compile_only, use_no_device
from triton_attention_launches import decoding
from triton_linear_launches import call

from gristmill.kernels.triton.embedding import embedding
from gristmill.kernels.triton.matrix import meta_matrix
from gristmill.runtime.cuda.compiling import compiled_together

IDS = torch.empty(1, dtype=torch.int32, device="meta")
OUT = torch.empty(1, 1024, device="meta")
INT8 = meta_matrix("int8", 512, 1024)  # a name of one of Triton's types, as bf16 is
LAUNCHES: list[Callable[[], object]] = [
    partial(call, meta_matrix("int4", 512, 1024, 128), 1, act_group=128),
    partial(call, INT8, 1, act_group=128),
    partial(call, INT8, 2),
    partial(call, meta_matrix("fp8", 512, 1024), 2),
    partial(call, meta_matrix("bf16", 512, 1024), 16),
    partial(embedding, IDS, [INT8], OUT),
    decoding(1, "int8", 256),
]


@triton.jit
def wrong_kernel(x):
    tl.store(x, tl.arange(0, 3))  # 3 is no power of two


def main(how: str) -> None:
    use_no_device()
    if how == "together":
        with compiled_together():
            for launch in LAUNCHES * 2:
                launch()
            wrong_kernel[(1,)](IDS)
    compiled: dict[str, list[str]] = {}
    asked: list[str] = []
    triton.knobs.runtime.jit_cache_hook = lambda **about: asked.append(about["repr"])
    compile_only(lambda kernel, grid, log: compiled.setdefault(kernel.name, []).append(kernel.asm["ptx"]))
    for launch in LAUNCHES:
        launch()
    try:
        wrong_kernel[(1,)](IDS)
    except triton.CompilationError:
        sys.stdout.write(json.dumps([compiled, len(asked)]))


if __name__ == "__main__":
    main(sys.argv[1])
