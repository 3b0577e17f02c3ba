"""Exports to TorchScript: traced once, for any number of rows, and frozen when loaded."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import Array, Llama, llama
from test_executor import CASES, assert_close, tokens_for
from test_onnx_export import PROMPT, relative
from test_program_module import in_chunks, module

import gristmill
from gristmill.cli import run_command
from gristmill.export.torchscript_folder import traced
from gristmill.runtime.errors import GristmillError

TOLERANCE = 1e-6  # of the largest logit: the same kernels
CHUNKS = [11, 1, 16, 2]
TRACED = {name: CASES[name] for name in ("f16", "int3", "fp8", "order", "kv_fp8")}
SINKS = Llama(sinks=True, window=7, softcap=3.0, rope_style="interleaved", rope_dims=8)


class Loaded:
    """A traced module with the interface that `in_chunks` needs."""

    def __init__(self, script: Any, caches: list[torch.Tensor]) -> None:
        self.script, self.caches = script, caches

    def empty_caches(self) -> list[torch.Tensor]:
        return self.caches

    def __call__(self, *arguments: Any) -> torch.Tensor:
        logits: torch.Tensor = self.script(*arguments)[0]
        return logits


@pytest.mark.parametrize("case", [*TRACED, "sinks"])
def test_the_trace_is_of_any_number_of_rows(case: str, tmp_path: Path) -> None:
    given = TRACED | {"sinks": SINKS}
    built = llama(given[case])
    model = module(built, tmp_path, packed=True)
    buffer = io.BytesIO()
    torch.jit.save(traced(model), buffer)
    buffer.seek(0)
    script = torch.jit.freeze(torch.jit.load(buffer).eval())
    tokens = tokens_for(built, sum(CHUNKS))
    got = in_chunks(Loaded(script, model.empty_caches(40)), tokens, CHUNKS)  # type: ignore[arg-type]
    assert_close(got, in_chunks(model, tokens, CHUNKS), TOLERANCE)


@pytest.fixture(scope="module")
def exported(py7m_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(artifact, its export)"""
    out = tmp_path_factory.mktemp("torchscript") / "o"
    return py7m_int4, gristmill.export_checkpoint(py7m_int4, out, "torchscript")


def test_a_session_runs_it(exported: tuple[Path, Path]) -> None:
    ours, theirs = (
        gristmill.load(path, device, threads=1, max_slots=2)
        for path, device in zip(exported, ("cpu", "torchscript"))
    )
    ids = ours.tokenizer.encode(PROMPT)
    want, got = (s.forward_hidden(ids, range(len(ids)), [0] * len(ids)) for s in (ours, theirs))
    for ours_part, theirs_part in zip(want, got):
        assert relative(theirs_part, ours_part) < 2e-2, "rounded alike: activations and cache"
    theirs.reset(0)
    exact = logits_of(theirs, ids, [len(ids)])
    assert relative(logits_of(theirs, ids, [5, 1, len(ids) - 6]), exact) < 2e-2
    beams = theirs.beam_search(PROMPT, num_beams=2, max_new_tokens=3)  # which copies slots
    assert len(beams[0].token_ids) == 3


def logits_of(session: gristmill.Session, ids: list[int], sizes: list[int]) -> Array:
    parts, at = [], 0
    for size in sizes:
        parts.append(session.forward(ids[at : at + size], range(at, at + size), [1] * size))
        at += size
    session.reset(1)
    return np.concatenate(parts)


def test_f32_text_is_the_artifacts(stories_f32: Path, tmp_path: Path) -> None:
    out = gristmill.export_checkpoint(stories_f32, tmp_path / "o", "torchscript")
    sessions = [gristmill.load(stories_f32), gristmill.load(out, device="torchscript", threads=1)]
    texts = [s.generate([1], max_new_tokens=200, ignore_eos=True).token_ids for s in sessions]
    assert texts[0] == texts[1]
    scores = [s.forward([1, 300, 301], [0, 1, 2], [0, 0, 0]) for s in sessions]
    assert relative(scores[1], scores[0]) < 1e-4


def test_weights_stay_packed_in_the_file(exported: tuple[Path, Path]) -> None:
    artifact, out = exported
    size = (artifact / "weights.safetensors").stat().st_size
    assert (out / "model.pt").stat().st_size < 1.15 * size


def test_the_command(exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, out = str(exported[0]), str(tmp_path / "o")
    command = ["export", artifact, "--to", "torchscript", "-o", out]
    assert run_command([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": out, "format": "torchscript"}
    assert run_command([*command, "--plain"]) == 2
    assert "--plain is for --to onnx" in capsys.readouterr().err
    with pytest.raises(GristmillError, match="export to torchscript: load it with device='torchscript'"):
        gristmill.load(out)
    with pytest.raises(GristmillError, match="is an export to 'torchscript', expected onnx"):
        gristmill.load(out, device="onnx:cpu")
    file = Path(out) / "model.pt"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(GristmillError, match="cannot load .*model.pt") as caught:
        gristmill.load(out, device="torchscript")
    assert "\n" not in str(caught.value)
