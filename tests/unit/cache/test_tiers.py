"""One rank's tiers over a real Redis: what is saved comes back, and whatever is wrong with it is a miss."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator

import pytest
from paged_runner import TokenCache
from redis_server import TestRedis
from tier_stage import Rank, keys_of

from workers.cache import values
from workers.cache.events import Tier
from workers.cache.orders import NEVER, Arrived
from workers.cache.values import HEADER_BYTES, Seal, value_name


@pytest.fixture(scope="module")
def server() -> Iterator[TestRedis]:
    with TestRedis() as server:
        yield server


@pytest.fixture
def redis(server: TestRedis) -> TestRedis:
    client = server.client()
    client.flushall()
    client.config_set("maxmemory", 0)
    client.close()
    return server


def test_what_one_rank_saves_another_loads(redis: TestRedis):
    keys = keys_of(20)
    with Rank(redis.url) as a, Rank(redis.url) as b:
        a.save(keys)
        a.settle()
        assert a.store.counts.store_written_bytes == 20 * 2 * (HEADER_BYTES + TokenCache.value_bytes)
        assert b.find([*keys, b"?" * 32]) == [(True,)] * 20 + [(False,)]
        assert all(e.ok and e.tier is Tier.STORE for e in b.load(keys))
        assert b.store.counts.store_loaded_bytes == a.store.counts.store_written_bytes
        a.save(keys)  # they are there: nothing is written twice
        b.save(keys)
        a.settle()
        b.settle()
        assert a.store.counts.store_written_bytes == b.store.counts.store_loaded_bytes
        assert b.store.counts.store_written_bytes == 0


def test_host_memory_comes_first_and_is_filled_by_loads(redis: TestRedis):
    keys = keys_of(8)
    with Rank(redis.url, 1 << 20) as a, Rank(redis.url, 1 << 20) as b:
        a.save(keys)
        a.settle()
        assert all(e.ok and e.tier is Tier.HOST for e in a.load(keys))
        assert all(e.ok and e.tier is Tier.STORE for e in b.load(keys))
        assert all(b.store.has_host(key, 0) for key in keys)
        assert all(e.ok and e.tier is Tier.HOST for e in b.load(keys))


def test_host_memory_is_bounded():
    size = 2 * (HEADER_BYTES + TokenCache.value_bytes)
    with Rank(host_bytes=300 * size) as rank:  # more than the least
        assert rank.store.host.slots == 300
        keys = keys_of(400)
        for at in range(0, 400, 16):
            rank.save(keys[at : at + 16])
        assert [rank.store.has_host(key, 0) for key in keys] == [False] * 100 + [True] * 300
        assert all(e.ok for e in rank.load(keys[100:108]))  # used now: the next go first
        rank.save(keys_of(8, seed=1))
        assert [rank.store.has_host(key, 0) for key in keys[100:117]] == [True] * 8 + [False] * 8 + [True]


def test_others_are_told_what_is_where(redis: TestRedis):
    keys, said = keys_of(3), []
    with Rank(redis.url, 1 << 20, groups=2) as rank:
        rank.store.observe(lambda *event: said.append(event))
        rank.save(keys, groups=(0, 1))
        rank.settle()
        rank.store.poll()
        assert said == [(tier, True, key) for tier in (Tier.HOST, Tier.STORE) for key in keys]
        said.clear()
        client = redis.client()
        client.delete(value_name(keys[1], 0, 1))
        assert rank.find(keys) == [(True,), (False,), (True,)]
        rank.store.poll()
        assert said == [(Tier.STORE, False, keys[1])]


def test_a_head_less_is_a_block_less(redis: TestRedis):
    keys = keys_of(6)
    with Rank(redis.url, groups=2) as a, Rank(redis.url, groups=2) as b:
        a.save(keys, groups=(0, 1))
        a.settle()
        client = redis.client()
        client.delete(value_name(keys[2], 0, 1), value_name(keys[4], 1, 0))
        assert b.find(keys, (0, 1)) == [(i != 2, i != 4) for i in range(6)]
        assert [e.ok for e in b.load(keys, (0, 1))] == [i not in (2, 4) for i in range(6)]
        assert [e.ok for e in b.load(keys, (1,))] == [i != 4 for i in range(6)]
        assert b.store.counts.store_misses == 3


def damaged(rng: random.Random, value: bytes, other: bytes, older: bytes, numerics: bytes) -> bytes:
    """A value that is not what it was, in one of the ways in which values go wrong."""
    kind = rng.randrange(6)
    if kind == 0:
        flipped = bytearray(value)
        flipped[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 1:
        return value[: rng.randrange(len(value))]
    if kind == 2:
        return value + rng.randbytes(rng.randrange(1, 100))
    return (other, older, numerics)[kind - 3]


def test_ten_thousand_damaged_values(redis: TestRedis, monkeypatch: pytest.MonkeyPatch):
    """Flipped bits, cut short, too long, another's, of an older layout, of another model under this one's name."""
    rng, client = random.Random(5), redis.client()
    keys = keys_of(32)
    count = 0
    with Rank(redis.url) as a, Rank(redis.url) as b:
        a.save(keys)
        a.settle()
        names = {(key, head): value_name(key, 0, head) for key in keys for head in range(2)}
        good = dict(zip(names, client.mget(list(names.values())), strict=True))
        monkeypatch.setattr(values, "LAYOUT_VERSION", values.LAYOUT_VERSION - 1)
        older = {}
        for (key, head), value in good.items():
            old = bytearray(value)
            Seal().write(memoryview(old), key, 0, head)
            older[key, head] = bytes(old)
        monkeypatch.undo()
        foreign = {}
        for (key, head), value in good.items():
            other = bytearray(value)
            Seal().write(memoryview(other), bytes(31) + b"x", 0, head)  # its key is another's, as another model's is
            foreign[key, head] = bytes(other)
        before = 0
        while count < 10_000:
            broken = {
                name: damaged(rng, value, good[rng.choice([k for k in good if k != name])], older[name], foreign[name])
                for name, value in good.items()
                if rng.random() < 0.6
            }
            client.mset({names[name]: broken.get(name, value) for name, value in good.items()})
            arrived = b.load(keys)
            assert [e.ok for e in arrived] == [not any((key, h) in broken for h in range(2)) for key in keys]
            count += len(broken)
            assert b.store.counts.store_bad_values - before == len(broken)
            before = b.store.counts.store_bad_values
        assert b.store.counts.store_misses == 0
        # What was found to be wrong is written over when it is computed again.
        client.mset(dict.fromkeys(names.values(), b"nothing"))
        assert not any(e.ok for e in b.load(keys))
        b.save(keys)
        b.settle()
        assert all(e.ok for e in a.load(keys))


def test_another_clusters_values_are_misses(redis: TestRedis):
    keys = keys_of(4)
    with Rank(redis.url, secret=b"one cluster's secret") as a, Rank(redis.url, secret=b"and another one's") as b:
        a.save(keys)
        a.settle()
        assert not any(e.ok for e in b.load(keys))
        assert b.store.counts.store_bad_values == 8
        assert all(e.ok for e in a.load(keys))


def test_a_load_that_is_given_up_writes_nothing_more(redis: TestRedis):
    keys = keys_of(30)
    with Rank(redis.url) as a, Rank(redis.url, timeout_s=10.0) as b:
        a.save(keys)
        a.settle()
        assert b.find(keys[:1]) == [(True,)]
        redis.signal(signal.SIGSTOP)
        try:
            number = b.begin(keys)
            b.store.apply([(number, 20)], [], [])
            other = b.begin(keys[:4])
            b.store.apply([(other, NEVER)], [], [])
            b.memory[0][32:] = -2  # somebody else's now
        finally:
            redis.signal(signal.SIGCONT)
        b.settle()
        ok = {(e.number, e.index) for e in b.store.poll() if isinstance(e, Arrived) and e.ok}
        assert ok == {(number, i) for i in range(20, 30)}
        assert (b.memory[0][32:52] == -2).all()


def test_redis_that_is_gone_and_comes_back(redis: TestRedis):
    keys = keys_of(10)
    with Rank(redis.url) as a, Rank(redis.url) as b:
        a.save(keys)
        a.settle()
        redis.kill()
        assert not any(e.ok for e in b.load(keys))
        assert b.find(keys) == [(False,)] * 10
        assert b.store.counts.store_failures >= 1
        assert not b.store.reachable
        a.save(keys_of(5, seed=2))
        a.settle()
        assert a.store.counts.store_writes_dropped == 5
        redis.start()
        back = False
        while not back:  # the breaker lets somebody try before long
            a.save(keys)
            a.settle()
            back = b.find(keys) == [(True,)] * 10
        assert all(e.ok for e in b.load(keys))
        assert b.store.reachable


def test_redis_that_is_full(redis: TestRedis):
    client = redis.client()
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    keys = keys_of(5)
    with Rank(redis.url) as a:
        a.save(keys)
        a.settle()
        assert a.store.counts.store_writes_dropped == 5
        assert a.store.counts.store_failures == 0
        assert a.find(keys) == [(False,)] * 5
        client.config_set("maxmemory", 0)
        while a.find(keys) != [(True,)] * 5:
            a.save(keys)
            a.settle()


def test_a_writer_that_falls_behind_drops(redis: TestRedis):
    with Rank(redis.url, timeout_s=10.0) as a:
        a.save(keys_of(1))
        a.settle()
        redis.signal(signal.SIGSTOP)
        try:
            for seed in range(40):
                a.save(keys_of(16, seed=seed + 1))  # never blocks
            assert a.store.counts.store_writes_dropped > 100
        finally:
            redis.signal(signal.SIGCONT)
        a.settle()
        written = a.store.counts.store_written_bytes // (2 * (HEADER_BYTES + TokenCache.value_bytes))
        assert written + a.store.counts.store_writes_dropped == 641


def test_an_unreachable_redis_is_no_error_at_the_start():
    with Rank("redis://127.0.0.1:1", timeout_s=0.2) as rank:
        rank.save(keys_of(3))
        assert rank.find(keys_of(3)) == [(False,)] * 3
        rank.settle()
        assert rank.store.counts.store_writes_dropped == 3
