"""Signals end a run whose main thread is in one long operation, as of torch; nothing half written is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gristmill.runtime.ending import ENDING, ended_by_signals

# A call that takes hours, without the interpreter's lock and without looking at signals.
PREPARED = """
import hashlib, signal, sys, time
sys.path[:] = [p for p in sys.path if p]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what runs under nohup this
def hold():
    print("held", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
WRITE = PREPARED + """
from tiny import fill
from gristmill.runtime.artifact_writer import ArtifactWriter
from gristmill.runtime.ending import ended_by_signals
with ended_by_signals(float(sys.argv[2])), ArtifactWriter(sys.argv[1]) as writer:
    writer.seal(fill(writer))
    hold()
"""
COMPILE = PREPARED + """
import gristmill
from gristmill.cli import main
gristmill.compile = lambda *model, **options: hold()
main(["compile", "model", "-o", "out"])
"""
# The sweep's child, which says by a file that it is held.
CHILD = PREPARED + """
from pathlib import Path
import os
from tiny import fill
from gristmill.report import tasks
from gristmill.runtime.artifact_writer import ArtifactWriter
@tasks.task
def compile_model(model, out, options, progress):
    with ArtifactWriter(out) as writer:
        writer.seal(fill(writer))
        Path("held.tmp").write_text(str(os.getpid()))
        os.rename("held.tmp", "held")
        hold()
tasks.main()
"""
REPORT = PREPARED + """
from gristmill.report import jobs
from gristmill.cli import main
jobs.BOOT = sys.argv[1]
jobs.PATIENCE = float(sys.argv[2])
main(["report", "model", "-o", "out", "--weights", "int4", "--methods", "gptq"])
"""


def start(tmp_path: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def held(process: subprocess.Popen[str]) -> None:
    """Returns once its main thread is in the operation: nothing else takes processor time after that line."""
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    begin = ticks(process.pid)
    while ticks(process.pid) < begin + 5:
        assert process.poll() is None
        time.sleep(0.01)


def ticks(pid: int) -> int:
    """Processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and what it said."""
    try:
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, said


@pytest.mark.parametrize("number", ENDING)
def test_a_writer_in_a_long_operation_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, WRITE, str(tmp_path / "a"), "0.2")
    held(process)
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(number)
    assert ended(process) == (128 + number, "interrupted\n" if number == signal.SIGINT else "")
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_takes_the_grace_away(tmp_path: Path) -> None:
    process = start(tmp_path, WRITE, str(tmp_path / "a"), "1e6")
    held(process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] in (130, 143)  # two that are there at once come in the order of their numbers
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_compile_ends(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, COMPILE)
    held(process)
    process.send_signal(number)
    assert ended(process)[0] == 128 + number


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
def test_report_ends_with_its_child(tmp_path: Path, numbers: list[signal.Signals]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    process = start(tmp_path, REPORT, CHILD, "60" if len(numbers) > 1 else "20")
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "held").exists():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.01)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.1)  # the second comes while the child is waited for
        code, said = ended(process)
    finally:
        process.kill()
    assert code == 128 + numbers[0], said
    assert "Traceback" not in said
    child = Path(f"/proc/{(tmp_path / 'held').read_text()}")
    until = time.monotonic() + 60
    while child.exists() and ") Z " not in (child / "stat").read_text():
        assert time.monotonic() < until, "the child goes on"
        time.sleep(0.01)
    if len(numbers) == 1:
        assert not list((tmp_path / "out").rglob("*.tmp-*"))


def test_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in ENDING]
    with ended_by_signals():
        pass
    assert [signal.getsignal(number) for number in ENDING] == before
    assert signal.set_wakeup_fd(-1) == -1
