"""Who waits for a load, and for how long: the policy, with a clock that stands and a store that answers when told."""

from __future__ import annotations

from collections.abc import Sequence as Many

import pytest

from workers.cache.events import Observer, Tier
from workers.cache.keys import root_key
from workers.cache.manager import CacheManager
from workers.cache.orders import NEVER, Arrived, Found, StoreCounts
from workers.cache.rates import PROBE_S
from workers.engine.contract import EngineStats, Request
from workers.engine.loads import FIRST_BYTES, PATIENCE, Loads
from workers.engine.plan import StepPlan
from workers.engine.sequence import Sequence

P = 16
BLOCK_BYTES = 1 << 20
COMPUTE = 1000.0  # tokens per second


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Port:
    """Answers when the test says so."""

    def __init__(self, rate: float) -> None:
        self.block_bytes: Many[int] = (BLOCK_BYTES,)
        self.counts = StoreCounts()
        self.reachable, self.gathers = True, False
        self.events: list[Found | Arrived] = []
        self.searches: list[tuple[int, Many[tuple[bytes, tuple[int, ...]]]]] = []
        self.in_host: set[bytes] = set()
        self.waited: list[float] = []
        self._rate, self.latency = rate, 0.002

    def has_host(self, key: bytes, group: int) -> bool:
        return key in self.in_host

    def find(self, ticket: int, wanted: Many[tuple[bytes, tuple[int, ...]]]) -> None:
        self.searches.append((ticket, wanted))

    def poll(self) -> list[Found | Arrived]:
        events, self.events = self.events, []
        return events

    def wait(self, timeout_s: float) -> None:
        self.waited.append(timeout_s)

    def rate(self, tier: Tier) -> float:
        return self._rate

    def faster(self, times: float) -> None:
        self._rate *= times

    def latency_s(self) -> float:
        return self.latency

    def observe(self, observer: Observer) -> None: ...

    def close(self) -> None: ...


class Everything(set[bytes]):
    def __contains__(self, _key: object) -> bool:
        return True


class Stage:
    def __init__(self, rate: float = 1e9, blocks: int = 256) -> None:
        self.clock, self.port = Clock(), Port(rate)
        self.cache = CacheManager([blocks], [None], P)
        self.counts = EngineStats()
        self.loads = Loads(self.port, self.cache, self.counts, self.clock)
        self.loads.compute.add(1e6, 1e6 / COMPUTE)
        self.tables = []

    def admit(self, tokens: int = 64 * P + 1, first: int = 0) -> Sequence:
        request = Request("r", list(range(first, first + tokens)), 8)
        s = Sequence(request, (0, 0), root_key("m", "d", "n"), self.cache.open(), list(request.prompt))
        s.computed = self.cache.match(s.table, s.root, s.tokens)
        s.cached, s.running = s.computed, True
        self.loads.begin(s, 0)
        return s

    def found(self, count: int) -> None:
        """The store has the first `count` of the keys that it was asked for."""
        ticket, wanted = self.port.searches.pop()
        self.port.events.append(Found(ticket, [(i < count,) for i in range(len(wanted))]))
        self.loads.poll()

    def arrive(self, s: Sequence, indices: Many[int], ok: bool = True) -> None:
        assert s.load is not None
        self.port.events += [Arrived(s.load.number, i, ok, Tier.STORE) for i in indices]
        self.loads.poll()

    def plan(self) -> StepPlan:
        plan = StepPlan(0)
        self.loads.orders(plan)
        return plan

    def compute(self, s: Sequence, rows: int) -> int:
        """What a step would do with `rows` rows of room."""
        rows = self.loads.limit(s, min(rows, s.left))
        if rows:
            self.cache.allocate(s.table, s.computed + rows)
            s.computed += rows
            self.cache.register(s.table, s.root, s.tokens, s.computed)
        return rows

    def end(self, *sequences: Sequence) -> None:
        for s in sequences:
            self.loads.drop(s)
            self.cache.close(s.table)
        self.loads.check_idle()
        self.cache.check_idle()


