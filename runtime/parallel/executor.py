"""The executor of rank 0, in the process that loads: it starts the other ranks, tells them what to do, does
its own share and has the result."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from gristmill.runtime import machine
from gristmill.runtime.artifact import Artifact
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.footprint import kv_bytes
from gristmill.runtime.parallel.commands import batch_command, copy_command, end_command, time_command
from gristmill.runtime.parallel.exchange import Traffic, file_store
from gristmill.runtime.parallel.interrupts import uninterrupted
from gristmill.runtime.parallel.rank import Share, open_rank
from gristmill.runtime.parallel.split import bytes_of_all, split
from gristmill.runtime.parallel.worker import READY
from gristmill.runtime.program import NO_HIDDEN_STATES, Program, segment_row_bytes

if TYPE_CHECKING:
    from gristmill.runtime.decoding.draws import Draws
    from gristmill.runtime.profile import Probe
    from gristmill.runtime.session import Session

Array = np.ndarray[Any, Any]
Result = TypeVar("Result")
END_WITHIN_S = 5.0
LAST_WORDS_S = 2.0
BAND = 128  # rows; as many as a tile of the products has. Moving bytes takes a processor that is to spare
ENDED = "the tensor-parallel session has ended: {}; load the artifact again"
START = "import sys; sys.path[:] = {path!r}; from gristmill.runtime.parallel.worker import main; main()"


@dataclass(frozen=True)
class Worker:
    """Another rank's process, and this end of the connection to it."""

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection


