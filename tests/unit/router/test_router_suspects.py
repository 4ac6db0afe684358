"""Requests under which replicas die: the killer is found, and nobody else is refused."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_stage import Stage, until

from router.local import LocalRouter
from router.port import Assignment, Query
from router.state import Router
from router.suspects import PROBATION_S, Probation, Suspicion
from understudy.errors import Unavailable
from understudy.v1 import inference_pb2 as pb
from workers.engine import EngineInfo, EngineStats, Request


def test_groups_shrink_until_one_is_alone_and_is_refused_the_second_time() -> None:
    one = Suspicion()
    sizes = []
    for crowd in (16, 8, 20, 2):  # of 20 there, 16 came when it was there already: they are suspects of their own
        one.fell(crowd)
        sizes.append(one.together)
    assert sizes == [8, 4, 2, 1]
    assert one.alone == 0
    one.fell(3)
    assert (one.alone, one.guilty) == (1, False)
    one.fell(1)
    assert one.guilty


def test_who_gets_on_is_no_suspect_any_more() -> None:
    one = Suspicion()
    one.fell(1)
    assert (one.together, one.alone) == (1, 1)
    one.clear()
    one.fell(1)
    assert not one.guilty


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=60), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_no_replica_has_more_suspects_than_any_of_them_allows(asks: list[tuple[int, int]], dice: random.Random) -> None:
    probation: Probation[int] = Probation()
    there: dict[int, dict[int, int]] = defaultdict(dict)
    for lease, (slot, together) in enumerate(asks, 1):
        if probation.room(4, together)[slot]:
            probation.enter(lease, slot, together, 0.0)
            there[slot][lease] = together
            assert len(there[slot]) <= min(there[slot].values())
        elif dice.random() < 0.5 and there[slot]:
            gone = dice.choice(sorted(there[slot]))
            del there[slot][gone]
            probation.leave(gone)
    assert len(probation) == sum(map(len, there.values()))
    probation.expire(PROBATION_S + 1)
    assert len(probation) == 0
    assert probation.room(4, 1).all()


class Clock:
    time = 0.0

    def now(self) -> float:
        return self.time


def test_a_router_lets_suspects_in_one_after_the_other() -> None:
    router = Router(Clock())
    info = EngineInfo("m", "f", "n", "a", "float32", 4096, 300, 16, 100, 0, 8, 512)
    router.register("m-0", "a", 1, info)
    suspect, other = Query("m", 4, together=2), Query("m", 4)
    first, second = router.assign(suspect), router.assign(suspect)
    with pytest.raises(Unavailable, match="are being tried first"):
        router.assign(suspect)
    assert router.assign(other).replica == "m-0", "who is no suspect does not wait"
    assert router.figures().suspects == 2
    router.clear([first.lease])
    third = router.assign(suspect)
    router.release([second.lease, third.lease])
    assert router.figures().suspects == 0
    router.assign(Query("m", 4, together=1))
    router.register("m-0", "a", 2, info)
    assert router.figures().suspects == 0, "that life is over"


LENGTH = 40


def request_of(text: str, id: str = "") -> pb.GenerateRequest:
    stopping = pb.Stopping(max_tokens=LENGTH, ignore_eos=True)
    return pb.GenerateRequest(text=text, request_id=id, stopping=stopping, sampling=pb.Sampling(seed=11))


class Mortal:
    """Replicas that die whenever they are to make token `at` of the poisonous prompt, and come back at once."""

    def __init__(self, stage: Stage, replicas: int, at: int) -> None:
        self.stage, self.at = stage, at
        self.deaths = 0
        self._here = asyncio.get_running_loop()
        for i in range(replicas):
            self._add(f"r{i}", 1)

    def _add(self, name: str, epoch: int) -> None:
        def fatal(request: Request, made: int) -> bool:
            if bytes(request.prompt).endswith(b"poison") and made >= self.at:
                self._here.call_soon_threadsafe(self._bury, name, epoch)
                return True
            return False

        self.stage.add_replica(name, epoch=epoch, fatal=fatal, step_s=0.001)

    def _bury(self, name: str, epoch: int) -> None:
        self.deaths += 1
        self.stage.replicas[name].kill()
        self._add(name, epoch + 1)


@pytest.mark.parametrize("at", [0, 10])
@pytest.mark.parametrize("replicas", [1, 2, 3])
async def test_the_killer_alone_is_refused_and_its_mates_never_notice(stage: Stage, at: int, replicas: int) -> None:
    mortal = Mortal(stage, replicas, at)
    await stage.open()
    good = [request_of(f"good {i}") for i in range(12)]

    async def kill() -> str:
        _, message, info, _ = await stage.refused(
            text="poison", request_id="the-killer", stopping=good[0].stopping, sampling=good[0].sampling
        )
        assert "request the-killer is not tried again" in message
        return info.reason

    answers = await asyncio.gather(kill(), *(stage.generate(r) for r in good))
    assert answers.pop(0) == "INTERNAL"
    assert all(a.reason == "LENGTH" and len(a.ids) == LENGTH for a in answers)
    again = await asyncio.gather(*(stage.generate(r) for r in good))
    assert [a.ids for a in answers] == [a.ids for a in again]
    assert 2 <= mortal.deaths <= 8
    await until(lambda: stage.router.router.figures().suspects == 0)


def test_a_gateway_alone_keeps_its_own_suspects_apart() -> None:
    """Each has one replica for itself, as far as they reach; nobody counts as alone."""
    clock = Clock()
    pool = Wires("m-0", "m-1")
    local = LocalRouter(pool, random.Random(0), clock)  # type: ignore[arg-type]

    def ask(together: int) -> Assignment:
        return asyncio.run(local.assign(Query("m", 4, together=together)))

    first, second = ask(1), ask(1)
    assert {first.replica, second.replica} == {"m-0", "m-1"}
    assert first.lease != second.lease
    assert max(first.lease, second.lease) < 0
    with pytest.raises(Unavailable, match="are being tried first"):
        ask(2)
    assert ask(0).replica, "who is no suspect does not wait"
    asyncio.run(local.clear([first.lease]))
    third = ask(2)
    assert third.replica == first.replica
    pool.links[0].epoch = pool.links[1].epoch = 2
    assert {ask(1).replica, ask(1).replica} == {"m-0", "m-1"}, "those lives are over"
    clock.time = PROBATION_S + 1
    assert ask(1).replica


def test_nobody_counts_as_alone_where_others_were_not_kept_away() -> None:
    one = Suspicion()
    for _ in range(5):
        one.fell(1, apart=False)
    assert (one.together, one.guilty) == (1, False)


class Wires:
    """Stands for a pool with these replicas' wires."""

    def __init__(self, *names: str) -> None:
        info = EngineInfo("m", "f", "n", "a", "float32", 4096, 300, 16, 100, 0, 8, 512)
        self.links = [
            SimpleNamespace(replica=n, epoch=1, info=info, stats=EngineStats(), attempts=0, silent_s=0.0) for n in names
        ]

    def alive(self) -> list[SimpleNamespace]:
        return self.links


