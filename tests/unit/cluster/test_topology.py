"""Where ranks stand: on one node where it has room, over several else, and a refusal with the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.topology import Node, plan_group
from understudy.errors import ConfigError

nodes = st.lists(st.builds(Node, st.integers(0, 64).map(float), st.integers(0, 8).map(float)), max_size=6)


@given(nodes, st.integers(1, 16), st.sampled_from([0.01, 1.0, 2.5]), st.sampled_from([0.0, 1.0]))
def test_ranks_are_packed_where_one_node_has_room(have: list[Node], size: int, cpus: float, gpus: float) -> None:
    room = [min(int((n.cpus + 1e-9) / cpus), int(n.gpus / gpus) if gpus else 10**9) for n in have]
    if sum(room) < size:
        with pytest.raises(ConfigError, match=f"{size} ranks .* room for {sum(room)}"):
            plan_group(size, cpus, gpus, have)
        return
    plan = plan_group(size, cpus, gpus, have)
    assert len(plan.bundles) == size
    assert plan.one_node == (max(room) >= size)
    assert all(bundle["CPU"] == cpus and bundle.get("GPU", 0.0) == gpus for bundle in plan.bundles)


def test_the_refusal_says_what_there_is() -> None:
    words = r"4 ranks of 1 CPUs and 1 GPUs each do not fit: the cluster has 72 CPUs and 3 GPUs on 2 nodes, room for 3"
    with pytest.raises(ConfigError, match=words):
        plan_group(4, 1.0, 1.0, [Node(64, 2), Node(8, 1)])
