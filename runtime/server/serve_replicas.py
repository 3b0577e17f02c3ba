"""`gristmill serve --replicas N`: the front in this process, replicas by Ray Serve on this machine."""

from __future__ import annotations

import socket
from collections.abc import Callable

from gristmill.runtime import ray_session
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server.front import Front
from gristmill.runtime.server.gate import Gate
from gristmill.runtime.server.logs import Log
from gristmill.runtime.server.ray_replicas import ReplicaOptions, start_own
from gristmill.runtime.server.serve import GentleServer, gentle, run
from gristmill.runtime.server.settings import Settings


def serve_replicas(
    options: ReplicaOptions, replicas: int, settings: Settings, listening: socket.socket,
    log_path: str | None, announce: Callable[[], None],
) -> None:  # fmt: skip
    """Serves until a signal ends it. Raises GristmillError where no replica starts."""
    fronts: list[Front] = []
    try:
        link = start_own(options, settings, replicas)
    except BaseException:
        listening.close()
        raise

    def make(log: Log) -> GentleServer:
        front = Front(link, link.fleet, settings, log)
        server = gentle(Gate(front, front, settings), front, settings, announce)
        front.on_failure = server.end
        fronts.append(front)
        return server

    try:
        run(make, listening, log_path)
    finally:
        ray_session.stop(link.folder)  # where the server ended otherwise than gently
    if fronts[0].failed is not None:
        raise GristmillError(fronts[0].failed)