@pytest.mark.parametrize("deaths", [1, 2, 3])
async def test_nobody_is_refused_for_what_happened_without_a_router(stage: Stage, deaths: int) -> None:
    """A killer goes about while the router is away, and is found out when that is back."""
    mortal = Mortal(stage, 3, 10)
    await stage.open()
    good = [request_of(f"good {i}") for i in range(8)]
    expected = await asyncio.gather(*(stage.generate(r) for r in good))
    await until(lambda: len(stage.gateway.pool.alive()) == 3)
    stage.router.reachable = False

    async def come_back() -> None:
        await until(lambda: mortal.deaths >= deaths)
        stage.router.reachable = True

    killing = stage.refused(
        text="poison", request_id="the-killer", stopping=good[0].stopping, sampling=good[0].sampling
    )
    refusal, _, *answers = await asyncio.gather(killing, come_back(), *(stage.generate(r) for r in good))
    assert refusal[2].reason == "INTERNAL"
    assert [a.ids for a in answers] == [a.ids for a in expected]
    assert mortal.deaths >= deaths + 2, "what it was alone for while nobody kept others away does not count"


async def test_the_end_of_a_life_counts_once(stage: Stage) -> None:
    """A rank is lost: a step fails, the request comes back to the only replica there is, and that one is ended."""
    gate = stage.gate()
    engine: Any = stage.add_replica("r0", sleep=gate, step_s=0.001).engine
    await stage.open()
    asking = asyncio.ensure_future(stage.generate(request_of("good")))
    await until(lambda: engine._running)
    (first,) = engine._running
    engine.fail_sequence(first, "the group broke")
    gate.let(1)
    await until(lambda: engine._running and first not in engine._running)
    stage.replicas["r0"].kill()
    gate.open()
    stage.add_replica("r0", epoch=2)
    answer = await asking
    assert (answer.reason, len(answer.ids)) == ("LENGTH", LENGTH)
