"""Replicas come and go with demand, to none and back. A service of its own, whose engine computes nothing; at last it
is not given the time to drain."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from service_process import Service, alive, running, until

from understudy.v1 import admin_pb2

# Room for four at one replica, something in hand: an answer that ends and the next one may both be counted for a while.
FLAGS = ["--engine", "fake", "--fake-rows", "200", "--max-running", "8", "--redis-url", "none", "--gateways", "2"]
SCALING = ["--replicas", "0:2", "--idle-seconds", "3", "--scale-down-seconds", "2", "--drain-seconds", "1"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[Service]:
    flags = ["--model", f"text={demo_model}", *FLAGS, *SCALING]
    with running(tmp_path_factory.mktemp("scaling"), flags) as made:
        made.wait_until_ready()
        yield made
        if made.process.poll() is None:
            assert made.stop()[-1] == "understudy: stopped"


def model(service: Service) -> admin_pb2.ModelStatus:
    (found,) = service.status().models
    return found


def answer(service: Service, seed: int, tokens: int) -> tuple[int, ...]:
    with service.client(token=None) as client:
        done = client.complete([1, 2], seed=seed, temperature=1.0, max_tokens=tokens, ignore_eos=True)
        return done.choices[0].token_ids


@contextmanager
def asking(service: Service, clients: int) -> Iterator[set[tuple[int, ...]]]:
    """So many clients who ask again and again meanwhile; filled with their answers when all have ended."""
    enough = threading.Event()
    answers: set[tuple[int, ...]] = set()

    def ask() -> None:
        while not enough.is_set():
            answers.add(answer(service, 1, 200))

    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(ask) for _ in range(clients)]
        try:
            yield answers
        finally:
            enough.set()
        for each in asked:
            each.result(120)


def test_to_none_and_back(service: Service) -> None:
    until(lambda: model(service).replicas_wanted == 0)
    assert model(service).scaling.reason == "idle"
    until(lambda: not service.status().replicas)
    roles = {p.role for p in service.status().processes}
    assert roles == {"gateway", "router"}, "nothing is left of it"
    assert len(answer(service, 1, 20)) == 20, "who asks then waits for its start"
    until(lambda: model(service).replicas_wanted == 1)
    assert (model(service).replicas_ready, model(service).scaling.reason) == (1, "unserved")
    until(lambda: service.status().replicas[0].cold_start.process_s > 0)
    until(lambda: service.metric("understudy_model_replicas_wanted") == 1)
    until(lambda: service.metric("understudy_replica_cold_start_seconds") > 0)


def test_more_when_it_is_needed_and_fewer_later_without_losing_a_token(service: Service) -> None:
    """Streams are longer than a leaving replica's patience: they go on at the other one."""
    alone = answer(service, 1, 200)
    with asking(service, 12) as answers:
        until(lambda: model(service).replicas_ready == 2)
        assert model(service).scaling.reason in ("running", "queue", "first_token", "prompts")
    assert answers == {alone}
    with asking(service, 2) as answers:
        until(lambda: model(service).replicas_wanted == 1)
        until(lambda: len(service.status().replicas) == 1)
    assert answers == {alone}


def test_a_second_signal_does_not_wait_and_leaves_no_process(service: Service) -> None:
    started, console = service.processes(), service.process.stdout
    assert console is not None
    service.process.send_signal(signal.SIGINT)
    until(lambda: "draining" in console.readline())
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(60) == 0
    assert alive(started) == []
    assert not service.directory.exists()
