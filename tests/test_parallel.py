"""A session of several processes: the same texts and logits as one, refusals, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from programs import Format, Llama, llama
from tiny import tiny_artifact

import gristmill
from gristmill.cli import cli
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.parallel.exchange import Exchanges
from gristmill.runtime.parallel.layout import Heads, Parts, even
from gristmill.runtime.parallel.split import split
from gristmill.runtime.profile import Forward, Roofs, probe_of
from gristmill.runtime.program import LOGITS, Program, View
from gristmill.runtime.session import Session

TOLERANCE = 2e-5  # of the largest logit, f32
LIMIT_S = 60.0  # for a process to end; it takes a second


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("parallel") / "artifact")


@pytest.fixture(scope="module")
def pair(path: Path) -> Iterator[Session]:
    session = gristmill.load(path, tensor_parallel=2, threads=2)
    yield session
    session.close()


# ---- the split


def test_units_are_shared_out_and_none_goes_without() -> None:
    assert even(100, 3, 16) == (((0, 32),), ((32, 64),), ((64, 100),))
    assert even(100, 2, 64, first=10) == (((10, 74),), ((74, 110),))
    assert even(64, 2, 64) is None
    parts = Parts((((0, 4), (8, 10)), ((4, 8), (10, 12))))
    assert parts.width(1) == 6
    assert parts.local(1, View(3, 8, 4)) == View(3, 4, 2)
    assert parts.within(1, View(3, 8, 4)) == [(2, 4)]


@pytest.mark.parametrize(
    "heads, kv_heads, world, expected",
    [
        (8, 4, 2, [((0, 4), (0, 2)), ((4, 8), (2, 4))]),
        (8, 2, 4, [((0, 2), (0, 1)), ((2, 4), (0, 1)), ((4, 6), (1, 2)), ((6, 8), (1, 2))]),
        (4, 1, 2, [((0, 2), (0, 1)), ((2, 4), (0, 1))]),
    ],
)
def test_query_heads_go_with_the_heads_they_read(heads, kv_heads, world, expected) -> None:
    found = [Heads.of(heads, kv_heads, rank, world) for rank in range(world)]
    assert [(h.queries, h.keys) for h in found] == expected


def program_of(case: Llama) -> Program:
    return Program.from_json(llama(case).json)


@pytest.mark.parametrize(
    "heads, kv_heads, world, instead",
    [
        (7, 7, 2, "it can be 7"),
        (6, 2, 4, "it can be 2, 6"),
        (6, 3, 2, "it can be 3, 6"),
        (1, 1, 2, "without"),
    ],
)
def test_odd_heads_are_refused_with_what_can_be(heads, kv_heads, world, instead) -> None:
    program = program_of(Llama(heads=heads, kv_heads=kv_heads))
    with pytest.raises(GristmillError, match=f"{heads} heads over {kv_heads} of keys.*{instead}"):
        split(program, 0, world)


def test_instructions_that_it_does_not_know_are_refused() -> None:
    program = program_of(Llama(kv_heads=4))
    program.instructions[2].op = "experts"
    with pytest.raises(GristmillError, match="cannot split the instruction 'experts'.*load it without"):
        split(program, 0, 2)


def test_a_block_has_two_sums_and_the_head_a_gather() -> None:
    made = split(program_of(Llama(kv_heads=4)), 1, 2, gather_pays=0)
    assert [e.kind for e in made.exchanges] == ["all_reduce"] * 4 + ["all_gather"]
    assert len(made.program.instructions) == len(program_of(Llama()).instructions)
    sums = [i for i in made.program.instructions if "residual" in i.views]
    assert not sums, "rank 1 adds no residual"
    widths = [
        made.program.values[i.out.value].width for i in made.program.instructions if i.op == "attention"
    ]
    assert widths == [2 * 18] * 2


def test_linears_before_a_sum_go_in_bands() -> None:
    made = split(program_of(Llama(kv_heads=4)), 1, 2, gather_pays=0)
    arena = np.zeros(made.program.arena_bytes, np.uint8)
    exchanges = Exchanges(None, made.program, made.exchanges, arena, band=5)  # type: ignore[arg-type]
    assert exchanges.band == [5, 5, 5, 5, 0]
    ops = [made.program.instructions[index] for index in exchanges.after]
    assert all(i.op == "linear" for i in ops) and ops[-1].out.value == LOGITS


def test_groups_that_a_border_would_cut_are_gathered() -> None:
    """Three groups of 128 in the middle, two ranks: 256 and 128 columns; heads of 18 columns: gathered."""
    form = Format("int4", 128)
    made = split(program_of(Llama(form=form, act_group=128, hidden=256, intermediate=384)), 0, 2)
    columns = {piece.columns for piece in made.matrices if piece.source.name.endswith("down.0")}
    assert columns == {(0, 128)}
    kinds = [e.kind for e in made.exchanges]
    assert kinds == ["all_gather", "all_reduce"] * 2


# ---- sessions


def test_texts_and_logits_are_those_of_one_process(path: Path, pair: Session) -> None:
    one = gristmill.load(path)
    prompts = ["hello", "a longer prompt", "x"]
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": 3}
    assert [g.text for g in pair.generate(prompts, **options)] == [
        g.text for g in one.generate(prompts, **options)
    ]
    assert pair.beam_search("ab", num_beams=3, max_new_tokens=6)[0].text == (
        one.beam_search("ab", num_beams=3, max_new_tokens=6)[0].text
    )
    batch = ([5, 6, 7, 8], [0, 1, 2, 0], [0, 0, 0, 1])
    for got, want in zip(pair.forward_hidden(*batch), one.forward_hidden(*batch), strict=True):
        assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()
    assert pair.threads == 2


def test_what_one_process_refuses_is_refused_and_work_goes_on(pair: Session) -> None:
    with pytest.raises(GristmillError, match="not taken|gap|position"):
        pair.forward([1], [40], [3])
    with pytest.raises(GristmillError, match="positions"):  # by the executors of both ranks
        pair.executor.forward(*(np.array(v, np.int32) for v in ([1], [9999], [0], [0])))
    assert pair.forward([1], [0], [3]).shape == (1, pair.vocabulary)


def test_the_profile_shows_what_is_exchanged(pair: Session) -> None:
    probe = probe_of(pair)
    found = probe.profile(Roofs(1e10, 1e11, 1e11), Forward(4, 3), 3)
    [transfer] = found.transfers
    assert (transfer.name, transfer.count, transfer.bytes) == ("all_reduce", 1, 4 * 4 * 16)
    assert 0 < transfer.seconds < found.seconds
    assert sum(kind.seconds for kind in found.kinds) + transfer.seconds == pytest.approx(found.seconds)
    seconds = probe.communication(Forward(1, 3))
    assert seconds is not None and seconds > 0


def test_ctrl_c_waits_for_the_end_of_a_forward(pair: Session) -> None:
    seen: list[int] = []
    forward = pair.executor._rank.forward  # type: ignore[attr-defined]

    def interrupted(*batch, **how):
        os.kill(os.getpid(), signal.SIGINT)
        result = forward(*batch, **how)
        seen.append(len(result))
        return result

    pair.executor._rank.forward = interrupted  # type: ignore[attr-defined]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            pair.forward([4], [0], [2])
    finally:
        signal.signal(signal.SIGINT, before)
        pair.executor._rank.forward = forward  # type: ignore[attr-defined]
    assert seen == [1], "the forward was cut short"
    pair.reset(2)
    assert pair.forward([4], [0], [2]).shape == (1, pair.vocabulary)


def test_a_rank_that_dies_ends_the_session_with_its_name(path: Path) -> None:
    session = gristmill.load(path, tensor_parallel=2)
    [worker] = session.executor._workers  # type: ignore[attr-defined]
    worker.process.send_signal(signal.SIGKILL)
    worker.process.wait(LIMIT_S)
    for _ in range(2):
        with pytest.raises(GristmillError, match="rank 1 ended by signal 9; load the artifact again"):
            session.forward([1], [0], [0])


def test_closing_ends_the_ranks(path: Path) -> None:
    session = gristmill.load(path, tensor_parallel=2)
    [worker] = session.executor._workers  # type: ignore[attr-defined]
    session.close()
    assert worker.process.poll() == 0
    with pytest.raises(GristmillError, match="it was closed"):
        session.forward([1], [0], [0])


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit(0)"])
def test_ranks_end_with_their_parent(path: Path, tmp_path: Path, how: str) -> None:
    code = f"""
