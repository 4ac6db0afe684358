"""Traces of real requests, as `router.simulate` replays them. Pure."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from router.index import PrefixIndex
from router.policy import Floats
from workers.cache.events import Changes


class _Line(msgspec.Struct):
    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]


_Row = msgspec.json.Decoder(_Line)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: a moment, tokens in and out, and its blocks' names in 64 bits; the last may be partly full."""

    at: float
    prompt_tokens: int
    answer_tokens: int
    keys: array[int]


@dataclass(frozen=True)
class Trace:
    """Requests as they were taken down: seconds, tokens in and out, numbers of blocks."""

    at: Floats
    prompt_tokens: NDArray[np.int64]
    answer_tokens: NDArray[np.int64]
    blocks: Sequence[Sequence[int]]

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Mooncake's format, one JSON object a line. Raises ValueError naming the line."""
        rows = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                rows.append(_Row.decode(line))
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
        rows.sort(key=lambda row: row.timestamp)
        return cls(
            np.array([row.timestamp / 1000 for row in rows]),
            np.array([row.input_length for row in rows]),
            np.array([row.output_length for row in rows]),
            [row.hash_ids for row in rows],
        )

    def tiled(self, requests: int, seconds: float, seed: int = 0) -> list[Arrival]:
        """The trace as often as it takes for so many requests, each time with block names of its own, all at once, and
        in so many seconds. Each begins within what was its first minute."""
        tiles = -(-requests // len(self.at))
        pace = seconds / float(self.at.max() - self.at.min())
        rng = random.Random(seed)
        arrivals: list[Arrival] = []
        lengths = np.array([len(b) for b in self.blocks])
        flat, ends = np.concatenate([np.array(b, np.uint64) for b in self.blocks]), np.cumsum(lengths)
        for tile in range(tiles):
            late = rng.uniform(0, 60) * pace if tiles > 1 else 0.0
            names = mix(flat + np.uint64(tile << 32))
            for i, end in enumerate(ends.tolist()):
                keys = array("Q", names[end - int(lengths[i]) : end].tobytes())
                moment = (float(self.at[i]) - float(self.at[0])) * pace + late
                arrivals.append(Arrival(moment, int(self.prompt_tokens[i]), int(self.answer_tokens[i]), keys))
        arrivals.sort(key=lambda arrival: arrival.at)
        return arrivals


def mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spreads small numbers over 64 bits, one to one (the finalizer of splitmix64), as a hash would."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return result


def hits_without_bounds(trace: Trace, replicas: int) -> tuple[int, int]:
    """(blocks that were there, blocks) where nothing is ever given up, by the real index: each request's blocks come to
    a replica when it arrives, replicas take turns, and what any has counts."""
    index, told, hits = PrefixIndex(), [0] * replicas, 0
    for slot in range(replicas):
        index.add(slot)
    for i, blocks in enumerate(trace.blocks):
        keys = mix(np.array(blocks, np.uint64)).tobytes()
        hits += index.known(keys)
        slot = i % replicas
        index.take(slot, Changes(told[slot], False, bytes([1]) * len(blocks), keys))
        told[slot] += len(blocks)
    return hits, sum(map(len, trace.blocks))
