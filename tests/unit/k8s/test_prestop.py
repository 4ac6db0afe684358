"""A pod's preStop: which node it drains, and how long it waits. The whole of it: tests/cluster/test_kubernetes.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.plan import REPLICA_GRACE_S
from cluster.prestop import Raylet, main, serve_replicas, told_end, wait

NODE = "ab" * 28
WORDS = ["/usr/local/lib/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=/tmp/ray/s/raylet", f"--node_id={NODE}",
         "--gcs-address=10.0.0.1:6379", "--labels={}", "--head"]  # fmt: skip


def test_a_raylet_is_known_by_its_command_line() -> None:
    assert Raylet.of(7, WORDS) == Raylet(7, NODE, "10.0.0.1:6379")
    assert Raylet.of(7, ["python", *WORDS]) is None
    assert Raylet.of(7, []) is None


def test_children_that_are_no_serve_replicas_are_not_waited_for() -> None:
    import os

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert serve_replicas(Raylet(os.getpid(), NODE, "")) == {}
        child.communicate()
    assert serve_replicas(Raylet(child.pid, NODE, "")) == {}, "the node is gone"


MODEL, GATEWAY = "ray::ServeReplica:understudy:replica-demo", "ray::ServeReplica:understudy:gateway"


@pytest.mark.parametrize(
    ("titles", "told"),
    [([], 75.0), ([GATEWAY], 75.0), ([GATEWAY, MODEL], 75.0), ([MODEL, MODEL], 20.0 + REPLICA_GRACE_S)],
)
def test_replicas_of_models_serve_on_until_their_replacement_does(titles: list[str], told: float) -> None:
    """Serve stops a replica once what is left is no more than what it has to end in."""
    assert told_end(titles, 75.0, 20.0) == told


@pytest.mark.parametrize(("polls", "seconds", "gone"), [(0, 0.0, True), (3, 1.0, True), (9, 1.0, False)])
def test_it_waits_as_long_as_it_may(polls: int, seconds: float, gone: bool) -> None:
    now, asked = [0.0], []

    def pause(length: float) -> None:
        now[0] += length

    def busy() -> bool:
        asked.append(now[0])
        return len(asked) <= polls

    assert wait(busy, seconds, lambda: now[0], pause) is gone
    assert now[0] <= seconds + 0.25


def test_where_there_is_no_node_nothing_is_drained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "1", "--node", "none"]) == 1
    assert "nothing is drained" in capsys.readouterr().err
