"""Replicas on Ray Serve. Nothing imports this unless replicas are asked for: it needs gristmill[ray].

Serve keeps replicas alive: it starts them, asks them how they are, replaces those that are lost or do not
answer, and hands calls to them. Which one a call goes to is the Fleet's choice: Serve has a place for that, a
request router of one's own, which runs in the process that calls. Its own routers count requests, where a
text of 2000 tokens is not one of 16, and remember no sessions. Nor does Serve repeat a call whose replica was
lost; the front does.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus
from starlette.types import Message

from gristmill.runtime import ray_session
from gristmill.runtime.errors import GristmillError
from gristmill.runtime.server.fleet import Ask, fleet_named
from gristmill.runtime.server.front import Lost
from gristmill.runtime.server.ray_router import FleetRouter
from gristmill.runtime.server.replica import Call, Replica
from gristmill.runtime.server.settings import Settings

APPLICATION, REPLICA = "gristmill", "Replica"
UNBOUNDED = 1_000_000  # calls of one replica, for Serve: the engine bounds what it takes
HEALTH_PERIOD_S, HEALTH_TIMEOUT_S = 5.0, 30.0
logging.getLogger("ray.serve").setLevel(logging.ERROR)  # stderr is for the server's log
START_ATTEMPTS = 3  # of a first replica; later ones are tried for ever, by Serve
NO_QUEUE_OF_ITS_OWN = 2**31 - 1  # the engine counts what waits


@dataclass(frozen=True)
class ReplicaOptions:
    """What a replica loads, as runtime.session.load takes it. threads: of one replica."""

    artifact: str
    device: str = "cpu"
    threads: int | None = None
    max_len: int | None = None
    max_slots: int | None = None
    hugepages: bool = False
    draft: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)


def share_of_threads(threads: int, replicas: int) -> int:
    """Of all threads, those of one replica: at least one."""
    return max(1, threads // replicas)


class RayReplica:
    """The class of the deployment."""

    async def __init__(self, options: ReplicaOptions, settings: Settings):  # type: ignore[misc]  # Ray awaits it
        from gristmill.runtime.session import load

        session = await asyncio.to_thread(
            load, options.artifact, options.device, threads=options.threads, max_len=options.max_len,
            max_slots=options.max_slots, hugepages=options.hugepages, draft=options.draft,
            max_waiting=NO_QUEUE_OF_ITS_OWN, adapters=dict(options.adapters),
        )  # fmt: skip
        self._replica = Replica(session, settings)
        await self._replica.start()
        self._id = serve.get_replica_context().replica_id.unique_id

    async def answer(self, ask: str, call: Call) -> AsyncGenerator[list[Message], None]:
        async for messages in self._replica.answer(call):
            yield messages

    async def status(self, ask: str) -> tuple[str, dict[str, Any]]:
        return self._id, self._replica.status()

    async def check_health(self) -> None:
        """Serve replaces a replica of which this fails three times."""
        if self._replica.engine.state == "failing":
            raise RuntimeError("the replica's engine fails")


class RayLink:
    """The front's way to the replicas. folder: of the Ray that was started for this server, and
    ends with it."""

    def __init__(self, handle: DeploymentHandle[Any], application: str, fleet: str, folder: str | None):
        self.fleet = fleet_named(fleet)
        self._one, self._stream = handle, handle.options(stream=True)
        self._application, self.folder = application, folder

    async def answer(self, ask: Ask, call: Call) -> AsyncGenerator[list[Message], None]:
        response = self._stream.answer.remote(ask.name, call)
        over = False
        try:
            async for messages in response:
                yield messages
            over = True
        except (RayActorError, DeploymentUnavailableError) as error:
            over = True
            raise Lost from error
        finally:
            if not over:
                response.cancel()

    async def status(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        response = self._one.status.remote(ask.name)
        try:
            found: tuple[str, dict[str, Any]] = await response
        except (RayActorError, DeploymentUnavailableError) as error:
            raise Lost from error
        except asyncio.CancelledError:
            response.cancel()
            raise
        return found

    async def problem(self) -> tuple[str | None, bool]:
        try:
            return await asyncio.to_thread(problem_of, self._application)
        except Exception as error:  # the cluster's head is gone or busy: what runs goes on
            return f"Ray Serve says nothing: {type(error).__name__}", False

    async def stop(self) -> None:
        if self.folder is not None:
            await asyncio.to_thread(ray_session.stop, self.folder)


def problem_of(application: str) -> tuple[str | None, bool]:
    """See front.Link.problem."""
    status = serve.status().applications.get(application)
    if status is None:
        return "the replicas were deleted", False
    deployment = status.deployments.get(REPLICA)
    if deployment is None or not (said := deployment.message):
        return None, False
    running = deployment.replica_states.get("RUNNING", 0)
    none_will = status.status == ApplicationStatus.DEPLOY_FAILED and not running
    return _reason(said), none_will


def _reason(said: str) -> str:
    """What matters in Serve's message with a traceback in it: one line."""
    if found := re.findall(r"GristmillError: (.+)", said):
        return f"a replica does not start: {found[-1].strip()}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:300]


def start_own(options: ReplicaOptions, settings: Settings, replicas: int) -> RayLink:
    """Starts Ray on this machine, for nobody else, and replicas on it. Raises GristmillError."""
    folder = ray_session.start()
    try:
        if options.device == "cuda" and ray.cluster_resources().get("GPU", 0) < replicas:
            raise GristmillError(
                f"{replicas} replicas need a GPU each, Ray finds {ray.cluster_resources().get('GPU', 0):g}; "
                "ask for fewer --replicas"
            )
        serve.start(proxy_location="Disabled")
        fleet = uuid.uuid4().hex
        made = deployment(options, settings, replicas, fleet)
        (handle,) = serve.run_many(
            [serve.RunTarget(made, name=APPLICATION, route_prefix=None)],
            wait_for_applications_running=False,
        )
    except BaseException as error:
        ray_session.stop(folder)
        if isinstance(error, GristmillError) or not isinstance(error, Exception):
            raise
        raise GristmillError(f"Ray does not start: {' '.join(str(error).split())[:300]}") from error
    return RayLink(handle, APPLICATION, fleet, folder)


def deployment(
    options: ReplicaOptions, settings: Settings, replicas: int, fleet: str, **resources: Any
) -> serve.Application:
    """The replicas as an application, or as part of one. resources: of Serve's ray_actor_options; by default
    no CPU is reserved, since the threads of a replica are counted when it is asked for."""
    gpus = {"num_gpus": 1} if options.device == "cuda" else {}
    return serve.deployment(
        RayReplica, name=REPLICA, num_replicas=replicas, max_ongoing_requests=UNBOUNDED,
        health_check_period_s=HEALTH_PERIOD_S, health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1, graceful_shutdown_timeout_s=5.0,
        max_constructor_retry_count=START_ATTEMPTS,
        ray_actor_options={"num_cpus": 0, **gpus, **resources},
        request_router_config=RequestRouterConfig(
            request_router_class=FleetRouter, request_router_kwargs={"fleet": fleet}
        ),
    ).bind(options, settings)  # fmt: skip
