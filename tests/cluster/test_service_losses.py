"""What happens when processes die. Runs on the session's service, and leaves it whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_process import UNDERSTUDY, Service, until

from understudy.client import Client
from understudy.v1 import admin_pb2


def leaders(service: Service) -> dict[str, int]:
    return {p.replica: p.pid for p in service.status().processes if p.role == "shard"}


def ready(service: Service) -> dict[str, int]:
    """Epochs of the replicas of `text` that are ready."""
    replicas = service.status().replicas
    return {r.id: r.epoch for r in replicas if r.model == "text" and r.state == admin_pb2.REPLICA_STATE_READY}


def running(service: Service) -> dict[str, int]:
    """Sequences that run at the replicas of `text`."""
    return {r.id: r.running for r in service.status().replicas if r.model == "text"}


def answer(client: Client, seed: int, tokens: int = 400) -> tuple[int, ...]:
    done = client.complete([1, 2], model="text", seed=seed, temperature=1.0, max_tokens=tokens, ignore_eos=True)
    return done.choices[0].token_ids


@pytest.fixture
def whole(service: Service) -> Iterator[Service]:
    until(lambda: len(ready(service)) == 2)
    yield service
    until(lambda: len(ready(service)) == 2)


def test_streams_go_on_when_a_leader_is_killed(whole: Service) -> None:
    before = ready(whole)
    failovers = whole.metric("understudy_failovers_total")
    with whole.client() as client:
        expected = [answer(client, seed) for seed in range(8)]
        streams = [
            client.generate([1, 2], model="text", seed=i % 8, temperature=1.0, max_tokens=400, ignore_eos=True)
            for i in range(24)
        ]
        for stream in streams:
            next(stream)
        until(lambda: max(running(whole).values()) > 0)
        busy = running(whole)
        victim, other = sorted(busy, key=lambda name: -busy[name])
        os.kill(leaders(whole)[victim], signal.SIGKILL)
        for stream in streams:
            for _ in stream:
                pass
        assert [s.completion().choices[0].token_ids for s in streams] == expected * 3
    until(lambda: ready(whole).get(victim, 0) > before[victim])  # a router that was restarted leaves a gap
    assert ready(whole)[other] == before[other], "the other one was left alone"
    until(lambda: whole.metric("understudy_failovers_total") > failovers)


def test_a_stopped_leader_is_silent_and_streams_go_on_elsewhere(whole: Service) -> None:
    pid = leaders(whole)["text-1"]
    with whole.client() as client:
        expected = answer(client, 5)
        streams = [
            client.generate([1, 2], model="text", seed=5, temperature=1.0, max_tokens=400, ignore_eos=True)
            for _ in range(8)
        ]
        for stream in streams:
            next(stream)
        os.kill(pid, signal.SIGSTOP)
        for stream in streams:
            for _ in stream:
                pass
        assert {s.completion().choices[0].token_ids for s in streams} == {expected}
    until(lambda: "text-1" not in ready(whole))
    os.kill(pid, signal.SIGCONT)


def test_a_killed_router_comes_back_and_knows_everybody(whole: Service) -> None:
    router = next(p.pid for p in whole.status().processes if p.role == "router")
    epochs = ready(whole)
    os.kill(router, signal.SIGKILL)
    with whole.client() as client:
        assert len(answer(client, 1, 20)) == 20, "gateways choose by themselves meanwhile"

    def back() -> bool:
        try:
            status = whole.status()
        except Exception:
            return False
        return any(p.role == "router" and p.pid != router for p in status.processes)

    until(back)
    until(lambda: ready(whole) == epochs)


def test_a_killed_gateway_comes_back(whole: Service) -> None:
    def gateways() -> set[int]:
        return {p.pid for p in whole.status().processes if p.role == "gateway"}

    until(lambda: len(gateways()) == 2)  # a router that has just begun anew hears of them within a beat
    old = gateways()
    os.kill(min(old), signal.SIGKILL)

    def back() -> bool:
        try:
            now = gateways()
        except Exception:
            return False
        return len(now - old) == 1 and len(now) == 2

    until(back)
    with whole.client() as client:
        assert len(answer(client, 1, 20)) == 20


def test_a_second_service_on_the_same_port_says_so(whole: Service, text_model: Path) -> None:
    import subprocess

    port = whole.address.rpartition(":")[2]
    said = subprocess.run(
        [UNDERSTUDY, "serve", "--model", str(text_model), "--port", port], capture_output=True, text=True, check=False
    )
    assert said.returncode == 1
    assert f"--port: cannot listen on 127.0.0.1:{port}" in said.stderr
    assert "Traceback" not in said.stderr
