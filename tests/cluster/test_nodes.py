"""One model over two ranks that are not on one machine: over Ray nodes, and between networks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from networks import two_networks
from service_process import make_tiny_llama, running

from understudy.client import Client

ROOT = Path(__file__).parents[2]


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
                done = client.complete([1, 2], temperature=0.0, max_tokens=60, ignore_eos=True, timeout=120)
                assert list(done.choices[0].token_ids) == expected
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