import os, signal, gristmill
session = gristmill.load({str(path)!r}, tensor_parallel=2)
print(session.executor._workers[0].process.pid, flush=True)
{how}
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=600,
    )
    pid, until = int(done.stdout), time.monotonic() + LIMIT_S
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}/exe").exists(), "the rank runs on"


def test_a_forked_process_is_told_to_load_for_itself(pair: Session) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            pair.executor.forward(*(np.array(v, np.int32) for v in ([1], [0], [0], [0])))
        except GristmillError as error:
            os._exit(7 if "in a fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert pair.forward([1], [0], [1]).shape == (1, pair.vocabulary)


def test_what_does_not_go_together_is_refused(path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"device": "torchscript"}, "devices 'cpu' and 'cuda', got 'torchscript'"),
        ({"pin": True}, "pin is for one process"),
        ({"tensor_parallel": 0}, "expected an integer from 1 to 64"),
        ({"tensor_parallel": 3}, "2 heads over 1 of keys and values, .*it can be 2"),
    ]
    for how, words in refused:
        with pytest.raises(GristmillError, match=words):
            gristmill.load(path, **{"tensor_parallel": 2, **how})


def test_a_rank_that_cannot_open_says_why(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.runtime.parallel import executor

    broken = executor.START.replace("main()", "(_ for _ in ()).throw(SystemExit(3))")
    monkeypatch.setattr(executor, "START", broken)
    with pytest.raises(GristmillError, match="rank 1 did not start: it ended with exit code 3"):
        gristmill.load(path, tensor_parallel=2)


def test_commands_take_it(path: Path) -> None:
    asked = ["--tensor-parallel", "2"]
    alone = CliRunner().invoke(cli, ["run", str(path), "--prompt", "x", "--max-new-tokens", "5"])
    both = CliRunner().invoke(cli, ["run", str(path), "--prompt", "x", "--max-new-tokens", "5", *asked])
    assert both.exit_code == 0 and both.stdout == alone.stdout
    bench = ["bench", str(path), "--prompt", "8", "--tokens", "4", "--rounds", "1", "--profile"]
    found = CliRunner().invoke(cli, [*bench, *asked])
    assert found.exit_code == 0, found.output
    assert "communication" in found.stdout and "all_reduce" in found.stdout
