"""Where the ranks of a group stand: a pure plan of bundles, from what the nodes have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from understudy.errors import ConfigError


@dataclass(frozen=True)
class Node:
    """What a node has in all, whoever uses it now."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Topology:
    """One bundle per rank, in the order of ranks, and Ray's word for how they lie."""

    bundles: tuple[dict[str, float], ...]
    strategy: Literal["STRICT_PACK", "PACK"]

    @property
    def one_node(self) -> bool:
        return self.strategy == "STRICT_PACK"


def plan_group(size: int, cpus: float, gpus: float, nodes: Sequence[Node], key: str = "tensor_parallel") -> Topology:
    """`size` ranks of `cpus` and `gpus` each: on one node where one has room, else over as few as possible.

    Raises ConfigError with the numbers, and the largest degree that has room, where all nodes together have none.
    """
    room = [_room(node, cpus, gpus) for node in nodes]
    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    if max(room, default=0) >= size:
        return Topology((bundle,) * size, "STRICT_PACK")
    if sum(room) >= size:
        return Topology((bundle,) * size, "PACK")
    each = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
    have = f"{sum(n.cpus for n in nodes):g} CPUs and {sum(n.gpus for n in nodes):g} GPUs on {len(nodes)} nodes"
    raise ConfigError(
        f"{key}: {size} ranks of {each} each do not fit: the cluster has {have}, room for {sum(room)}; "
        "add nodes or choose a smaller degree"
    )


def _room(node: Node, cpus: float, gpus: float) -> int:
    """How many ranks fit. A whisker more than there is counts as there: fractions do not add up."""
    counts = [int((have + 1e-9) / each) for have, each in ((node.cpus, cpus), (node.gpus, gpus)) if each > 0]
    return min(counts, default=0)
