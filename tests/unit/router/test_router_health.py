"""Health says what is true, and why."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry
from router_stage import Stage, until

from cluster.http import HttpServer
from router.channels import Timing
from router.gateway import SERVICE
from router.health import TROUBLE_KEY, Verdict, judge
from router.server import GatewayConfig
from understudy.v1 import inference_pb2 as pb

SEEDED = pb.Sampling(seed=1)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def asked(stage: Stage, service: str = "") -> tuple[int, str]:
    """Status and words."""
    stub = health_pb2_grpc.HealthStub(stage.channel)  # type: ignore[no-untyped-call]
    call = stub.Check(health_pb2.HealthCheckRequest(service=service))
    answer = await call
    return answer.status, dict(await call.trailing_metadata()).get(TROUBLE_KEY, "")


async def test_a_model_is_served_until_nothing_can_make_its_tokens(stage: Stage) -> None:
    for name in ("r0", "r1"):
        stage.add_replica(name)
    gateway = await stage.open(GatewayConfig(port=0, watch_s=0.01))
    await until(lambda: len(gateway.pool.alive()) == 2)
    await gateway.refresh()
    for service in ("", SERVICE, f"{SERVICE}/fake"):
        assert await asked(stage, service) == (SERVING, "")
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await asked(stage, f"{SERVICE}/other")
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    stage.router.lose("r0")
    stage.replicas["r0"].kill()
    gateway.told = {"fake": {"r0": "the leader is gone: rank 1: its process ended"}}
    await gateway.refresh()
    assert await asked(stage) == (SERVING, "r0: the leader is gone: rank 1: its process ended")
    stage.replicas["r1"].kill()
    stage.router.lose("r1")
    await until(lambda: not gateway.health.serving)
    assert (await asked(stage))[0] == NOT_SERVING
    assert gateway.metrics.serving.labels("fake")._value.get() == 0


async def test_a_replica_whose_step_stays_is_named_and_takes_nothing(stage: Stage) -> None:
    gate = stage.gate()
    clock = [0.0]
    stage.add_replica("r0", step_s=1.0, sleep=gate)
    stage.add_replica("r1")
    replica = stage.replicas["r0"]
    replica.loop._clock = lambda: clock[0]
    gateway = await stage.open(GatewayConfig(port=0, watch_s=0.01), timing=Timing(ping_s=0.05, heartbeat_timeout=30.0))
    await until(lambda: len(gateway.pool.alive()) == 2)
    answers = [asyncio.create_task(stage.generate(text="hi", sampling=SEEDED)) for _ in range(8)]
    await until(lambda: replica.loop._busy_since is not None)
    clock[0] = 500.0
    done = await asyncio.gather(*answers)
    assert len({tuple(a.ids) for a in done}) == 1, "all of them came, also those of the stalled replica"
    assert gateway.dispatcher.failovers >= 1
    await until(lambda: gateway.health.troubles)
    status, words = await asked(stage)
    assert status == SERVING
    assert words == "r0: a step has been running for 500.0 s; the slowest before took 0.00 s"
    gate.open()
    await until(lambda: not gateway.health.troubles, 20)
    assert (await stage.generate(text="hi", sampling=SEEDED)).ids == done[0].ids


def test_nothing_known_is_said_too() -> None:
    assert judge("m", [], []) == Verdict(False, ("no replica of m is there",))
    assert judge("m", [], [], {"m-0": "weights: no such file"}) == Verdict(False, ("m-0: weights: no such file",))


@dataclass
class View:
    verdicts: dict[str, Verdict]
    serving: bool


def test_probes_over_http() -> None:
    view = View({"a": Verdict(True), "b": Verdict(False, ("b-0: silent for 3.0 s",))}, True)
    server = HttpServer("127.0.0.1", 0, CollectorRegistry(), view)

    def get(path: str) -> tuple[int, object]:
        try:
            with urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=10) as page:
                return page.status, page.read()
        except HTTPError as error:
            with error:
                return error.code, error.read()

    try:
        status, said = get("/readyz")
        assert (status, json.loads(said)["models"]["b"]) == (
            200,
            {"serving": False, "troubles": ["b-0: silent for 3.0 s"]},
        )
        view.verdicts, view.serving = {"b": view.verdicts["b"]}, False
        assert get("/readyz")[0] == 503
        assert get("/livez")[0] == 200
        assert get("/metrics")[0] == 200
        assert get("/other")[0] == 404
    finally:
        server.close()
