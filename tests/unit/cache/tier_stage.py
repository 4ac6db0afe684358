"""A rank's tiers over a cache of token ids, as tests use them."""

from __future__ import annotations

import random

import numpy as np
from paged_runner import BLOCK, TokenCache

from workers.cache.orders import Arrived, Fetch, Found, Load, Save, StoreConfig
from workers.cache.store import BlockStore

BLOCKS = 64


class Rank:
    """A store over a cache of token ids, in one or several groups."""

    def __init__(self, url: str | None = None, host_bytes: int = 0, groups: int = 1, **config: object) -> None:
        self.memory = [np.full((BLOCKS, BLOCK), -1, np.int64) for _ in range(groups)]
        settings = StoreConfig(host_bytes=host_bytes, url=url, **({"timeout_s": 30.0} | config))
        self.store = BlockStore([TokenCache(m) for m in self.memory], settings)
        self.loads = 0

    def save(self, keys: list[bytes], groups: tuple[int, ...] = (0,)) -> None:
        """Blocks 0, 1, ... hold the keys' tokens."""
        for g in groups:
            for block, key in enumerate(keys):
                self.memory[g][block] = tokens_of(key, g)
        blocks = [tuple(b if g in groups else -1 for g in range(len(self.memory))) for b in range(len(keys))]
        self.store.apply([], [Save(k, b) for k, b in zip(keys, blocks, strict=True)], [])

    def begin(self, keys: list[bytes], groups: tuple[int, ...] = (0,)) -> int:
        """Fetches block i of the keys into block 32 + i."""
        self.loads += 1
        fetches = [
            Fetch(i, key, tuple(32 + i if g in groups else -1 for g in range(len(self.memory))))
            for i, key in enumerate(keys)
        ]
        self.store.apply([], [], [Load(self.loads, fetches[::-1])])
        return self.loads

    def load(self, keys: list[bytes], groups: tuple[int, ...] = (0,)) -> list[Arrived]:
        """In the order of the keys."""
        for g in groups:
            self.memory[g][32:] = -1
        number, arrived = self.begin(keys, groups), []
        while len(arrived) < len(keys):
            self.store.wait(1.0)
            arrived += [e for e in self.store.poll() if isinstance(e, Arrived) and e.number == number]
        for event in arrived:
            for g in groups:
                got = self.memory[g][32 + event.index]
                assert (got == (tokens_of(keys[event.index], g) if event.ok else -1)).all()
        return sorted(arrived, key=lambda e: e.index)

    def find(self, keys: list[bytes], groups: tuple[int, ...] = (0,)) -> list[tuple[bool, ...]]:
        self.loads += 1
        self.store.find(self.loads, [(key, groups) for key in keys])
        while True:
            self.store.wait(1.0)
            for event in self.store.poll():
                if isinstance(event, Found) and event.ticket == self.loads:
                    return event.present

    def settle(self) -> None:
        while self.store.busy:
            self.store.wait(0.001)

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *exc: object) -> None:
        self.store.close()
        self.store.host.check()


def tokens_of(key: bytes, group: int = 0) -> np.ndarray:
    return np.frombuffer(key[:BLOCK], np.uint8).astype(np.int64) + 1000 * group


def keys_of(count: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(32) for _ in range(count)]
