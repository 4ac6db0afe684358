"""One model over two ranks, in a running service, over Ray nodes, and between networks."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from service_process import UNDERSTUDY, Service, until

from understudy.client import Client
from understudy.v1 import admin_pb2
from workers.engine.build import build_engine
from workers.engine.contract import EngineConfig, Request, Sampling

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


def one_process(path: Path, tokens: int = 60) -> tuple[tuple[int, ...], str]:
    """What `greedy` gives, and the numerics id, of an engine here."""
    engine = build_engine(EngineConfig(str(path), dtype="float32", threads=1, max_running=1))
    engine.add(Request("r", [1, 2], tokens, Sampling(temperature=0.0)))
    made: list[int] = []
    while engine.has_work():
        for output in engine.step():
            made += output.token_ids
    numerics = engine.info.numerics_id
    engine.close()
    return tuple(made), numerics


def test_two_ranks_give_the_tokens_of_one_process(service: Service, text_model: Path, demo_model: Path) -> None:
    mixture = (demo_model / "model.safetensors").is_file()
    expected, numerics = one_process(demo_model if mixture else text_model)
    with service.client() as client:
        assert greedy(client, "shared") == expected
        shared = next(m.numerics_id for m in client.models() if m.name == "shared")
        assert shared.replace("/tensor-parallel-2", "").replace("/whole-experts", "") == numerics
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


def test_ranks_are_the_hosts_of_their_experts(service: Service) -> None:
    found = [p for p in service.status().experts if p.model == "shared"]
    if not found:
        pytest.skip("models/demo has no weights here")

    def ready() -> bool:
        (now,) = (p for p in service.status().experts if p.model == "shared")
        return [(h.name, h.state) for h in now.hosts] == [("r0", "ready"), ("r1", "ready")]

    until(ready)
    (now,) = (p for p in service.status().experts if p.model == "shared")
    assert {i: h.pid for i, h in enumerate(now.hosts)} == ranks(service)
    assert all(h.rows > 0 and h.held >= 24 and h.capacity == 30 for h in now.hosts), "6 layers of 8 experts"
    asked = [UNDERSTUDY, "experts", "--model", "shared", "--add", "1", "--admin", service.admin]
    refused = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "at its 2 ranks (--expert-parallel), whose number is fixed" in refused.stderr


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
