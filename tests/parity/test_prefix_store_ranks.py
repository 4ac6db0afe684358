"""What one tensor-parallel degree has stored another finds: values belong to no layout."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest
import transformers
from ranks import on_ranks, shared_groups
from redis_server import TestRedis

from workers.cache.manager import CacheManager
from workers.cache.orders import StoreConfig
from workers.engine.build import open_store
from workers.engine.contract import EngineConfig, EngineInfo, Request, Sampling
from workers.engine.core import EngineCore
from workers.engine.runner import Runner
from workers.kernels.build import BuildError
from workers.kernels.build import load as load_library
from workers.kernels.ops import BLOCK
from workers.parallel.group import ALONE

BLOCKS = 30


@pytest.fixture(scope="module")
def redis() -> Iterator[TestRedis]:
    try:
        load_library()
    except BuildError as reason:
        pytest.skip(str(reason))
    with TestRedis() as server:
        yield server


@contextmanager
def engine(path: Path, ranks: int, url: str | None) -> Iterator[tuple[EngineCore, list[Runner]]]:
    """An engine over so many ranks, each a thread with a store of its own."""
    store = None if url is None else StoreConfig(host_bytes=1 << 17, url=url, timeout_s=60.0)
    config = EngineConfig(
        str(path), kernels="native", threads=1, max_running=4, tensor_parallel=ranks, tensor_parallel_invariant=True,
        store=store,
    )  # fmt: skip
    with ExitStack() as stack:
        groups = stack.enter_context(shared_groups(ranks, limit_s=120.0)) if ranks > 1 else [ALONE]
        runners = on_ranks(groups, lambda group: Runner.from_checkpoint(config, group=group))
        for runner in runners:
            runner.store = open_store(config, runner)
        threads = [threading.Thread(target=runner.follow) for runner in runners[1:]]
        for thread in threads:
            thread.start()
        its = runners[0].info
        info = EngineInfo("m", its.model_fingerprint, its.numerics_id, "", its.dtype, 160, 160, BLOCK, 30, 0, 4, 48)
        cache = CacheManager([BLOCKS] * len(its.windows), its.windows, BLOCK, prefix_cache=url is not None)
        core = EngineCore(runners[0], info, cache, runners[0].ops, store=runners[0].store, patience=1e6)
        try:
            yield core, runners
        finally:
            core.close()
            for thread in threads:
                thread.join(60)
            for runner in runners[1:]:
                runner.close()
        assert not any(thread.is_alive() for thread in threads)
        for runner in runners:
            if runner.store is not None:
                runner.store.host.check()


def play(core: EngineCore, runners: list[Runner], requests: list[Request]) -> dict[str, tuple]:
    said: dict[str, list] = {r.id: [[], []] for r in requests}
    for request in requests:
        core.add(request)
    while core.has_work():
        for output in core.step():
            assert not output.error
            said[output.id][0] += output.token_ids
            said[output.id][1] += [msgspec.msgpack.encode(p) for p in output.logprobs or []]
    core.check_idle()
    for runner in runners:
        while runner.store is not None and runner.store.busy:
            runner.store.wait(0.001)
    return {id: tuple(map(tuple, parts)) for id, parts in said.items()}


def requests_of(seed: int) -> list[Request]:
    rng = random.Random(seed)
    trunk = rng.choices(range(160), k=70)
    tails = [rng.choices(range(160), k=rng.randrange(1, 60)) for _ in range(3)]
    return [
        Request(f"{seed}/{i}", trunk + tail, 6, Sampling(temperature=0.7, seed=i), logprobs=1)
        for i, tail in enumerate(tails)
    ]


@pytest.mark.parametrize("case", ["llama-gqa", "qwen2-two-groups", "deepseek-v3"])
def test_degrees_share(
    redis: TestRedis, written: Callable[[str], tuple[transformers.PreTrainedModel, Path]], case: str
) -> None:
    path = written(case)[1]
    want = {}
    with engine(path, 1, None) as (core, runners):
        for seed in range(4):
            want[seed] = play(core, runners, requests_of(seed))
    for turn, ranks in enumerate((1, 2, 4, 1)):
        with engine(path, ranks, redis.url) as (core, runners):
            for seed in range(turn):  # what the degrees before have written, and what they have read
                assert play(core, runners, requests_of(seed)) == want[seed]
                stats = core.stats()
                assert stats.store_bad_values == stats.store_failures == 0
                assert stats.store_hit_tokens >= (seed + 1) * 64, f"{ranks} ranks find what others wrote"
            assert play(core, runners, requests_of(turn)) == want[turn]


def test_what_one_rank_lacks_is_a_miss_for_all(
    redis: TestRedis, written: Callable[[str], tuple[transformers.PreTrainedModel, Path]]
) -> None:
    path = written("llama-gqa")[1]
    requests = requests_of(99)
    with engine(path, 1, redis.url) as (core, runners):
        want = play(core, runners, requests)
    client = redis.client()
    names = sorted(n for n in client.keys("ukv*:1"))  # of head 1, which only the second rank holds
    for name in names[::2]:
        value = bytearray(client.get(name))
        value[-1] ^= 1
        client.set(name, bytes(value))
    with engine(path, 2, redis.url) as (core, runners):
        assert play(core, runners, requests) == want
        assert runners[0].store.counts.store_bad_values == 0
        assert runners[1].store.counts.store_bad_values > 0
