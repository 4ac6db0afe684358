"""An engine with tiers behind its cache: what is loaded is what would have been computed, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from paged_runner import BLOCK, PagedRunner, paged_engine
from redis_server import TestRedis

from workers.cache.orders import StoreConfig
from workers.engine.contract import FinishReason, Request, Sampling, SequenceOutput
from workers.engine.core import EngineCore

HOST = 1 << 20
WAIT = 1e6  # patience: always until the store has answered


@pytest.fixture(scope="module")
def redis() -> Iterator[TestRedis]:
    with TestRedis() as server:
        yield server


@pytest.fixture
def url(redis: TestRedis) -> str:
    client = redis.client()
    client.flushall()
    client.close()
    return redis.url


def run(engine: EngineCore, *requests: Request) -> dict[str, list[SequenceOutput]]:
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[SequenceOutput]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        engine.check()
    return outputs


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    assert outputs[-1].finish is FinishReason.LENGTH, outputs[-1].error
    return [token for output in outputs for token in output.token_ids]


def cached(outputs: list[SequenceOutput]) -> tuple[int | None, int, int]:
    return outputs[0].cached_tokens, outputs[0].cached_host, outputs[0].cached_store


def settle(runner: PagedRunner) -> None:
    """Until everything is written that waits."""
    store = runner.store
    assert store is not None
    while store.busy:
        store.wait(0.001)


def close(engine: EngineCore, runner: PagedRunner) -> None:
    engine.check_idle()
    store = runner.store
    assert store is not None
    engine.close()
    store.host.check()


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(50), k=length)


def request(id: str, prompt: list[int], made: int = 20, **rest: object) -> Request:
    return Request(id, prompt, made, Sampling(seed=7), **rest)


WINDOWS = [None], [None, 40], [20], [33, None, 64]


@pytest.mark.parametrize("windows", WINDOWS)
def test_another_engine_finds_what_one_has_computed(url: str, windows: list[int | None]):
    config = StoreConfig(url=url, timeout_s=30.0)
    first, its = paged_engine(64, windows, store=config, patience=WAIT)
    second, others = paged_engine(64, windows, store=config, patience=WAIT)
    plain, _ = paged_engine(64, windows)
    a = request("a", prompt(1, 200))
    want = tokens(run(plain, a)["a"])
    assert tokens(run(first, a)["a"]) == want
    settle(its)
    outputs = run(second, a)["a"]
    assert tokens(outputs) == want
    assert cached(outputs) == (0, 0, 192)
    computed = sum(rows for plan in others.plans for _, start, rows, _ in plan if start < 200)
    assert computed == 8
    # Blocks of the answer are there too: a later turn finds them.
    turn = request("b", [*a.prompt, *want, 3, 4, 5])
    third, last = paged_engine(64, windows, store=config, patience=WAIT)
    outputs = run(third, turn)["b"]
    assert cached(outputs)[2] == (200 + 19) // BLOCK * BLOCK
    assert tokens(outputs) == tokens(run(plain, turn)["b"])
    for engine, runner in ((first, its), (second, others), (third, last)):
        close(engine, runner)


@pytest.mark.parametrize("windows", WINDOWS)
def test_host_memory_has_what_the_device_had(windows: list[int | None]):
    engine, runner = paged_engine(16, windows, store=StoreConfig(host_bytes=HOST), patience=WAIT)
    plain, _ = paged_engine(16, windows)
    a, others = request("a", prompt(1, 100)), [request(f"o{i}", prompt(10 + i, 150)) for i in range(4)]
    want = tokens(run(plain, a)["a"])
    run(engine, a)
    for other in others:  # they take the blocks of a
        run(engine, other)
    outputs = run(engine, a)["a"]
    assert tokens(outputs) == want
    assert cached(outputs) == (0, 96, 0)
    assert engine.stats().host_hit_tokens == 96
    close(engine, runner)
