"""Ranks with a GPU each: in Triton's interpreter over gloo the same logits, tokens and hidden states as one;
with two GPUs, by NCCL, the same tests on them."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import Reference
from programs import Format, Llama, llama, write_artifact
from programs import Program as Built

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

import cuda_ranks
from cuda_cases import (  # noqa: F401  (the fixture is for all)
    FEW_TOLERANCE,
    MANY_TOLERANCE,
    SMALL,
    a_small_gpu,
    assert_close,
    in_chunks,
    ints,
    run,
    tokens_for,
)
from triton_device import DEVICE, INTERPRETED

import gristmill
from gristmill.runtime.cuda import device as cuda_device
from gristmill.runtime.decoding.draws import Draws
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.parallel import cuda_rank
from gristmill.runtime.parallel import executor as parallel_executor
from gristmill.runtime.parallel.split import split
from gristmill.runtime.profile import Forward, Roofs, probe_of
from gristmill.runtime.program import Program
from gristmill.runtime.session import Session

pytestmark = pytest.mark.skipif(
    not INTERPRETED and torch.cuda.device_count() < 2, reason="needs two GPUs, or TRITON_INTERPRET=1"
)

PAIR = dataclasses.replace(SMALL, heads=4, kv_heads=2)
CASES: dict[str, Llama] = {
    "f32": PAIR,
    "int4_int8": dataclasses.replace(
        PAIR, form=Format("int4", 32, False), embedding=Format("int8"), act_group=32, cache="int8", bias=True,
        sinks=True, hidden=128, intermediate=128,
    ),
    "f16_window": dataclasses.replace(
        PAIR, form=Format("f16"), cache="f16", qk_norm=True, window=5, final_softcap=2.0
    ),
    "gathered": dataclasses.replace(  # heads of 18 columns and groups of 32: attention's columns are gathered
        PAIR, form=Format("int8", 32), act_group=32, k_dim=18, v_dim=18, rope_dims=18, hidden=64,
        intermediate=104,
    ),
}  # fmt: skip


@contextmanager
def ranks(path: Path) -> Iterator[Session]:
    """Two ranks, which are ended afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr(cuda_device, "open_device", lambda index=None: DEVICE)
            patch.setattr(parallel_executor, "START", cuda_ranks.START)
            patch.setattr(torch.distributed, "ProcessGroupNCCL", object, raising=False)
        session = gristmill.load(path, "cuda", tensor_parallel=2, max_len=64, max_slots=3)
    yield session
    session.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(PAIR, tmp_path_factory.mktemp("pair"))[0]


@pytest.fixture(scope="module")
def pair(path: Path) -> Iterator[Session]:
    with ranks(path) as session:
        yield session


def written(case: Llama, folder: Path) -> tuple[Path, Built]:
    """An artifact of a made program, without a tokenizer."""
    built = llama(case)
    return write_artifact(built, folder / "artifact", {}, {}), built


@pytest.mark.parametrize(
    "case", ["int4_int8", *(pytest.param(c, marks=pytest.mark.minutes) for c in CASES if c != "int4_int8")]
)
def test_ranks_compute_what_one_device_does(case: str, tmp_path: Path) -> None:
    """Prefill in chunks, one padded, a decode, and the rows of two slots at once."""
    path, built = written(CASES[case], tmp_path)
    one = Reference(built)
    tokens, sizes = tokens_for(built, 9), [5, 3, 1]
    tolerance = max(FEW_TOLERANCE[CASES[case].cache], 0 if case == "f32" else MANY_TOLERANCE)
    with ranks(path) as session:
        executor = session.executor
        assert_close(in_chunks(executor, tokens, sizes), in_chunks(one, tokens, sizes), tolerance)
        assert_close(run(executor, tokens[:2], slot=1), run(one, tokens[:2], slot=1), tolerance)
        batch = (tokens[:2], ints([9, 2]), ints([0, 1]), ints([1, 0]))
        assert_close(executor.forward(*batch), one.forward(*batch), tolerance)


