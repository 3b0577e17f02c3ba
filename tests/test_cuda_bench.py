"""What `gristmill bench` does on a GPU, with the executor in Triton's interpreter and a clock instead of
events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import llama

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from cuda_cases import CASES, a_small_gpu, make  # noqa: F401
from triton_device import DEVICE

from gristmill.kernels.triton.stream import BLOCK, read
from gristmill.report import explain
from gristmill.runtime.bench import BenchOptions, measure_round
from gristmill.runtime.cuda.probe import CudaProbe, Sizes
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.profile import Forward, Roofs, probe_of
from gristmill.runtime.program import Program
from gristmill.runtime.session import Session

SIZES = Sizes(stream=4 << 10, matrix=16, repeats=1)


def session_in(directory: Path) -> Session:
    program = llama(CASES["f32"])
    return Session(None, Program.from_json(program.json), make(program, directory))


@pytest.mark.parametrize("count", [1, BLOCK, 2 * BLOCK + 77])
def test_all_of_the_memory_is_read(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    x = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, generator=generator)
    out = torch.full((2,), 7, dtype=torch.int32, device=DEVICE)
    read(x.to(DEVICE), out)
    assert int(out[0]) ^ int(out[1]) == int(np.bitwise_xor.reduce(x.numpy()))


def test_kinds_are_timed_alone_beside_their_roofs(tmp_path: Path) -> None:
    """A clock that counts instructions instead of seconds: every kind gets what its own launches took."""
    session = session_in(tmp_path)
    launched: list[int] = []
    executor: Any = session.executor
    launch = executor._launcher.launch

    def counted(index: int) -> None:
        launched.append(index)
        launch(index)

    executor._launcher.launch = counted

    def seconds(run: Any, repeats: int) -> float:
        launched.clear()
        for _ in range(repeats):
            run()
        return len(launched) / repeats

    probe = CudaProbe(executor, session, SIZES, seconds)
    found = probe.profile(Roofs(100.0, 1000.0, 1000.0), Forward(2, 1), 1)
    assert {kind.name: kind.seconds for kind in found.kinds} == {k.name: k.count for k in found.kinds}
    assert found.seconds == len(session.program.instructions) and found.shared_phases is None
    linear = next(kind for kind in found.kinds if kind.name.startswith("linear") and "head" in kind.name)
    assert linear.bytes == 40 * 64 * 4 and linear.floor == linear.bytes / 100
    with pytest.raises(GristmillError, match="position"):
        probe.profile(Roofs(1.0, 1.0, 1.0), Forward(1, 5000), 1)


def test_transfers_are_timed_alone(tmp_path: Path) -> None:
    """Ids in, and tokens back; logits where the host draws from them."""
    session = session_in(tmp_path)
    executor: Any = session.executor
    probe = CudaProbe(executor, session, SIZES)
    assert probe.communication(Forward(2, 1, 2)) > 0
    executor.draws_tokens = False
    assert probe.communication(Forward(1, 1, 2)) > 0


def test_a_phase_is_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `report.explain` does, of one phase alone; the interpreter's times say nothing."""
    session = session_in(tmp_path)
    executor: Any = session.executor
    executor.probe = lambda session: CudaProbe(executor, session, SIZES)
    plan = explain.Plan("decode", Forward(1, 1), (), (Forward(1, 1),))
    monkeypatch.setattr(explain, "phases", lambda session, options: [plan])
    (found,) = explain.explain_session(session, explain.WhyOptions(device="cuda", seconds=0.0))
    assert found.communication is not None and 0 < found.communication < found.seconds
    assert sum(kind.count for kind in found.kinds) == len(session.program.instructions)


def test_a_round_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_in(tmp_path)
    executor: Any = session.executor
    assert isinstance(probe_of(session), CudaProbe)
    probe = CudaProbe(executor, session, SIZES)
    roofs = probe.roofs(2.0)
    assert roofs.stream == 2e9 and roofs.floats == roofs.integers > 0
    drawn, sample = [], executor.sample

    def counted(*batch: Any, draws: Any) -> Any:
        drawn.append(len(draws))
        return sample(*batch, draws)

    monkeypatch.setattr(executor, "sample", counted)
    options = BenchOptions(prompt=3, tokens=1, context=0, rounds=1)
    assert all(figure > 0 for figure in measure_round(session, options, probe))
    assert drawn == [1, 1], "tokens are drawn there: one to warm up, one that counts"
