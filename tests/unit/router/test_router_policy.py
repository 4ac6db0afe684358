"""Who gets a request: the router as a plain class, and its shell without Ray."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.actor import RayRouter, RouterActor
from router.admin import replica_message
from router.admission import Limits, admit
from router.fakes import ManualClock
from router.policy import Candidate, choose, choose_of_two, expected_wait
from router.state import LEASE_S, Query, ReplicaView, Router, State
from understudy.errors import ModelNotFound, Overloaded, Unavailable
from understudy.v1 import admin_pb2
from workers.engine import EngineInfo, EngineStats
from workers.engine.fake import FakeEngine

INFO = FakeEngine().info


def query(tokens: int = 10, **fields: Any) -> Query:
    return Query("fake", tokens, **fields)


def router(*names: str, **options: Any) -> tuple[Router, ManualClock]:
    clock = ManualClock()
    made = Router(clock, **options)
    for name in names:
        made.register(name, f"{name}:1", 1, INFO, node="n")
    return made, clock


@given(st.lists(st.builds(Candidate, st.uuids().map(str), *[st.integers(0, 50)] * 6), min_size=1, max_size=6))
def test_the_least_expected_wait_is_chosen(candidates: list[Candidate]) -> None:
    best = choose(candidates, 8)
    assert all(expected_wait(best, 8) <= expected_wait(c, 8) for c in candidates)
    assert choose_of_two(candidates, 8, random.Random(0)) in candidates


def test_a_queue_of_prompts_outweighs_a_few_running() -> None:
    busy, long = Candidate("busy", 8, 0, 0), Candidate("long", 0, 1, 4000)
    assert choose([long, busy], 100) is busy
    holds = Candidate("holds", 8, 0, 0, reusable=90)
    assert choose([busy, holds], 100) is holds


def test_grants_count_at_once() -> None:
    """Many gateways ask before any replica reports: they do not all get the same."""
    made, _ = router("a", "b", "c")
    counts = Counter(made.assign(query()).replica for _ in range(30))
    assert counts == {"a": 10, "b": 10, "c": 10}
    assert made.leases == 30


async def test_a_grant_counts_until_the_replica_must_have_counted_it() -> None:
    made, clock = router("a", "b", settle_s=0.25)
    first = made.assign(query(1000))
    assert (first.replica, first.address, first.epoch) == ("a", "a:1", 1)
    await clock.advance(0.2)
    made.beat("a", 1, EngineStats())  # taken before the request arrived there
    assert made.assign(query(10)).replica == "b"
    await clock.advance(0.1)
    made.beat("a", 1, EngineStats(running=1))
    assert made.leases == 1  # that of b
    made.release([first.lease, 999])
    assert made.leases == 1


async def test_released_and_forgotten_grants() -> None:
    made, clock = router("a")
    made.release([made.assign(query()).lease])
    assert made.leases == 0
    made.assign(query())
    for _ in range(int(LEASE_S) + 1):  # heard of, but only by registering: no counts
        await clock.advance(1.0)
        made.register("a", "a:1", 1, INFO)
    made.assign(query())
    assert made.leases == 1


async def test_lost_draining_and_back() -> None:
    made, clock = router("a", "b", heartbeat_timeout=2.0)
    await clock.advance(1.5)
    made.beat("b", 1, EngineStats())
    await clock.advance(1.0)
    assert [v.state for v in made.snapshot()] == [State.LOST, State.READY]
    assert {made.assign(query()).replica for _ in range(4)} == {"b"}
    made.beat("a", 1, EngineStats())
    made.drain("b", 1)
    made.drain("a", 0)  # another life's
    assert [v.state for v in made.snapshot()] == [State.READY, State.DRAINING]
    assert made.assign(query()).replica == "a"
    made.unregister("a", 1)
    with pytest.raises(Unavailable):
        made.assign(query())
    made.unregister("b", 1)
    with pytest.raises(ModelNotFound):
        made.assign(query())


def test_older_epochs_change_nothing() -> None:
    made, _ = router()
    assert made.register("a", "new:1", 2, INFO)
    assert not made.register("a", "old:1", 1, INFO)
    assert not made.beat("a", 1, EngineStats())
    assert not made.beat("unknown", 1, EngineStats())
    made.unregister("a", 1)
    assert made.assign(query()).address == "new:1"
    assert made.register("a", "newest:1", 3, INFO)
    assert made.leases == 0


def test_exclusion_is_of_one_life() -> None:
    made, _ = router("a")
    with pytest.raises(Unavailable):
        made.assign(query(exclude=(("a", 1),)))
    made.register("a", "a:2", 2, INFO)
    assert made.assign(query(exclude=(("a", 1),))).epoch == 2


def test_only_the_same_weights_and_arithmetic() -> None:
    made, _ = router()
    for name, numerics in (("a", "x"), ("b", "y")):
        made.register(name, "at", 1, FakeEngine(numerics_id=numerics).info)
    for _ in range(3):
        assert made.assign(query(numerics_id="y", fingerprint="fake")).replica == "b"
    with pytest.raises(Unavailable, match="same weights and arithmetic"):
        made.assign(query(numerics_id="z"))


async def test_full_queues_say_when_to_come_back() -> None:
    made, clock = router("a", limits=Limits(max_waiting=2, max_queued_tokens=1000))
    await clock.advance(1.0)
    made.beat("a", 1, EngineStats(computed_prompt_tokens=100))
    await clock.advance(1.0)
    full = EngineStats(computed_prompt_tokens=200, waiting_prefill_tokens=800, running=64, waiting=1)
    made.beat("a", 1, full)
    made.assign(query(100))
    with pytest.raises(Overloaded) as caught:
        made.assign(query(100))
    assert caught.value.retry_after_s == pytest.approx(4.5)  # half of 900 tokens at 100 a second
    with pytest.raises(Overloaded):
        admit([Candidate("a", 0, 0, 1000, slots=8)], Limits(2, 1000), 0)


def test_what_can_run_at_once_does_not_queue() -> None:
    assert Candidate("a", 3, 0, 0, granted=5, slots=8).queue == 0
    assert Candidate("a", 8, 2, 0, granted=1, slots=8).queue == 3
    assert Candidate("a", 9, 2, 0, slots=8).queue == 2


# The shell, without Ray: what crosses is bytes.


class Handle:
    """Stands for Ray's handle: awaits the actor's own coroutine."""

    def __init__(self, actor: RouterActor) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)

        class Remote:
            @staticmethod
            def remote(*args: Any) -> Any:
                return method(*pickle.loads(pickle.dumps(args)))

        return Remote


async def test_the_shell_passes_everything_on() -> None:
    far = RayRouter(Handle(RouterActor(2.0, {"max_waiting": 9, "max_queued_tokens": 10})))
    assert not await far.beat("a", 1, EngineStats())
    assert await far.register("a", "at:1", 1, INFO, "node")
    assert await far.beat("a", 1, EngineStats(running=2))
    (view,) = await far.replicas()
    assert (view.replica, view.address, view.node, view.info, view.state) == ("a", "at:1", "node", INFO, State.READY)
    assert view.stats.running == 2
    to = await far.assign(query(exclude=(("b", 3),), keys=(b"k",)))
    assert (to.replica, to.address, to.epoch) == ("a", "at:1", 1)
    with pytest.raises(Overloaded) as caught:
        await far.assign(query())
    assert caught.value.retry_after_s >= 0.5
    await far.release([to.lease])
    await far.drain("a", 1)
    with pytest.raises(Unavailable):
        await far.assign(query())
    await far.unregister("a", 1)
    with pytest.raises(ModelNotFound):
        await far.assign(query())
    assert await far.pid() > 0


async def test_a_router_that_does_not_answer_is_a_broken_connection() -> None:
    import asyncio

    class Silent:
        class assign:  # a method of Ray's handle
            @staticmethod
            def remote(_query: bytes) -> Any:
                return asyncio.get_running_loop().create_future()

    with pytest.raises(ConnectionError, match=r"did not answer within 0\.01 s"):
        await RayRouter(Silent(), timeout_s=0.01).assign(query())


# Operators, and what is never loaded.


def test_a_replica_in_the_words_of_the_admin_api() -> None:
    info: EngineInfo = INFO
    stats = EngineStats(running=1, waiting=2, generated_tokens=3, blocks_in_use=4, hit_tokens=5, preemptions=6)
    stats.drafted_tokens, stats.accepted_tokens = 8, 7
    lost = replica_message(ReplicaView("a", "at", 7, State.LOST, info, stats, 3.0, "n"))
    assert (lost.state, lost.cause, lost.epoch, lost.node) == (admin_pb2.REPLICA_STATE_LOST, "silent for 3.0 s", 7, "n")
    assert (lost.running, lost.waiting, lost.generated_tokens) == (1, 2, 3)
    assert (lost.drafted_tokens, lost.accepted_tokens) == (8, 7)
    assert (lost.cache.blocks_in_use, lost.cache.blocks_total, lost.cache.preemptions) == (4, info.blocks, 6)
    ready = replica_message(ReplicaView("a", "at", 7, State.READY, info, stats, 0.0))
    assert (ready.state, ready.cause) == (admin_pb2.REPLICA_STATE_READY, "")


def test_the_room_brings_neither_torch_nor_ray() -> None:
    modules = "router.gateway, router.actor, router.admin, router.fakes"
    code = f"import sys, {modules}; print([m for m in ('torch', 'ray', 'transformers', 'cluster') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
