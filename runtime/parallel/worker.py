"""The process of a rank other than 0, which rank 0 starts."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from gristmill.runtime.artifact import PROGRAM, open_artifact, parse_json
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.program import Program

WATCH_S = 1.0
READY = b"ready"


def main() -> None:
    """argv: the descriptor of the connection to rank 0, whose first message says what to open."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which ends the others
    connection = Connection(int(sys.argv[1]))
    given = json.loads(connection.recv_bytes())
    threading.Thread(target=_end_with, args=(given["parent"],), daemon=True).start()
    try:
        _serve(connection, given)
    except (EOFError, BrokenPipeError):
        pass
    except Exception as error:  # whatever it is, rank 0 has to say it, and this process to end
        kind = "" if isinstance(error, GristmillError) else f"{type(error).__name__}: "
        with suppress(OSError):
            connection.send_bytes(f"{kind}{error}".encode())
    os._exit(0)  # threads of a broken connection must not hold the process


def _serve(connection: Connection, given: dict[str, object]) -> None:
    import torch

    from gristmill.runtime.parallel.commands import obey
    from gristmill.runtime.parallel.exchange import file_store
    from gristmill.runtime.parallel.rank import Share, open_rank

    torch.set_num_threads(1)
    share = Share(**given["share"])  # type: ignore[arg-type]
    artifact = open_artifact(str(given["artifact"]))
    program = Program.from_json(parse_json(artifact.read(PROGRAM), PROGRAM))
    rank = open_rank(program, Path(artifact.weights_path), share)
    connection.send_bytes(READY)
    connection.recv_bytes()
    store = file_store(str(given["store"]), share.world)
    rank.join(store)
    connection.send_bytes(READY)
    obey(rank, connection)


def _end_with(parent: int) -> None:
    """Ends this process once ``parent`` has ended: a child of that may hold the connection open."""
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(0)
