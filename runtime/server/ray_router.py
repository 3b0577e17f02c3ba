"""The request router of replicas on Ray Serve. Serve copies this module as it stands, with the values of its
globals, to wherever there is a router: so there is nothing else here."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from gristmill.runtime.server.fleet import fleet_named


class FleetRouter(RequestRouter):
    """Sends each call to the replica that the Fleet of this process chooses. A call's first argument is the
    name of its Ask."""

    def initialize_state(self, **given: Any) -> None:
        self._fleet = fleet_named(given["fleet"])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if pending_request is None:
            return [candidate_replicas]
        chosen = self._fleet.place(pending_request.args[0], by_id)
        return [] if chosen is None else [[by_id[chosen]]]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._fleet.present(replica.replica_id.unique_id for replica in replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._fleet.leave(replica_id.unique_id)
