"""Who gets a request: the router as a plain class, and its shell without Ray."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from router.actor import RayRouter, RouterActor
from router.admin import replica_message
from router.admission import Limits
from router.fakes import ManualClock
from router.policy import PREFILL_RATE
from router.port import Query, ReplicaView, State
from router.state import LEASE_S, Router
from understudy.errors import ModelNotFound, Overloaded, Unavailable
from understudy.v1 import admin_pb2
from workers.cache.events import Changes, Tier, hints
from workers.engine import EngineInfo, EngineStats
from workers.engine.fake import FakeEngine

INFO = FakeEngine().info
KEYS = [bytes([i]) * 32 for i in range(1, 33)]


def query(tokens: int = 10, **fields: Any) -> Query:
    return Query("fake", tokens, **fields)


def queued(tokens: int, **fields: Any) -> EngineStats:
    """Of priority 0."""
    return EngineStats(waiting_prefill_tokens=tokens, waiting_prefill_normal=tokens, **fields)


def router(*names: str, **options: Any) -> tuple[Router, ManualClock]:
    clock = ManualClock()
    made = Router(clock, **options)
    for name in names:
        made.register(name, f"{name}:1", 1, INFO, node="n")
    return made, clock


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
    full = queued(800, prefill_rows=200, prefill_seconds=2.0, running=64, waiting=1)
    made.beat("a", 1, full)
    made.assign(query(100, priority=1))
    with pytest.raises(Overloaded, match="every replica's queue is full") as caught:
        made.assign(query(100, priority=1))
    # Half of 900 tokens, at 100 rows a second of which 64 (at the grant) sequences take one each beside 256 of prompts.
    slow = 1 + 64 / 256
    assert caught.value.retry_after_s == pytest.approx(900 / 2 / 100 * slow, rel=0.01)
    assert made.figures().refused == 1
    await clock.advance(3.0)
    with pytest.raises(Unavailable):
        made.assign(query(100))


async def test_lower_classes_find_queues_full_sooner() -> None:
    made, _ = router("a", limits=Limits(max_waiting=8))
    waiting = 0

    def is_full(priority: int) -> bool:
        made.beat("a", 1, EngineStats(running=64, waiting=waiting))
        try:
            made.release([made.assign(query(1, priority=priority)).lease])
        except Overloaded:
            return True
        return False

    found = {}
    for waiting in range(10):
        found[waiting] = [is_full(p) for p in (-5, 0, 3)]
    assert [found[w] for w in (3, 4, 6, 7, 8)] == [
        [False, False, False],
        [True, False, False],
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_the_service_has_a_bound_of_its_own() -> None:
    made, _ = router("a", "b", limits=Limits(max_service_waiting=8))
    for name in ("a", "b"):
        made.beat(name, 1, EngineStats(running=64, waiting=3))
    made.assign(query())
    with pytest.raises(Overloaded, match="7 requests wait in the whole service, of 8 that may"):
        made.assign(query())
    assert made.assign(query(priority=1)).replica
    with pytest.raises(Overloaded):
        made.assign(query(priority=1))


# Where a prefix is.


def told(made: Router, name: str, keys: list[bytes], stats: EngineStats | None = None) -> None:
    """The replica has these blocks on its device, and nothing else."""
    changes = Changes.of(made.wanted(name, 1) + 1, [(Tier.DEVICE, True, k) for k in keys], reset=True)
    assert made.beat(name, 1, stats or EngineStats(), changes)


def test_a_request_goes_where_its_prefix_is() -> None:
    made, _ = router("a", "b", "c")
    told(made, "b", KEYS)
    long = query(32 * 16 + 5, keys=hints(KEYS))
    assert made.assign(long).replica == "b"
    assert made.figures().decisions["device"] == 1
    assert made.figures().reused_tokens == {"device": 512, "host": 0, "store": 0}
    assert made.assign(query(32 * 16)).replica != "b", "another prompt"
    assert made.figures().decisions["least_work"] == 1


def test_a_prefix_that_was_just_assigned_is_expected_there() -> None:
    made, _ = router("a", "b", "c")
    first = made.assign(query(520, keys=hints(KEYS)))
    assert {made.assign(query(520, keys=hints(KEYS))).replica for _ in range(3)} == {first.replica}


def test_a_shared_prefix_spreads_when_its_replica_is_busy() -> None:
    made, _ = router("a", "b", "c", "d")
    told(made, "b", KEYS)
    counts = Counter(made.assign(query(700, keys=hints(KEYS))).replica for _ in range(40))
    assert counts["b"] > 4
    assert len(counts) == 4, "and what was computed there serves the next"
    assert made.figures().decisions["spread"] >= 3


def test_a_replica_that_comes_back_has_lost_its_prefixes() -> None:
    made, _ = router("a", "b")
    told(made, "b", KEYS)
    assert made.wanted("b", 1) == 33
    assert made.register("b", "b:2", 2, INFO)
    assert made.wanted("b", 2) == 0
    assert made.wanted("b", 1) == made.wanted("nobody", 1) == 0
    assert made.assign(query(520, keys=hints(KEYS))).replica == "a"
    assert made.figures().decisions["least_work"] == 1


def test_the_only_replica_is_no_choice() -> None:
    made, _ = router("a")
    made.assign(query(520, keys=hints(KEYS)))
    assert made.figures().decisions["only"] == 1


# What is ahead, and how fast it goes.


def test_whoever_is_faster_gets_more() -> None:
    made, _ = router("slow", "fast")
    made.beat("slow", 1, EngineStats(prefill_rows=20_000, prefill_seconds=20.0))
    made.beat("fast", 1, EngineStats(prefill_rows=60_000, prefill_seconds=20.0))
    counts = Counter(made.assign(query(1000)).replica for _ in range(40))
    assert counts["fast"] == pytest.approx(30, abs=2)


def test_who_has_measured_nothing_is_taken_to_be_like_the_others() -> None:
    made, _ = router("a", "b")
    assert made._fleet.rate[1] == PREFILL_RATE
    made.beat("a", 1, EngineStats(prefill_rows=50_000, prefill_seconds=1.0))
    made.beat("b", 1, EngineStats())
    assert made._fleet.rate.tolist()[:2] == [50_000, 50_000]
    made.register("c", "c:1", 1, INFO)
    assert made._fleet.rate[2] == 50_000


def test_a_few_short_prompts_do_not_keep_long_ones_away() -> None:
    """Rows a second are few where a step has few rows; and who gets no long prompt measures none."""
    made, _ = router("a", "b")
    made.beat("a", 1, EngineStats(prefill_rows=100, prefill_seconds=0.1))
    made.beat("b", 1, EngineStats(prefill_rows=50_000, prefill_seconds=5.0))
    made.beat("a", 1, EngineStats(prefill_rows=100, prefill_seconds=0.1))  # nothing came to it
    slow, fast = made._fleet.rate.tolist()[:2]
    assert 8_000 < slow < fast
    counts = Counter(made.assign(query(1000)).replica for _ in range(40))
    assert counts["a"] >= 15


async def test_what_was_reported_is_computed_meanwhile() -> None:
    made, clock = router("a", "b")
    for name, waiting in (("a", 900), ("b", 500)):
        made.beat(name, 1, queued(waiting, prefill_rows=1000, prefill_seconds=1.0, running=1))
    assert made.assign(query(100)).replica == "b"
    await clock.advance(0.4)
    first, second = (made._fleet.ahead[0, slot] - clock.now() for slot in (0, 1))
    assert first == pytest.approx(0.9 - 0.4, rel=0.02)
    assert second == pytest.approx(0.5 + 0.1 - 0.4, rel=0.05)


async def test_waiting_prompts_count_less_what_the_cache_spares_them() -> None:
    made, clock = router("a")
    fast = EngineStats(prefill_rows=1000, prefill_seconds=1.0)
    told(made, "a", KEYS, fast)
    made.assign(query(612, keys=hints(KEYS)))
    await clock.advance(0.5)
    made.beat("a", 1, queued(612, waiting=1, prefill_rows=1000, prefill_seconds=1.0))
    assert made._fleet.ahead[0, 0] - clock.now() == pytest.approx(0.1, rel=0.05), "100 are to be computed"
    made.beat("a", 1, queued(80, running=1, prefill_rows=1000, prefill_seconds=1.0))
    assert made._fleet.ahead[0, 0] - clock.now() == pytest.approx(0.08, rel=0.05), "it runs: 80 are left"


def test_lower_priorities_are_not_in_the_way_of_higher_ones() -> None:
    made, _ = router("a", "b")
    made.beat("a", 1, EngineStats(waiting=3, waiting_prefill_tokens=5000))
    made.beat("b", 1, queued(1000, waiting=3))
    assert made.assign(query(10, priority=-1)).replica == "b"
    assert made.assign(query(10)).replica == "a"
    for _ in range(5):
        made.assign(query(2000, priority=-1))
    assert made.assign(query(10)).replica == "a", "grants of a lower class are not, either"


def test_a_full_replica_makes_wait_as_long_as_sequences_stay() -> None:
    made, clock = router("a", "b")
    lease = made.assign(query(1)).lease
    clock._now += 5.0
    for name in ("a", "b"):
        made.beat(name, 1, EngineStats())
    made.release([lease])
    assert made._fleet.stay[0] == 5.0
    made.beat("a", 1, EngineStats(running=64))
    made.beat("b", 1, queued(100, running=1))
    assert made.assign(query(1)).replica == "b"


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
    assert await far.wanted("a", 1) == 0
    assert not await far.beat("a", 1, EngineStats())
    assert await far.register("a", "at:1", 1, INFO, "node")
    assert await far.beat("a", 1, EngineStats(running=2), Changes.of(0, [(Tier.DEVICE, True, KEYS[0])], reset=True))
    assert await far.wanted("a", 1) == 1
    (view,) = await far.replicas()
    assert (view.replica, view.address, view.node, view.info, view.state) == ("a", "at:1", "node", INFO, State.READY)
    assert view.stats.running == 2
    to = await far.assign(query(exclude=(("b", 3),), keys=hints(KEYS)))
    assert (to.replica, to.address, to.epoch) == ("a", "at:1", 1)
    with pytest.raises(Overloaded) as caught:
        await far.assign(query())
    assert caught.value.retry_after_s >= 0.5
    await far.release([to.lease])
    figures = await far.figures()
    assert (figures.decisions["only"], figures.refused, figures.index.taken) == (1, 1, 1)
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
