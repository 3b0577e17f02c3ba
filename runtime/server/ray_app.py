"""The server as an application of Ray Serve, for clusters: `serve deploy` takes a file that names `build` and
its arguments, see examples/ray_serve.yaml. One deployment is the front, the other one the replicas."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from gristmill.runtime.decoding.options import check_integer, refuse_unknown
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server.front import Front
from gristmill.runtime.server.gate import Gate
from gristmill.runtime.server.logs import Log
from gristmill.runtime.server.ray_replicas import (
    REPLICA,
    UNBOUNDED,
    RayLink,
    ReplicaOptions,
    deployment,
)
from gristmill.runtime.server.settings import Settings, read_keys

FRONT = "Front"
LOADED = tuple(field.name for field in fields(ReplicaOptions))
LIMITS = tuple(field.name for field in fields(Settings) if field.name not in ("model", "keys"))
OWN = ("replicas", "model_name", "api_key_file", "log")


def build(args: Mapping[str, Any]) -> Application:
    """The application. args: `artifact`, `replicas` (1), `threads` of a replica, which Ray reserves as CPUs,
    the rest as options of `gristmill serve`, with _ for -. Raises GristmillError."""
    refuse_unknown(args, (*LOADED, *LIMITS, *OWN), "the application's args")
    if not args.get("artifact"):
        raise GristmillError(
            "args has no artifact, expected its folder, which all machines find at this path"
        )
    options = ReplicaOptions(**{name: args[name] for name in LOADED if name in args})
    if options.device == "cpu" and options.threads is None:
        raise GristmillError("args has no threads, expected those of a replica: Ray reserves so many CPUs")
    replicas = args.get("replicas", 1)
    check_integer("replicas", replicas, 1, 10_000)
    settings = Settings(
        args.get("model_name") or Path(options.artifact).name, keys=read_keys(args.get("api_key_file")),
        **{name: args[name] for name in LIMITS if name in args},
    )  # fmt: skip
    fleet, log_path = uuid.uuid4().hex, args.get("log")

    def front() -> ASGIApp:
        return front_app(settings, fleet, log_path)

    made = deployment(options, settings, replicas, fleet, num_cpus=options.threads or 1)
    return serve.deployment(
        serve.ingress(front)(), name=FRONT, num_replicas=1, max_ongoing_requests=UNBOUNDED,
        graceful_shutdown_timeout_s=settings.grace_s + 5, ray_actor_options={"num_cpus": 0},
    ).bind(made)  # fmt: skip


def front_app(settings: Settings, fleet: str, log_path: str | None) -> ASGIApp:
    """What the front's process runs."""
    application = serve.get_replica_context().app_name
    link = RayLink(serve.get_deployment_handle(REPLICA, application), application, fleet, None)
    front = Front(link, link.fleet, settings, Log(log_path))
    return Gate(front, front, settings)
