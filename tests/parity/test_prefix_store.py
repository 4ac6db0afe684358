"""What comes from a tier is what would have been computed, to the bit: random families of prompts on real kernels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import transformers
from checkpoints import open_runner
from redis_server import TestRedis

from workers.cache.manager import CacheManager
from workers.cache.orders import StoreConfig
from workers.cache.store import BlockStore, main_group
from workers.engine.contract import EngineInfo, Request, Sampling
from workers.engine.core import EngineCore
from workers.kernels.ops import BLOCK

FAMILIES = 60  # of each case: 300 in all
CASES = ["llama-gqa", "qwen2-two-groups", "gemma3", "deepseek-v3", "phi3-longrope-long-prompt"]
VOCAB, CONTEXT, MADE = 160, 128, 4


@pytest.fixture(scope="module")
def redis() -> Iterator[TestRedis]:
    with TestRedis() as server:
        yield server


class Replica:
    """An engine with a small cache; `store` is what lies behind it."""

    def __init__(self, path: Path, store: StoreConfig | None) -> None:
        runner = open_runner(path, "native")
        its = runner.info
        info = EngineInfo(
            "m", its.model_fingerprint, its.numerics_id, "", its.dtype, CONTEXT, VOCAB, BLOCK, 24, 0, 3, 40
        )  # fmt: skip
        cache = CacheManager([24] * len(its.windows), its.windows, BLOCK, prefix_cache=store is not None)
        if store is not None:
            runner.store = BlockStore(runner.caches, store, main=main_group(its.windows))
        self.store = runner.store
        self.engine = EngineCore(
            runner, info, cache, runner.ops, long_prompt=its.long_prompt, store=runner.store, patience=1e6
        )

    def play(self, requests: list[Request]) -> dict[str, tuple]:
        """Tokens and logprobs of every request, to the bit."""
        said: dict[str, list] = {r.id: [[], []] for r in requests}
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work():
            for output in self.engine.step():
                assert not output.error
                said[output.id][0] += output.token_ids
                said[output.id][1] += [msgspec.msgpack.encode(p) for p in output.logprobs or []]
        self.engine.check_idle()
        if self.store is not None:
            while self.store.busy:
                self.store.wait(0.001)
        return {id: tuple(map(tuple, parts)) for id, parts in said.items()}

    def close(self) -> tuple[int, int, int]:
        """Tokens found on device, host and in Redis."""
        stats = self.engine.stats()
        self.engine.close()
        if self.store is not None:
            self.store.host.check()
        assert stats.store_bad_values == stats.store_failures == stats.store_loads_given_up == 0
        return stats.hit_tokens, stats.host_hit_tokens, stats.store_hit_tokens


def family(rng: random.Random, name: str) -> list[Request]:
    """Prompts that share a beginning, some of them twice or as a later turn of another."""
    trunk = rng.choices(range(VOCAB), k=rng.randrange(17, 90))
    requests = []
    for i in range(3):
        prompt = trunk[: rng.randrange(1, len(trunk) + 1)] if rng.random() < 0.2 else trunk
        prompt = [*prompt, *rng.choices(range(VOCAB), k=rng.randrange(1, CONTEXT - MADE - len(prompt)))]
        sampling = Sampling(temperature=rng.choice([0.0, 0.8]), seed=rng.randrange(100))
        requests.append(Request(f"{name}/{i}", prompt, MADE, sampling, logprobs=1))
    return requests


@pytest.mark.parametrize("case", CASES)
def test_a_hit_is_what_would_have_been_computed(
    redis: TestRedis, written: Callable[[str], tuple[transformers.PreTrainedModel, Path]], case: str
) -> None:
    path, rng = written(case)[1], random.Random(case)
    families = [family(rng, f"f{i}") for i in range(FAMILIES)]
    config = StoreConfig(host_bytes=1 << 18, url=redis.url, timeout_s=60.0)
    plain = Replica(path, None)
    want = {id: said for requests in families for id, said in plain.play(requests).items()}
    plain.close()
    hits = [0, 0, 0]
    replicas = [Replica(path, config), Replica(path, config)]
    for i in range(0, FAMILIES, 3):
        batch = [request for requests in families[i : i + 3] for request in requests]
        for replica in replicas:
            assert replica.play(batch) == {r.id: want[r.id] for r in batch}
    for replica in replicas:
        hits = [a + b for a, b in zip(hits, replica.close(), strict=True)]
    # Everything starts anew but Redis. Twice each: the second time some of it is still in host memory.
    replica, again = Replica(path, config), [r for requests in rng.sample(families, 6) for r in requests]
    for requests in (again, again[::-1]):
        assert replica.play(requests) == {r.id: want[r.id] for r in requests}
    last = replica.close()
    assert last[2] > 6 * 17 * 2, f"the prompts were in Redis: {last}"
    assert min(a + b for a, b in zip(hits, last, strict=True)) > 100, f"every tier was used: {hits}, {last}"
