"""One model over two ranks, in a running service, over Ray nodes, and between networks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from networks import two_networks
from service_process import UNDERSTUDY, Service, make_tiny_llama, running, until

from understudy.client import Client
from understudy.v1 import admin_pb2

ROOT = Path(__file__).parents[2]


def ranks(service: Service) -> dict[int, int]:
    """Process ids of the ranks of `shared`."""
    return {p.rank: p.pid for p in service.status().processes if p.role == "shard" and p.replica == "shared-0"}


def epoch(service: Service) -> int:
    """Of `shared`, where it is ready; else 0."""
    ready = admin_pb2.REPLICA_STATE_READY
    return max((r.epoch for r in service.status().replicas if r.model == "shared" and r.state == ready), default=0)


def greedy(client: Client, model: str, tokens: int = 60) -> tuple[int, ...]:
    done = client.complete([1, 2], model=model, temperature=0.0, max_tokens=tokens, ignore_eos=True, timeout=120)
    return done.choices[0].token_ids


def test_two_ranks_give_the_tokens_of_one_process(service: Service) -> None:
    with service.client() as client:
        assert greedy(client, "shared") == greedy(client, "text")
        numerics = {m.name: m.numerics_id for m in client.models()}
        assert numerics["shared"].replace("/tensor-parallel-2", "") == numerics["text"]
        drawn = client.complete(
            [1, 2], model="shared", n=2, seed=1, temperature=1.0, top_p=0.9, logprobs=2, max_tokens=12, timeout=60
        )
        assert len(drawn.choices) == 2
        assert all(len(token.top) == 2 for choice in drawn.choices for token in choice.logprobs or ())
        again = client.complete(
            [1, 2], model="shared", n=2, seed=1, temperature=1.0, top_p=0.9, logprobs=2, max_tokens=12, timeout=60
        )
        assert [c.token_ids for c in again.choices] == [c.token_ids for c in drawn.choices]
    assert sorted(ranks(service)) == [0, 1]


@pytest.mark.parametrize("lost", [1, 0])
def test_a_lost_rank_takes_its_group_along_and_the_replica_comes_back(service: Service, lost: int) -> None:
    until(lambda: epoch(service) and len(ranks(service)) == 2)
    before, life = ranks(service), epoch(service)
    with service.client() as client:
        expected = greedy(client, "shared", 400)
        stream = client.generate([1, 2], model="shared", temperature=0.0, max_tokens=400, ignore_eos=True, timeout=120)
        next(stream)
        os.kill(before[lost], signal.SIGKILL)
        until(lambda: not any(psutil.pid_exists(pid) for pid in before.values()))
        for _ in stream:
            pass
        assert stream.completion().choices[0].token_ids == expected, "a pause, and nothing else"
    until(lambda: epoch(service) > life and len(ranks(service)) == 2)


def test_a_degree_that_cannot_be_is_refused_before_anything_starts(text_model: Path) -> None:
    command = [UNDERSTUDY, "serve", "--model", str(text_model), "--tensor-parallel", "3"]
    environment = os.environ | {"COLUMNS": "400"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert done.returncode == 1
    assert "--tensor-parallel: 3 ranks cannot share" in " ".join((done.stdout + done.stderr).split())


@contextmanager
def two_nodes() -> Iterator[str]:
    """The address of a Ray cluster of two nodes with one CPU each, in processes of their own."""
    code = (
        "from ray.cluster_utils import Cluster; import sys\n"
        "args = dict(include_dashboard=False, object_store_memory=100 << 20, dashboard_agent_listen_port=0)\n"
        "c = Cluster()\n"
        "c.add_node(num_cpus=1, **args); c.add_node(num_cpus=1, **args)\n"
        "print(c.address, flush=True); sys.stdin.read(); c.shutdown()"
    )
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_AUTH_TOKEN", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate(timeout=60)  # closes its stdin, which ends the cluster


def alone(model: Path, tokens: int) -> list[int]:
    """What one process makes of the prompt [1, 2]."""
    from workers.engine import EngineConfig, Request, Sampling
    from workers.engine.build import build_engine

    engine = build_engine(EngineConfig(str(model), dtype="float32", threads=1))
    engine.add(Request("r", [1, 2], tokens, Sampling(temperature=0)))
    made: list[int] = []
    while engine.has_work():
        made += [token for output in engine.step() for token in output.token_ids]
    engine.close()
    return made


def test_ranks_on_two_ray_nodes(text_model: Path, tmp_path: Path) -> None:
    expected = alone(text_model, 60)
    with two_nodes() as address:
        flags = ["--model", f"text={text_model}", "--dtype", "float32", "--tensor-parallel", "2", "--threads", "1"]
        with running(tmp_path, [*flags, "--ray-address", address]) as apart:
            apart.wait_until_ready()
            with Client(apart.address) as client:
                assert list(greedy(client, "text")) == expected
            assert apart.stop()[-1] == "understudy: stopped"


RANK = """
import json, sys
from workers.engine import EngineConfig, Request, Sampling
from workers.engine.build import build_engine, build_rank
from workers.parallel.meeting import Meeting, join
rank, place, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
config = EngineConfig(path, dtype="float32", threads=1, tensor_parallel=2)
group = join(Meeting("gloo", 2, place), rank, "cpu", 60)
if rank:
    build_rank(config, group).follow()
else:
    engine = build_engine(config, None, group)
    engine.add(Request("r", [1, 2], 40, Sampling(temperature=0)))
    tokens = []
    while engine.has_work():
        for output in engine.step():
            tokens += output.token_ids
    engine.check_idle()
    engine.close()
    print(json.dumps(tokens))
"""


def test_ranks_in_networks_of_their_own(tmp_path: Path) -> None:
    """Hosts that reach each other by their addresses alone, as on two machines."""
    model = make_tiny_llama(tmp_path)
    expected = alone(model, 40)
    with two_networks() as names:
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-c", RANK, str(rank), "10.77.31.1:29500", str(model)],
                stdout=subprocess.PIPE, text=True, cwd=ROOT,
            )
            for rank, name in enumerate(names)
        ]  # fmt: skip
        try:
            said, _ = processes[0].communicate(timeout=120)
            processes[1].communicate(timeout=30)
            assert processes[1].returncode == 0
        finally:
            for process in processes:
                process.kill()
    assert json.loads(said) == expected
