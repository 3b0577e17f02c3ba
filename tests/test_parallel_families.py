"""Programs split over 2 and 4 processes that talk by gloo, against one process: every dense family in f32 and
int4, and formats, caches and attentions that a random program has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import config_of, fused, random_model, traced_of
from parallel_rank import forwards
from programs import Format, Llama, llama

from gristmill.compiler.emit import write_weights
from gristmill.compiler.formats import Formats
from gristmill.compiler.lower import lower
from gristmill.compiler.memory import plan_arena
from gristmill.compiler.options import CompileOptions
from gristmill.runtime.cpu import _native
from gristmill.runtime.parallel.split import GATHER_PAYS
from gristmill.runtime.program import Limits
from gristmill.runtime.weights_file import WeightsWriter

WORLDS = (2, 4)
FLOAT_TOLERANCE = 2e-5  # of the largest logit, f32 summed in another order
INTEGER_TOLERANCE = 2e-2  # an activation rounded the other way moves by 1/127 of its group's largest
INTEGER_MEAN = 3e-3
# Heads of 32 columns and 8 units of 64 in the middle: 4 ranks can be cut at every border of groups.
SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "phi3": {},
    "gemma2": {"head_dim": 32, "sliding_window": 5, "num_hidden_layers": 2},
    "gpt2": {"n_positions": 128, "n_embd": 256, "n_layer": 1, "n_head": 8},
    "gpt_neox": {"num_key_value_heads": 8},
    "stablelm": {},
    "olmo2": {},
    "starcoder2": {"sliding_window": 5},
    "phi": {},
    "gemma": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 5},
    "smollm3": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "exaone4": {},
    "cohere": {},
    "glm4": {"head_dim": 32},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 256},
}
# Matrices apart or merged, parts in parallel, a norm over all heads; the others in minutes.
QUICK = ("llama", "phi3", "gpt_neox", "olmo2")
WIDE = Llama(hidden=256, intermediate=512, heads=8, kv_heads=4, k_dim=32, v_dim=32, rope_dims=32)
PROGRAMS: dict[str, Llama] = {
    "one_kv_head": replace(WIDE, kv_heads=1),
    "two_kv_heads": replace(WIDE, kv_heads=2, sinks=True, qk_norm=True, bias=True),
    "int8_asymmetric": replace(WIDE, form=Format("int8", 32, False, "float32"), act_group=32, cache="int8"),
    "int4_asymmetric": replace(WIDE, form=Format("int4", 32, False), act_group=32, sinks=True),
    "int4_float": replace(WIDE, form=Format("int4", 64, False), embedding=Format("int8")),
    "int4_row": replace(WIDE, form=Format("int4"), act_group=64, bias=True),
    "int3": replace(WIDE, form=Format("int3", 32, False), act_group=32, cache="f16"),
    "int2": replace(WIDE, form=Format("int2", 64, False), act_group=32),
    "fp8": replace(WIDE, form=Format("fp8", 64), embedding=Format("fp8", 32)),
    "bf16": replace(WIDE, form=Format("bf16"), softcap=3.0, final_softcap=2.0, window=7),
    "order": replace(WIDE, form=Format("int4", 32, False), act_group=32, order=True, bias=True),
    "caches": replace(WIDE, cache="fp8", cache_v="int4", hadamard=16),
    # cut at no border of groups: 3 groups of 128 over 2 or 4 ranks, heads of 18 columns
    "uneven_groups": replace(WIDE, form=Format("int4", 128), act_group=128, intermediate=384),
    "odd_heads": Llama(form=Format("int4", 32), act_group=32, hidden=72, intermediate=104, kv_heads=4),
    "float_odd": Llama(intermediate=103, kv_heads=4),
}


def compiled(family: str, folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """(name, program, weights) of a family in f32 and in int4, from one trace."""
    config = config_of(family, **SHAPE | FAMILIES[family])
    graph = fused(traced_of(random_model(config), config))
    for weights in ("f32", "int4"):
        options = CompileOptions.of(
            weights=weights, kv="f32", **({"group_size": 32} if weights == "int4" else {})
        )
        lowered = lower(graph, Formats.of(options).scheme, options.cache_format, Limits(32, 4, 64, 128))
        plan_arena(lowered.program)
        name = f"{family}_{weights}"
        program, file = folder / f"{name}.json", folder / f"{name}.safetensors"
        program.write_bytes(lowered.program.to_bytes())
        with file.open("wb") as stream:
            write_weights(_OneFile(stream), lowered, {}, lambda stage, share: None)  # type: ignore[arg-type]
        yield name, program, file


class _OneFile:
    """What `write_weights` needs of an ArtifactWriter."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def declare_weights(self, specs: Any, metadata: dict[str, str]) -> WeightsWriter:
        self._stream.seek(0)
        self._stream.truncate()
        return WeightsWriter(self._stream, specs, metadata)


def run_ranks(folder: Path, families: Iterable[str], programs: Mapping[str, Llama]) -> Path:
    """The folder where processes of each world have left what they computed of every case."""
    cases: dict[str, tuple[str, str, int]] = {}
    for family in families:
        for name, program, weights in compiled(family, folder):
            cases[name] = (str(program), str(weights), 0 if family in ("llama", "olmo2") else GATHER_PAYS)
    for name, made in programs.items():
        weights = llama(made).write(folder / name)
        cases[name] = (str(folder / name / "program.json"), str(weights), 0)
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("parallel_rank.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for world in WORLDS:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), str(rank), str(world), str(folder)], env=environment,
                stderr=subprocess.PIPE, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        for rank in ranks:
            _, words = rank.communicate(timeout=600)
            assert rank.returncode == 0, words[-3000:]
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_ranks(tmp_path_factory.mktemp("ranks"), QUICK, PROGRAMS)


@pytest.fixture(scope="module")
def ran_slowly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_ranks(tmp_path_factory.mktemp("ranks"), [f for f in FAMILIES if f not in QUICK], {})


def names(families: Iterable[str]) -> list[str]:
    return [f"{family}_{weights}" for family in families for weights in ("f32", "int4")]


@pytest.mark.parametrize("name", [*names(QUICK), *PROGRAMS])
def test_ranks_compute_what_one_process_does(ran: Path, name: str) -> None:
    compare(ran, name)


@pytest.mark.minutes
@pytest.mark.parametrize("name", names(family for family in FAMILIES if family not in QUICK))
def test_the_other_families(ran_slowly: Path, name: str) -> None:
    compare(ran_slowly, name)


def compare(folder: Path, name: str) -> None:
    """All ranks have the same bits, and those of one process within the tolerances."""
    program, weights, _ = json.loads((folder / "cases.json").read_text())[name]
    text = Path(program).read_bytes()
    one = _native.Executor(text, weights, threads=1, max_len=64, max_slots=3)
    expected = forwards(one, one.vocabulary)
    rounded = any(i.get("act_group") for i in json.loads(text)["instructions"])
    most, mean = (INTEGER_TOLERANCE, INTEGER_MEAN) if rounded else (FLOAT_TOLERANCE, FLOAT_TOLERANCE)
    for world in WORLDS:
        found = [np.load(folder / f"{name}.{world}.{rank}.npy") for rank in range(world)]
        for other in found[1:]:
            assert np.array_equal(found[0], other), "ranks disagree"
        difference = np.abs(found[0] - expected) / np.abs(expected).max()
        assert difference.max() < most, f"{world} ranks: {difference.max():.2e} at most"
        assert difference.mean() < mean, f"{world} ranks: {difference.mean():.2e} in the mean"