def test_what_is_split_and_what_is_exchanged() -> None:
    kinds = {
        name: [e.kind for e in split(Program.from_json(llama(case).json), 1, 2).exchanges]
        for name, case in CASES.items()
    }
    assert kinds["f32"] == kinds["f16_window"] == ["all_reduce"] * 2
    assert kinds["int4_int8"] == ["all_gather", "all_reduce"]  # two heads are 32 columns, and a block 64
    assert "all_gather" in kinds["gathered"]


def test_sessions_draw_copy_and_have_hidden_states(pair: Session, path: Path) -> None:
    """By rank 0 alone: the others follow."""
    one = gristmill.load(path)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]  # two chunks
    [want] = one.generate([prompt], max_new_tokens=4, temperature=0.0)
    [got] = pair.generate([prompt], max_new_tokens=4, temperature=0.0)
    assert got.token_ids == want.token_ids and pair.executor.draws_tokens  # type: ignore[attr-defined]
    batch = (prompt[:2], [0, 1], [0, 0])
    for session in (pair, one):
        session.reset(0)
    for found, expected in zip(pair.forward_hidden(*batch), one.forward_hidden(*batch), strict=True):
        assert_close(found, expected, FEW_TOLERANCE["f32"])
    pair.executor.copy_slot(0, 1, 2)
    first, second = pair.executor.forward(ints([7, 7]), ints([2, 2]), ints([0, 1]), ints([0, 1]))
    assert np.array_equal(first, second), "the other rank copied as well"


def test_refusals_leave_the_ranks_in_step(pair: Session) -> None:
    executor: Any = pair.executor
    for batch, said in [
        (([99], [0], [0], [0]), "tokens: got 99"),
        (([1], [64], [0], [0]), "positions: got 64"),
        (([1, 1], [0, 0], [0, 0], [0]), "one position twice"),
    ]:
        with pytest.raises(GristmillError, match=said):
            executor.forward(*(ints(part) for part in batch))
    with pytest.raises(GristmillError, match="got 0 draws for 1 rows"):
        executor.sample(ints([1]), ints([0]), ints([0]), ints([0]), Draws.greedy(0))
    assert run(executor, ints([1, 2])).shape == (2, executor.vocabulary)


@pytest.mark.minutes
def test_the_profile_shows_what_is_exchanged(pair: Session) -> None:
    probe = probe_of(pair)
    found = probe.profile(Roofs(1e10, 1e11, 1e11), Forward(1, 3), 2)
    [transfer] = found.transfers
    assert (transfer.name, transfer.count) == ("all_reduce", 2)
    assert transfer.bytes == 2 * 4 * PAIR.hidden and transfer.seconds > 0
    assert sum(kind.seconds for kind in found.kinds) + transfer.seconds == pytest.approx(found.seconds)
    seconds = probe.communication(Forward(1, 3))
    assert seconds is not None and seconds > 0


def test_a_rank_that_dies_ends_the_session_with_its_name(pair: Session) -> None:
    executor: Any = pair.executor
    [worker] = executor._workers
    worker.process.send_signal(signal.SIGKILL)
    worker.process.wait()
    for _ in range(2):
        with pytest.raises(GristmillError, match="rank 1 ended by signal 9; load the artifact again"):
            run(executor, ints([1]))


def test_each_rank_needs_a_gpu_of_its_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(GristmillError, match="a GPU of its own, 2 or more, and torch finds 1; load"):
        gristmill.load(path, "cuda", tensor_parallel=2)


def test_waiting_for_a_device_looks_after_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that waits for one that is gone never ends: who waits finds out."""

    class Never:
        def record(self) -> None: ...

        def query(self) -> bool:
            return False

    looked: list[int] = []

    def alive() -> None:
        looked.append(1)
        if len(looked) == 2:
            raise RuntimeError("rank 1 ended by signal 9")

    monkeypatch.setattr(torch.cuda, "Event", Never)
    with pytest.raises(RuntimeError, match="rank 1 ended"):
        cuda_rank._until_done(alive)
    assert len(looked) == 2
