"""The bundled mixture with its experts on hosts of their own: the same tokens, whatever happens to hosts."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest
from service_process import UNDERSTUDY, Service, until

from understudy.client import Client
from understudy.v1 import admin_pb2

PROMPT = "The capital of France is"


def answer(client: Client, tokens: int = 150, model: str = "apart") -> tuple[int, ...]:
    done = client.complete(PROMPT, model=model, seed=3, temperature=0.8, max_tokens=tokens, ignore_eos=True, timeout=60)
    return done.choices[0].token_ids


@pytest.fixture
def apart(service: Service) -> Service:
    """A service that has the model `apart`."""
    if not any(m.name == "apart" for m in service.status().models):
        pytest.skip("models/demo has no weights here")
    return service


def placement(service: Service) -> admin_pb2.ExpertPlacement:
    (found,) = (p for p in service.status().experts if p.model == "apart")
    return found


def metric(service: Service, name: str) -> float:
    labels = r"\{model=\"apart\",replica=\"apart-0\"\}"
    return service.metric(f"understudy_expert_{name}{labels}")


def settled(service: Service, hosts: int) -> bool:
    now = placement(service)
    return now.version == now.target_version and [h.state for h in now.hosts] == ["ready"] * hosts


def holds_what_is_placed(now: admin_pb2.ExpertPlacement) -> bool:
    """Nothing is held beyond it any more."""
    return sum(h.held for h in now.hosts) == now.copies


def hosts(service: Service) -> dict[int, int]:
    """Process ids by rank."""
    return {p.rank: p.pid for p in service.status().processes if p.role == "expert_host"}


def test_tokens_are_those_of_experts_at_home(apart: Service) -> None:
    """`demo` is the same model without expert hosts."""
    with apart.client() as client:
        numerics = {m.name: m.numerics_id for m in client.models()}
        assert numerics["apart"] == numerics["demo"]
        assert answer(client) == answer(client, model="demo")
        probe = {"trace": True, "trace_attention": [1], "max_tokens": 3, "temperature": 0.0, "timeout": 60}
        ours, theirs = (client.complete(PROMPT, model=m, **probe) for m in ("apart", "demo"))  # type: ignore[arg-type]
        assert ours.choices[0].traces == theirs.choices[0].traces


def test_operators_see_hosts_and_placement(apart: Service) -> None:
    until(lambda: settled(apart, 2))
    now = placement(apart)
    assert (now.model, now.replica, now.hosts_wanted, now.problem) == ("apart", "apart-0", 2, "")
    assert now.version >= 1, "what it has computed so far may have had it balanced anew"
    assert sum(h.held for h in now.hosts) >= now.copies >= now.experts > 0
    assert all(h.rows > 0 for h in now.hosts)
    assert 0 < now.balance <= 1
    assert hosts(apart) == {i: h.pid for i, h in enumerate(now.hosts)}
    until(lambda: metric(apart, "hosts_ready") == 2)
    assert metric(apart, "rebalance_age_seconds") > 0
    until(lambda: metric(apart, "placement_version") >= now.version)  # told with the next beat


def test_a_killed_host_costs_no_token_and_comes_back(apart: Service) -> None:
    until(lambda: settled(apart, 2))
    with apart.client() as client:
        expected = answer(client)
        stream = client.generate(
            PROMPT, model="apart", seed=3, temperature=0.8, max_tokens=150, ignore_eos=True, timeout=60
        )
        for _ in range(20):
            next(stream)
        before = hosts(apart)
        os.kill(before[0], signal.SIGKILL)
        for _ in stream:
            pass
        assert stream.completion().choices[0].token_ids == expected
        until(lambda: settled(apart, 2) and hosts(apart)[0] != before[0])
        assert hosts(apart)[1] == before[1]
        assert placement(apart).hosts[0].life == 2
        assert answer(client) == expected
        until(lambda: holds_what_is_placed(placement(apart)))


def test_hosts_are_added_and_removed_under_a_stream(apart: Service) -> None:
    until(lambda: settled(apart, 2))
    version = placement(apart).version
    with apart.client() as client:
        expected = answer(client, 20)
        scaled = subprocess.run(
            [UNDERSTUDY, "experts", "--model", "apart", "--add", "1", "--json", "--admin", apart.admin],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(scaled.stdout)["experts"][0]["hosts_wanted"] == 3
        while not settled(apart, 3):
            assert answer(client, 20) == expected
        assert placement(apart).version > version
        assert answer(client, 20) == expected
        assert placement(apart).hosts[2].rows > 0
        subprocess.run(
            [UNDERSTUDY, "experts", "--model", "apart", "--remove", "1", "--admin", apart.admin],
            check=True, capture_output=True,
        )  # fmt: skip
        while not settled(apart, 2):
            assert answer(client, 20) == expected
        assert answer(client, 20) == expected
        until(lambda: len(hosts(apart)) == 2)


def test_a_killed_router_leaves_the_placement_in_force(apart: Service) -> None:
    until(lambda: settled(apart, 2))
    version = placement(apart).version
    router = next(p.pid for p in apart.status().processes if p.role == "router")
    with apart.client() as client:
        expected = answer(client, 20)
        os.kill(router, signal.SIGKILL)
        assert answer(client, 20) == expected

        def back() -> bool:
            try:
                return placement(apart).version >= version
            except Exception:
                return False

        until(back)
        assert answer(client, 20) == expected