def test_a_fast_store_is_waited_for():
    stage = Stage(rate=1e9)  # a block in 1 ms, computed in 16
    s = stage.admit()
    assert stage.compute(s, 512) == 0  # while it is asked
    stage.found(64)
    assert stage.compute(s, 512) == 0
    (load,) = stage.plan().loads
    assert [f.index for f in load.fetches] == list(range(63, -1, -1))
    stage.arrive(s, range(63, 10, -1))
    assert (stage.compute(s, 512), s.computed) == (0, 0)  # a block's worth of rows would take longer than the rest
    stage.arrive(s, range(10, -1, -1))
    assert s.computed == 64 * P
    assert s.load is None
    assert stage.compute(s, 512) == 1
    assert s.loaded == [0, 0, 64 * P]
    assert stage.counts.store_hit_tokens == 64 * P
    stage.end(s)


def test_a_slow_store_is_met_in_the_middle():
    rate = BLOCK_BYTES * COMPUTE / P  # as fast as computing
    stage = Stage(rate=rate)
    s = stage.admit()
    stage.found(64)
    rows = stage.compute(s, 512)
    assert rows == 32 * P  # the other half will be there by then
    assert stage.plan().floors == [(s.load.number, 32)]
    stage.arrive(s, range(63, 31, -1))
    assert s.computed == 64 * P
    assert stage.counts.store_hit_tokens == 32 * P
    assert stage.counts.store_loads_given_up == 0
    stage.end(s)


# Nothing would come in time; all of it much later than it is computed.
@pytest.mark.parametrize("rate", [BLOCK_BYTES, BLOCK_BYTES * COMPUTE / P / 8])
def test_a_much_slower_store_is_only_measured_now_and_then(rate: float):
    stage, shift = Stage(rate=rate), 0

    def asked() -> bool:
        nonlocal shift
        shift += 10_000
        s = stage.admit(first=shift)
        stage.found(64)
        loads = stage.plan().loads
        assert stage.compute(s, 512) == 512, "and nobody waits for it"
        stage.end(s)
        return bool(loads)

    assert [asked() for _ in range(3)] == [True, False, False]
    stage.clock.now += PROBE_S
    assert [asked() for _ in range(3)] == [True, False, False]
    stage.port.faster(1.5)
    assert [asked() for _ in range(3)] == [True, False, False], "it got better: it may be still better"
    stage.port.faster(1000.0)
    assert [asked_and_waited(stage, 10_000 * (20 + i)) for i in range(2)] == [True, True]


def test_a_store_that_answers_late_is_asked_now_and_then():
    stage = Stage()
    s = stage.admit()
    spared = (s.left - 1) / COMPUTE
    stage.end(s)
    stage.port.searches.clear()

    def asked(first: int) -> bool:
        s = stage.admit(first=first)
        if found := bool(stage.port.searches):
            assert stage.compute(s, 512) == 512, "and nobody waits for its answer"
            stage.port.searches.clear()
        stage.end(s)
        return found

    stage.port.latency = spared
    assert [asked(i) for i in (10_000, 20_000, 30_000)] == [True, False, False]
    stage.clock.now += PROBE_S
    assert [asked(i) for i in (40_000, 50_000)] == [True, False]
    stage.port.latency = spared * 0.6
    assert [asked(i) for i in (60_000, 70_000)] == [True, False], "it got better: it may be still better"


def asked_and_waited(stage: Stage, shift: int) -> bool:
    s = stage.admit(first=shift)
    stage.found(64)
    asked, rows = bool(stage.plan().loads), stage.compute(s, 512)
    stage.end(s)
    return asked and rows == 0


def test_what_host_memory_has_comes_however_slow_the_store_is():
    stage = Stage(rate=1.0)
    stage.port.in_host = Everything()
    s = stage.admit()
    assert s.load is not None
    assert len(stage.plan().loads) == 1
    stage.end(s)


