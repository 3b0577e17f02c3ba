"""A Ray of this process's own on this machine, or one that is there. Nothing imports ray before it is asked
for; it needs gristmill[ray]."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gristmill.runtime.errors import GristmillError

OBJECT_STORE_BYTES = 128 << 20  # nothing large goes between processes
LOCAL = "local"


def require_ray() -> None:
    """Raises GristmillError where there is no Ray. A folder named ray is none."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")  # of Serve's processes
    try:
        from ray import init  # noqa: F401
    except ImportError as error:
        if str(error.name).split(".")[0] != "ray":
            raise
        raise GristmillError("this needs Ray; install it with `pip install 'gristmill[ray]'`") from error


def start(address: str = LOCAL) -> str | None:
    """Connects to the Ray at this address, or starts one for this process, which listens at 127.0.0.1 alone;
    the folder that it writes to, for `stop`. Raises GristmillError."""
    require_ray()
    import ray

    own: dict[str, Any] = {}
    if address == LOCAL:
        own = {
            "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": tempfile.mkdtemp(prefix="gristmill-ray-", dir="/tmp"),  # sockets need a short name
        }  # fmt: skip
    folder: str | None = own.get("_temp_dir")
    try:
        with _kept_signals():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except BaseException as error:
        stop(folder)
        if not isinstance(error, (ConnectionError, ValueError, RuntimeError, OSError)):
            raise
        said = " ".join(str(error).split())[:300]
        raise GristmillError(f"Ray at {address!r} does not start or answer: {said}") from error
    return folder


def stop(folder: str | None) -> None:
    """Leaves Ray; its own one ends, with all that runs on it, and what it wrote is removed."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _kept_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
