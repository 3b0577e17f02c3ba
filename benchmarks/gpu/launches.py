"""The launches of one decoded row that paper.py has compiled for sm_90; a module for compile_sm90.py.

BENCH_GPU_PAPER in the environment names the shape and the formats. A program of two layers has every form of
a kind of instruction: after the first layer, products are handed over to the next one's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator

from make_model import SHAPES
from random_artifact import RandomModel

from gpu.adapter import meta_launcher, steps
from gpu.paper import DEVICES, label
from gristmill.compiler.options import CompileOptions

MAX_LEN = 4096


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    asked = json.loads(os.environ["BENCH_GPU_PAPER"])
    config = {**SHAPES[asked["shape"]], "num_hidden_layers": 2}
    model = RandomModel(asked["shape"], config)
    for name in asked["formats"]:
        program = model.program(CompileOptions.of(weights=name))
        launcher = meta_launcher(program, 1, MAX_LEN, DEVICES["h100"].processors)
        for step in steps(launcher, 1):
            yield label(name, step.kind), step.run
