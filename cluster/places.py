"""A placement group for the ranks of one replica: the shell around `cluster.topology`."""

from __future__ import annotations

import asyncio
from typing import Any

from cluster.plan import RANK_PLACE, ReplicaPlan, node_address
from cluster.topology import Node, plan_group
from understudy.errors import Unavailable

PLACE_S = 600.0  # a cluster that grows needs minutes for a node


class RankPlace:
    """`reserve` first. It is fixed once made, and goes with the replica's actor where `clear` is not called."""

    def __init__(self, plan: ReplicaPlan) -> None:
        self._plan = plan
        self._group: Any = None
        self.nodes: list[str] = []  # of each rank
        self.one_machine = True
        self.address = ""  # of rank 0's node

    async def reserve(self) -> None:
        """Returns when every rank has a place. Raises ConfigError where the cluster is too small, Unavailable when its
        resources stay taken for PLACE_S seconds."""
        from ray.util.placement_group import placement_group, placement_group_table

        plan = self._plan
        alive = [n for n in _nodes() if not plan.by_role or RANK_PLACE.keys() <= n["Resources"].keys()]
        nodes = [Node(n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in alive]
        topology = plan_group(plan.engine.tensor_parallel, plan.leader_cpus, plan.leader_gpus, nodes)
        bundles = [dict(bundle) | (RANK_PLACE if plan.by_role else {}) for bundle in topology.bundles]
        if plan.by_role and topology.one_node:
            bundles[0] |= {f"node:{node_address(False)}": 0.001}  # beside the supervisor: see REPLICA_PLACE
        self._group = placement_group(bundles, strategy=topology.strategy)
        try:
            async with asyncio.timeout(PLACE_S):
                await self._group.ready()
        except TimeoutError:
            raise Unavailable(
                f"{len(topology.bundles)} ranks of {topology.bundles[0]} found no place within {PLACE_S:.0f} s: "
                "others use the cluster's resources"
            ) from None
        places = placement_group_table(self._group)["bundles_to_node_id"]
        address = {node["NodeID"]: node["NodeManagerAddress"] for node in _nodes()}
        ids = [places[rank] for rank in range(len(topology.bundles))]
        self.one_machine = len(set(ids)) == 1
        self.address = "127.0.0.1" if plan.loopback else address[ids[0]]
        self.nodes = ["127.0.0.1" if plan.loopback else address[node] for node in ids]

    def options(self, rank: int) -> dict[str, Any]:
        """Where that rank's actor goes."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, rank)}

    def clear(self) -> None:
        """Gives the resources back. Idempotent."""
        from ray.util.placement_group import remove_placement_group

        group, self._group = self._group, None
        if group is not None:
            remove_placement_group(group)


def beside_me() -> dict[str, Any]:
    """Options of an actor that has to run on the node of its caller."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False), "resources": RANK_PLACE}


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
