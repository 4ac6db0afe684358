"""A Ray cluster of this machine's processes whose nodes come and go as they are needed."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster import undertaker

BIN = Path(sys.executable).parent
# Ray's provider whose nodes are processes of this machine, and what it calls the head.
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
PORT = 6379  # AutoscalingCluster takes no other


@contextmanager
def ray_with_nodes(most: int, idle_minutes: float) -> Iterator[str]:
    """A head of one CPU, and Ray's autoscaler, which adds up to `most` nodes of one; the head's address.

    Raises SystemExit where another Ray runs on this machine: `AutoscalingCluster` would end it.
    """
    if others := [p.pid for p in psutil.process_iter() if p.name() in ("raylet", "gcs_server")]:
        raise SystemExit(f"Ray's AutoscalingCluster ends every other Ray of this machine; stop these first: {others}")
    place, mark = Path(tempfile.mkdtemp(prefix="scale-")), secrets.token_hex(16)
    os.environ |= {undertaker.MARK: mark, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(place)}
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    os.environ.pop("RAY_AUTH_TOKEN", None)  # Ray then keeps one for this user, which all of its commands find
    os.environ.setdefault("RAY_worker_niceness", "0")
    cluster, address = _cluster(most, idle_minutes)
    usual, tempfile.tempdir = tempfile.tempdir, str(place)  # where it leaves a file behind
    try:
        cluster.start(override_env={"RAY_NODE_TYPE_NAME": HEAD_TYPE})
        tempfile.tempdir = usual
        yield address
    finally:
        tempfile.tempdir = usual
        cluster.shutdown()
        undertaker.bury(mark, place, 2.0)
        shutil.rmtree(place, ignore_errors=True)


def _cluster(most: int, idle_minutes: float) -> tuple[Any, str]:
    import ray  # which reads the environment
    from ray.cluster_utils import AutoscalingCluster

    address = f"{ray.util.get_node_ip_address()}:{PORT}"  # Ray takes no other for its own

    class Nodes(AutoscalingCluster):  # type: ignore[misc]
        def _generate_config(self, head: Any, types: Any, autoscaler_v2: bool = True, **more: Any) -> Any:
            """Ray's wheel lacks the file that this comes from."""
            return configuration(address, head, types) | more

    node = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": most}
    made = Nodes(
        {"CPU": 1, "object_store_memory": 100_000_000}, {"worker": node}, autoscaler_v2=True,
        max_workers=most, upscaling_speed=10.0, idle_timeout_minutes=idle_minutes,
    )  # fmt: skip
    return made, address


def configuration(address: str, head: dict[str, float], types: dict[str, Any]) -> dict[str, Any]:
    """Of Ray's autoscaler, as `ray up` reads it from a file: nodes of these types, by the fake provider."""
    provider = {"type": "external", "module": PROVIDER, "gcs_address": address, "head_node_id": HEAD}
    config: dict[str, Any] = {"cluster_name": "scale", "provider": provider | {"launch_multiple": True}}
    config["head_node_type"] = HEAD_TYPE
    config["available_node_types"] = types | {HEAD_TYPE: {"resources": head, "node_config": {}, "max_workers": 0}}
    config |= {key: {} for key in ("auth", "docker", "file_mounts")}
    empty = ["cluster_synced_files", "initialization_commands", "setup_commands"]
    empty += [f"{who}_{what}_commands" for who in ("head", "worker") for what in ("setup", "start_ray")]
    return config | {key: [] for key in empty}
