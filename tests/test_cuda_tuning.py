"""Configs that were timed, in their file: what is kept, for what, and what is not believed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import llama
from tiny import fake_session

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from cuda_cases import CASES, a_small_gpu, make  # noqa: F401
from triton_device import DEVICE
from triton_matrices import random_matrix

from gristmill.kernels.triton import linear
from gristmill.kernels.triton.linear_configs import candidates, choose
from gristmill.kernels.triton.matrix import Matrix
from gristmill.runtime.cuda import tuning
from gristmill.runtime.errors import GristmillError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gristmill"


def on_device(m: Matrix) -> Matrix:
    assert m.scale is not None
    return replace(m, data=m.data.to(DEVICE), scale=m.scale.to(DEVICE))


class Clock:
    """The longer a call was asked about, the faster it is: the last candidate wins."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: Any) -> float:
        assert callable(call)
        self.calls += 1
        return 1.0 / self.calls


def test_winners_are_kept_and_planned_with(tmp_path: Path, cache: Path) -> None:
    program = llama(CASES["int4_int8"])
    executor, clock = make(program, tmp_path), Clock()
    found = dict(executor.tune(4, clock))
    rows = {int(key.split(", ")[1].split()[0]) for key in found}
    assert rows == {1, 2, 4} and any(" pair" in key for key in found)
    stored = json.loads(next(cache.iterdir()).read_text())
    assert stored["configs"] == {key: asdict(config) for key, config in found.items()}

    before = clock.calls
    assert dict(executor.tune(4, clock)) == found and clock.calls == before, "known ones are not timed again"
    plans = executor._launcher.products.plans
    again = make(program, tmp_path)._launcher.products.plans
    head = len(program.json["instructions"]) - 1
    matrix = executor._weights.matrices["head"][0]
    assert plans[head, 1].configs == (choose(matrix, 1, 32),)
    assert again[head, 1].configs == (candidates(matrix, 1, False, 32)[-1],) != plans[head, 1].configs
    assert again[head, 8].configs == plans[head, 8].configs, "what was not timed is the table's"
    assert again.keys() == plans.keys()


def test_an_interrupted_run_keeps_what_it_had(tmp_path: Path) -> None:
    executor, clock = make(llama(CASES["f32"]), tmp_path), Clock()
    tuned: Any = executor.tune(1, clock)
    first, _ = next(tuned)
    tuned.close()
    assert list(tuning.Tuned.read(DEVICE).found) == [first]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', "\xff"])
def test_a_damaged_file_is_left_out(content: str, cache: Path) -> None:
    path = tuning.Tuned({"x": {}}).write(DEVICE)
    path.write_bytes(content.encode("latin-1"))
    with pytest.warns(UserWarning, match="is left out, it cannot be read.*gristmill tune") as told:
        assert not tuning.Tuned.read(DEVICE).found
    assert len(told) == 1 and "\n" not in str(told[0].message)


def test_what_is_no_candidate_is_not_believed() -> None:
    matrix = random_matrix("int4", 64, 256, 128)[0]
    good, key = candidates(matrix, 1)[-1], tuning.key_of(matrix, 1, False, 0)
    assert tuning.Tuned({key: asdict(good)}).configs([matrix], 1, False, 0) == [good]
    for bad in (asdict(replace(good, rows=7)), {"rows": 4}, None, "fast", asdict(good) | {"more": 1}):
        found = tuning.Tuned({key: bad}).configs([matrix], 1, False, 0)  # type: ignore[dict-item]
        assert found == [choose(matrix, 1)]
    assert tuning.Tuned({key: asdict(good)}).configs([matrix], 2, False, 0) == [choose(matrix, 2)]
    assert tuning.Tuned({key: asdict(good)}).configs([matrix], 1, False, 128) == [choose(matrix, 1, 128)]


def test_a_file_is_for_one_device_and_one_state_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    here = tuning.identity(DEVICE)
    assert here == tuning.identity(DEVICE) and len(here["kernels"]) == 64
    names = {tuning.cache_file(here)}
    for name, value in (("device", "another"), ("capability", [9, 1]), ("triton", "0"), ("kernels", "0")):
        names.add(tuning.cache_file({**here, name: value}))
    assert len(names) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    monkeypatch.setenv("HOME", "/nowhere")
    assert tuning.cache_file(here).parent == Path("/nowhere/.cache/gristmill")


def test_what_cannot_be_written_is_said(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the directory would be")
    with pytest.raises(GristmillError, match="cannot be written: .*set XDG_CACHE_HOME"):
        tuning.Tuned().write(DEVICE)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("tokens", [1, 16])
def test_every_candidate_computes(tokens: int, glu: bool) -> None:
    """The smallest pieces of a product and the most splits give what the table's config gives."""
    matrix = random_matrix("int4", 32, 160, 32)[0]
    given = candidates(matrix, tokens, glu)
    some = [given[0], min(given, key=lambda c: (c.rows, c.chunks)), max(given, key=lambda c: c.splits)]
    x, results = torch.ones(tokens, 160, device=DEVICE), []
    for config in some:
        out = torch.full((tokens, 16 if glu else 32), torch.nan, device=DEVICE)
        linear._call(on_device(matrix), x, out, config, torch.bfloat16, glu)()
        results.append(out.cpu())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


def test_a_session_on_the_cpu_has_nothing_to_tune() -> None:
    with pytest.raises(GristmillError, match="load with device='cuda'"):
        list(fake_session().tune())
