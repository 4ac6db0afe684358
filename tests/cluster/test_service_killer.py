"""A request that real replicas die of: it is found and refused, and its batch mates have the answers that they always
have. Runs on the session's service, and leaves it whole."""

from __future__ import annotations

import threading

import pytest
from fate import POISON
from service_process import TOKEN, Service, until

from understudy.client import Client
from understudy.errors import InternalError
from understudy.types import Retry
from understudy.v1 import admin_pb2

MATES = 6
PATIENT = Retry(attempts=1000, resume_attempts=1000, resume_s=300.0)


def ask(client: Client, seed: int) -> tuple[int, ...]:
    done = client.complete([1, 2, seed], model="text", seed=seed, temperature=1.0, max_tokens=250, ignore_eos=True)
    return done.choices[0].token_ids


def leaders(service: Service) -> set[int]:
    return {p.pid for p in service.status().processes if p.role == "shard" and p.replica.startswith("text-")}


def ready(service: Service) -> int:
    replicas = service.status().replicas
    return sum(r.model == "text" and r.state == admin_pb2.REPLICA_STATE_READY for r in replicas)


def test_only_the_killer_is_refused(service: Service) -> None:
    until(lambda: ready(service) == len(leaders(service)) == 2)
    before = leaders(service)
    with Client(service.address, token=TOKEN, retry=PATIENT) as client:
        expected = [ask(client, seed) for seed in range(MATES)]
        answers: list[tuple[int, ...] | None] = [None] * MATES
        stop = threading.Event()

        def play(seed: int) -> None:
            while not stop.is_set():
                answers[seed] = ask(client, seed)
                if answers[seed] != expected[seed]:
                    return

        mates = [threading.Thread(target=play, args=(seed,), daemon=True) for seed in range(MATES)]
        for mate in mates:
            mate.start()
        try:
            with pytest.raises(InternalError, match="is not tried again: 2 times its replica failed"):
                for _ in client.generate(POISON, model="text", max_tokens=50):
                    pass
        finally:
            stop.set()
            for mate in mates:
                mate.join(240)
        assert answers == expected
    until(lambda: ready(service) == len(leaders(service)) == 2)
    assert not before & leaders(service), "each of the first two had to die"
    assert service.metric("understudy_router_suspects") == 0