def test_silence_costs_patience_and_no_more():
    stage = Stage(rate=1e9)
    s = stage.admit()
    begun = stage.clock.now
    spared = 64 * P / COMPUTE
    while not stage.compute(s, 512):  # nobody says whether anything is there
        stage.clock.now += 0.001
    assert stage.clock.now - begun <= PATIENCE * spared + 0.001
    assert s.computed == 512
    stage.found(64)  # late: what is left of it is still taken
    assert s.load is not None
    first = stage.plan().loads[0].fetches[-1].index
    assert first == 32
    waiting = stage.clock.now
    while not stage.compute(s, 512):
        stage.clock.now += 0.001
    assert stage.clock.now - waiting <= PATIENCE * spared + FIRST_BYTES / 1e9 + 0.001
    assert s.computed == 64 * P
    assert stage.counts.store_loads_given_up == 1
    stage.end(s)


def test_what_computing_overtakes_is_not_written_any_more():
    stage = Stage(rate=1e9)
    s = stage.admit()
    stage.found(64)
    stage.plan()
    stage.clock.now += 10
    assert stage.compute(s, 100) == 100
    number = s.load.number
    assert stage.plan().floors == [(number, 7)]
    stage.arrive(s, [6, 3])  # too late: those are not used
    assert s.computed == 100
    stage.arrive(s, range(63, 6, -1))
    assert s.computed == 100  # in the middle of a block
    assert stage.compute(s, 512) == 12  # up to what was loaded
    stage.loads.poll()
    assert s.computed == 64 * P
    stage.end(s)


def test_a_block_that_failed_is_computed_and_the_others_are_used():
    stage = Stage(rate=1e9)
    s = stage.admit()
    stage.found(64)
    stage.arrive(s, [20], ok=False)
    stage.arrive(s, [i for i in range(63, -1, -1) if i != 20])
    assert s.computed == 20 * P
    assert stage.compute(s, 512) == P
    stage.loads.poll()
    assert s.computed == 64 * P
    assert s.load is None
    stage.end(s)


def test_only_what_is_there_is_loaded():
    stage = Stage()
    a = stage.admit()
    stage.found(10)
    assert len(stage.plan().loads[0].fetches) == 10
    b = stage.admit(first=5000)
    stage.found(0)
    assert b.load is None
    c = stage.admit(first=9000)
    stage.port.in_host.update(c.table.keys[:30])
    d = stage.admit(first=9000)
    assert len(stage.port.searches[-1][1]) == 34  # host memory has the others
    stage.found(0)
    assert len(stage.plan().loads[0].fetches) == 30
    stage.end(a, b, c, d)


def test_whoever_leaves_takes_the_load_along():
    stage = Stage()
    s = stage.admit()
    stage.found(64)
    number = s.load.number
    stage.plan()
    stage.loads.drop(s)
    assert stage.loads.pending
    assert stage.plan().floors == [(number, NEVER)]
    stage.port.events = [Arrived(number, 63, True, Tier.STORE)]
    stage.loads.poll()
    stage.end(s)


def test_another_with_the_same_prompt_waits_for_the_first():
    stage = Stage()
    a = stage.admit()
    stage.found(64)
    b = Sequence(a.request, (0, 1), a.root, stage.cache.open(), list(a.tokens))
    assert stage.cache.match(b.table, b.root, b.tokens) == 0
    assert stage.loads.covers(b, 0)
    stage.clock.now += 10  # not for ever
    assert not stage.loads.covers(b, 0)
    stage.end(a, b)


def test_without_room_nothing_is_loaded():
    stage = Stage(blocks=40)
    s = stage.admit()
    stage.found(64)
    assert s.load is None
    assert stage.plan().loads == []
    stage.end(s)


@pytest.mark.parametrize("tokens", [1, P, P + 1])
def test_the_last_token_is_always_computed(tokens: int):
    stage = Stage()
    s = stage.admit(tokens)
    if tokens <= P:
        assert s.load is None
        assert not stage.port.searches
    else:
        stage.found(1)
        stage.arrive(s, [0])
        assert s.left == 1
    stage.end(s)


def test_a_breaker_that_is_open_is_not_asked():
    stage = Stage()
    stage.port.reachable = False
    s = stage.admit()
    assert s.load is None
    assert stage.compute(s, 512) == 512
    stage.end(s)
