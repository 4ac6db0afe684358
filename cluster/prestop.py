"""What a pod does before it is ended: `python -m cluster.prestop --seconds N`, its preStop hook.

Ray's node in the pod is drained: Serve starts what ran here elsewhere, then lets gateways and replicas here end their
streams. What runs here serves on until its replacement does, for up to `--replacement` seconds. The hook returns when
all have gone, so that the signal which follows finds nobody at work, or after N seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.plan import REPLICA_GRACE_S, REPLICA_NAME

_POLL_S = 0.25
_SERVE_REPLICA = "ServeReplica"  # is in the title that Ray gives to the process of a Serve replica


@dataclass(frozen=True)
class Raylet:
    """A Ray node on this machine, by its process."""

    pid: int
    node_id: str
    gcs: str  # HOST:PORT

    @classmethod
    def of(cls, pid: int, words: Sequence[str]) -> Raylet | None:
        """From a command line; None where it is not a raylet's."""
        if not words or Path(words[0]).name != "raylet":
            return None
        flags = dict(word.lstrip("-").replace("-", "_").split("=", 1) for word in words[1:] if "=" in word)
        return cls(pid, flags["node_id"], flags["gcs_address"])


def find_raylets() -> list[Raylet]:
    """Those of this container."""
    found = (Raylet.of(p.pid, p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    return [raylet for raylet in found if raylet is not None]


def serve_replicas(raylet: Raylet) -> dict[int, str]:
    """The Serve replicas that run on a node: the titles of their processes by process id."""
    try:
        children = psutil.Process(raylet.pid).children()
    except psutil.NoSuchProcess:
        return {}
    found = {}
    for child in children:
        try:
            title = " ".join(child.cmdline())
            if title.startswith("ray::") and _SERVE_REPLICA in title:
                found[child.pid] = title
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def told_end(titles: Sequence[str], seconds: float, replacement: float) -> float:
    """In how many seconds Serve is told that the node ends. Serve lets whatever runs there serve on until a replacement
    does, but no longer than until what it needs to end gracefully is left: for replicas of models, an hour, which no
    pod has. So where only such run, it is told that there is this hour, and `replacement` seconds before it."""
    only_models = bool(titles) and all(f":{REPLICA_NAME}" in title for title in titles)
    return replacement + REPLICA_GRACE_S if only_models else seconds


def drain(raylet: Raylet, seconds: float) -> None:
    """Asks Ray to place nothing new on the node, and tells it, and Serve, that it ends in so many seconds. Raises
    RuntimeError where it refuses."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    deadline_ms = int((time.time() + seconds) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
    accepted, why = GcsClient(address=raylet.gcs).drain_node(
        raylet.node_id, reason, "the pod is being ended", deadline_ms
    )
    if not accepted:
        raise RuntimeError(f"Ray does not drain the node {raylet.node_id}: {why}")


def wait(
    busy: Callable[[], object], seconds: float, clock: Callable[[], float], pause: Callable[[float], None]
) -> bool:
    """Whether nobody is busy any more before `seconds` have passed."""
    end = clock() + seconds
    while busy():
        if clock() >= end:
            return False
        pause(_POLL_S)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.prestop", description=__doc__)
    parser.add_argument("--seconds", type=float, required=True, help="how long it may take, at most")
    parser.add_argument(
        "--replacement", type=float, default=30.0, help="how long what runs here may serve on until others do (30)"
    )
    parser.add_argument("--node", help="the node's id, where several run in one container")
    given = parser.parse_args(arguments)
    end = time.monotonic() + given.seconds
    raylets = [r for r in find_raylets() if given.node in (None, r.node_id)]
    if len(raylets) != 1:
        print(f"{len(raylets)} Ray nodes here, not one: nothing is drained", file=sys.stderr)
        return 1
    drain(raylets[0], told_end(list(serve_replicas(raylets[0]).values()), given.seconds, given.replacement))
    left = end - time.monotonic()
    if wait(lambda: serve_replicas(raylets[0]), left, time.monotonic, time.sleep):
        return 0
    print(f"still at work after {given.seconds:g} s: {sorted(serve_replicas(raylets[0]))}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
