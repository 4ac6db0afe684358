"""What is wrong shows, with its cause, wherever one may look. Runs on the session's service, and leaves it whole."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from service_process import Service, until

from understudy.v1 import admin_pb2

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SHARED = "understudy.v1.Inference/shared"


def health(service: Service, name: str) -> tuple[int, str]:
    """Status and what is wrong, as a gateway says it."""
    with grpc.insecure_channel(service.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        try:
            answer, call = stub.Check.with_call(health_pb2.HealthCheckRequest(service=name), timeout=10)
        except grpc.RpcError as error:  # a gateway that has just been started may not know the model yet
            return 0, str(error)
    return answer.status, dict(call.trailing_metadata() or ()).get("understudy-trouble", "")


def probe(service: Service) -> dict[str, object]:
    """The models in the answer of `/readyz`."""
    try:
        with urlopen(f"http://127.0.0.1:{service.ports['metrics']}/readyz", timeout=10) as page:
            said = page.read()
    except HTTPError as error:
        with error:
            said = error.read()
    found: dict[str, object] = json.loads(said)["models"]
    return found


def replica_of(service: Service, model: str) -> admin_pb2.Replica:
    return next(r for r in service.status().replicas if r.model == model)


def rank(service: Service, model: str, number: int) -> int:
    found = [p.pid for p in service.status().processes if p.role == "shard" and p.rank == number]
    mine = [p.pid for p in service.status().processes if p.replica.startswith(f"{model}-")]
    return next(pid for pid in found if pid in mine)


@pytest.fixture
def whole(service: Service) -> Iterator[Service]:
    until(lambda: health(service, SHARED) == (SERVING, ""))
    yield service
    until(lambda: health(service, SHARED) == (SERVING, ""), 120)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # its supervisor has given it up meanwhile
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_stops_shows_everywhere_and_the_other_model_goes_on(whole: Service, number: int) -> None:
    causes = ("no answer", "silent", "a step has been running", "has not come")

    def named() -> bool:
        """Either gateway may answer, and one of them hears of it later."""
        status, said = health(whole, SHARED)
        return status == NOT_SERVING and said.startswith("shared-0: ") and any(cause in said for cause in causes)

    with stopped(rank(whole, "shared", number)):
        until(named)
        until(lambda: replica_of(whole, "shared").state != admin_pb2.REPLICA_STATE_READY)
        assert replica_of(whole, "shared").cause
        until(lambda: probe(whole)["shared"] != {"serving": True, "troubles": []})
        until(lambda: whole.metric(r"understudy_model_serving\{model=\"shared\"\}") < 2)
        until(lambda: "shared-0: " in health(whole, "")[1])
        assert health(whole, "")[0] == SERVING, "the service has other models"


def test_a_rank_that_is_killed_is_named_until_its_replica_is_back(whole: Service) -> None:
    epoch = replica_of(whole, "shared").epoch
    os.kill(rank(whole, "shared", 1), signal.SIGKILL)
    seen: set[str] = set()

    def back() -> bool:
        status, said = health(whole, SHARED)
        seen.add(said)
        return status == SERVING and replica_of(whole, "shared").epoch > epoch

    until(back, 120)
    assert any("rank 1" in said for said in seen), seen