class ParallelExecutor:
    """What a Session needs, see runtime/session.py. Sizes and threads are those of all ranks together."""

    def __init__(
        self, artifact: Artifact, program: Program, world: int, threads: int, max_len: int, max_slots: int,
        hugepages: bool, device: str = "cpu",
    ) -> None:  # fmt: skip
        each = max(1, threads // world)
        band = BAND if machine.usable_cpus() > each * world else 0
        shares = [
            Share(rank, world, each, max_len, max_slots, hugepages, band=band, device=device)
            for rank in range(world)
        ]
        self._folder = tempfile.mkdtemp(prefix="gristmill-ranks-")
        self._workers: list[Worker] = []
        self._ended: str | None = None
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _end, self._workers, self._folder, self._owner)
        store = str(Path(self._folder) / "store")
        try:
            for share in shares[1:]:
                self._workers.append(_start(artifact.path, store, share))
            self._rank: Any = open_rank(program, artifact.weights_path, shares[0])
            self._await_all()
            for worker in self._workers:
                worker.connection.send_bytes(READY)
            self._rank.join(file_store(store, world))
            self._await_all()
            self._rank.watch(self._look_after_workers)
        except (OSError, RuntimeError) as error:
            self._finalizer()
            raise GristmillError(f"the ranks cannot be started: {_line(error)}") from error
        except BaseException:
            self._finalizer()
            raise
        own = self._rank.executor
        self.max_tokens, self.vocabulary = own.max_tokens, own.vocabulary
        self.max_len, self.max_slots = max_len, max_slots
        self.threads = each * world if device == "cpu" else own.threads
        self.world, self.device = world, device
        self.isa = getattr(own, "isa", "")
        self.rows_agree = getattr(own, "rows_agree", True)
        self.draws_tokens = getattr(own, "draws_tokens", False)
        self._hidden = program.hidden is not None
        parts = [split(program, rank, world).program for rank in range(world)]
        self.kv_bytes = sum(kv_bytes(part, max_len, max_slots) for part in parts)
        self.arena_bytes = world * own.arena_bytes if device == "cuda" else world * program.arena_bytes
        self.weight_bytes_per_token = sum(_bytes_per_token(part) for part in parts)
        self.weight_bytes = bytes_of_all(parts)
        self.history: list[dict[str, Traffic]] = []  # of the forwards since profiling began
        self._profiling = False

    def forward(self, tokens: Array, positions: Array, slots: Array, rows: Array) -> Array:
        """Logits [R, vocabulary] f32 of the rows named by ``rows``; see Session.forward.

        Raises GristmillError also when a rank has ended; then nothing works any more.
        """
        found: Array = self._forward(tokens, positions, slots, rows, hidden=False)
        return found

    def forward_hidden(
        self, tokens: Array, positions: Array, slots: Array, rows: Array
    ) -> tuple[Array, Array]:
        """`forward`, and the hidden states [R, hidden] f32 of the same rows."""
        if not self._hidden:
            raise GristmillError(NO_HIDDEN_STATES)
        found: tuple[Array, Array] = self._forward(tokens, positions, slots, rows, hidden=True)
        return found

    def _forward(self, *batch: Array, hidden: bool) -> Any:
        tokens, positions, slots, rows = batch
        command = batch_command(hidden, tokens, positions, slots, rows)
        result = self._together(command, lambda: self._rank.forward(tokens, positions, slots, rows, hidden))
        if self._profiling:
            self.history.append(self._rank.exchanges.traffic)
        return result

    def sample(self, tokens: Array, positions: Array, slots: Array, rows: Array, draws: Draws) -> Array:
        """The next tokens [R] i32 of the same batch, which rank 0's GPU draws; see CudaExecutor.sample."""
        if not self.draws_tokens or len(draws) != len(rows):
            raise GristmillError(
                f"got {len(draws)} draws for {len(rows)} rows of a vocabulary of {self.vocabulary}; give one "
                "for each row, on a device that draws"
            )
        command = batch_command(False, tokens, positions, slots, rows)
        found: Array = self._together(
            command, lambda: self._rank.sample(tokens, positions, slots, rows, draws)
        )
        return found

    def copy_slot(self, source: int, target: int, length: int, start: int = 0) -> None:
        """Gives ``target`` positions ``start`` to ``length`` of ``source``; those before, both hold alike."""
        command = copy_command(source, target, length, start)
        self._together(command, lambda: self._rank.executor.copy_slot(source, target, length, start))

    def close(self) -> None:
        """Ends the other ranks; nothing works afterwards."""
        self._ended = self._ended or "it was closed"
        self._rank.close()
        self._finalizer()

    # ---- measuring

    @property
    def shared_phases(self) -> int:
        """Of rank 0's threads."""
        return int(self._rank.executor.shared_phases)

    def profile(self, enable: bool) -> None:
        """Times every instruction of rank 0 from now on, or no more."""
        self._profiling = enable
        self._rank.executor.profile(enable)

    def profile_results(self) -> list[tuple[str, int, int]]:
        """Of rank 0's instructions, which stand where the program's do."""
        return list(self._rank.executor.profile_results())

    def probe(self, session: Session) -> Probe:
        if self.device == "cuda":
            from gristmill.runtime.parallel.cuda_probe import ParallelCudaProbe

            return ParallelCudaProbe(session, self)
        from gristmill.runtime.parallel.probe import ParallelProbe

        return ParallelProbe(session, self)

    def time_exchanges(self, kind: str, repeats: int) -> float:
        """Seconds of all exchanges of a kind in a forward like the last one, between GPUs."""
        command = time_command(kind, repeats)
        return float(self._together(command, lambda: self._rank.time_exchanges(kind, repeats)))

    @property
    def rank(self) -> Any:
        """Rank 0, which is in this process."""
        return self._rank

    # ---- the other ranks

    def _together(self, command: bytes, run: Callable[[], Result]) -> Result:
        """Sends the command, and does the same here. Signals wait meanwhile: what interrupted this rank
        between two exchanges would leave the others waiting."""
        if os.getpid() != self._owner:
            raise GristmillError("a tensor-parallel session does not go on in a fork; load it there")
        if self._ended is not None:
            raise GristmillError(ENDED.format(self._ended))
        with uninterrupted():
            try:
                for worker in self._workers:
                    worker.connection.send_bytes(command)
                result = run()
            except (OSError, RuntimeError) as error:
                self._fail(error)
        return result

    def _look_after_workers(self) -> None:
        """Raises RuntimeError where one has ended."""
        for worker in self._workers:
            if worker.process.poll() is not None:
                raise RuntimeError(f"rank {worker.rank} ended {_how(worker.process)}")

    def _fail(self, error: Exception) -> NoReturn:
        self._ended = self._last_words() or _line(error)
        self._rank.close()
        self._finalizer()
        raise GristmillError(ENDED.format(self._ended)) from error

    def _last_words(self) -> str | None:
        """What a rank said before it ended, or that it was ended."""
        for worker in self._workers:
            try:
                if worker.connection.poll(LAST_WORDS_S / len(self._workers)):
                    return f"rank {worker.rank}: {worker.connection.recv_bytes().decode()}"
            except (EOFError, OSError):
                return f"rank {worker.rank} ended {_how(worker.process)}"
        return None

    def _await_all(self) -> None:
        """Until every other rank says that it is ready. Raises GristmillError with what it says instead."""
        for worker in self._workers:
            try:
                said = worker.connection.recv_bytes()
            except (EOFError, OSError) as error:
                raise GristmillError(
                    f"rank {worker.rank} did not start: it ended {_how(worker.process)}"
                ) from error
            if said != READY:
                raise GristmillError(f"rank {worker.rank} did not start: {said.decode()}")


def _start(artifact: Path, store: str, share: Share) -> Worker:
    """Python anew, with this one's search path: no __main__ of the caller's is run again."""
    ours, theirs = socket.socketpair()
    with theirs:
        code = START.format(path=[entry or os.getcwd() for entry in sys.path])
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    connection = Connection(ours.detach())
    given = {
        "artifact": str(artifact.resolve()), "store": store, "parent": os.getpid(), "share": asdict(share),
    }  # fmt: skip
    connection.send_bytes(json.dumps(given).encode())
    return Worker(share.rank, process, connection)


def _end(workers: list[Worker], folder: str, owner: int) -> None:
    """Asks the ranks to end, and ends those that do not."""
    if os.getpid() != owner:
        return
    for worker in workers:
        with suppress(OSError):
            worker.connection.send_bytes(end_command())
        worker.connection.close()
    for worker in workers:
        try:
            worker.process.wait(END_WITHIN_S)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _how(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(END_WITHIN_S)
    except subprocess.TimeoutExpired:
        return "without a word"
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _bytes_per_token(program: Program) -> int:
    """Weights that one row reads: of every product all, of an embedding a row."""
    total = 0
    for instruction in program.instructions:
        segments = program.weights[instruction.weight] if instruction.weight is not None else []
        rows = [1 if instruction.op == "embedding" else s.n for s in segments]
        total += sum(segment_row_bytes(s) * n for s, n in zip(segments, rows, strict=True))
    return total
