"""Requests go to where their prefix lies, and elsewhere when that is busy; operators see why."""

from __future__ import annotations

import json
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor

from service_process import UNDERSTUDY, Service, until

from understudy.client import Client
from understudy.v1 import admin_pb2


def prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(3, 200), k=tokens)


def cached(client: Client, ids: list[int], tokens: int = 2) -> int:
    """Prompt tokens that the replica had."""
    done = client.complete(ids, model="text", temperature=0.0, max_tokens=tokens, ignore_eos=True, timeout=60)
    return done.prompt.cached_tokens.device


def ready(service: Service) -> int:
    return sum(r.state == admin_pb2.REPLICA_STATE_READY for r in service.status().replicas)


def decisions(service: Service) -> dict[str, int]:
    return dict(service.status().router.decisions)


def test_the_second_request_goes_where_its_prefix_is(service: Service) -> None:
    until(lambda: service.metric("understudy_ready_replicas") >= 2 * ready(service))
    shared, before = prompt(1, 400), decisions(service)
    turns, found = iter(range(1000)), []
    with service.client() as client:
        assert cached(client, shared) == 0

        def has_gone_back() -> bool:
            """Others are asked between. (A gateway that waits too long for the router chooses by itself.)"""
            turn = next(turns)
            assert cached(client, prompt(100 + turn, 300)) == 0
            found.append(cached(client, [*shared, 3 + turn]))
            return decisions(service)["device"] >= before["device"] + 4

        until(has_gone_back)
    assert set(found) <= {0, 400}
    assert found.count(400) >= 4
    shown = subprocess.run(
        [UNDERSTUDY, "status", "--json", "--admin", service.admin], capture_output=True, text=True, check=True
    )
    router = json.loads(shown.stdout)["router"]
    assert router["reused_tokens"]["device"] >= 4 * 384
    assert router["index"]["changes"] > 0
    until(lambda: service.metric("understudy_router_index_blocks") >= 25)
    until(lambda: service.metric("understudy_router_decisions_total") >= 9)
    assert service.metric("understudy_replica_prefill_rows_total") > 0


def test_a_shared_beginning_spreads_when_its_replica_is_busy(service: Service) -> None:
    seeds, before = iter(range(1000, 10_000)), decisions(service)["spread"]
    with service.client() as client, ThreadPoolExecutor(8) as pool:

        def has_spread() -> bool:
            """Eight at once whose beginning one replica has: each brings more to compute than the beginning spares."""
            shared = prompt(next(seeds), 64)
            cached(client, [*shared, 1])
            prompts = [shared + prompt(next(seeds), 380) for _ in range(8)]
            assert set(pool.map(lambda ids: cached(client, ids), prompts)) <= {0, 64}  # on the device
            return decisions(service)["spread"] > before

        until(has_spread)
