"""What is asked of each model, as the router measures it: what its autoscaling decides by. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from router.policy import Class, Fleet, Ints
from workers.engine import EngineInfo, EngineStats

UNSERVED_S = 5.0  # a request that found no replica counts for so long after it last asked
LATELY_S = 10.0  # what is averaged over time falls to a third in this time
LEAST = 0.5 / LATELY_S  # of a rate: less is nothing


class ModelDemand(msgspec.Struct, frozen=True):
    """What is asked of one model, and what there is for it.

    `running`, `waiting` and `granted` (given to a replica and not yet in its report) are sequences at its `ready`
    replicas, each with `places` for them. `queued_s` are seconds of prompts that wait there, all replicas together;
    `first_token_s` is what a new request would wait at the best. `load` is how many replicas the prompts of the last
    seconds kept busy. `cache` is the share of blocks that running sequences hold. `unserved` requests found no ready
    replica in the last seconds; `refused` is how many a second find no room. `requests` were granted since the router
    began.
    """

    ready: int = 0
    running: int = 0
    waiting: int = 0
    granted: int = 0
    places: int = 0
    queued_s: float = 0.0
    first_token_s: float = 0.0
    load: float = 0.0
    cache: float = 0.0
    unserved: int = 0
    refused: float = 0.0
    requests: int = 0

    @property
    def sequences(self) -> int:
        return self.running + self.waiting + self.granted

    @property
    def any(self) -> bool:
        """Whether anything is asked at all."""
        return bool(self.sequences or self.unserved or self.refused >= LEAST)


@dataclass(slots=True)
class _Asked:
    """Of one model. `load` and `refused` are averages as of moment `at`; `unserved` are requests and when each last
    asked, that which asked longest ago first."""

    requests: int = 0
    load: float = 0.0
    refused: float = 0.0
    at: float = 0.0
    unserved: dict[str, float] = field(default_factory=dict)

    def advance(self, now: float) -> None:
        kept = math.exp(min(self.at - now, 0.0) / LATELY_S)
        self.load, self.refused, self.at = self.load * kept, self.refused * kept, now
        while self.unserved and next(iter(self.unserved.values())) < now - UNSERVED_S:
            del self.unserved[next(iter(self.unserved))]


class DemandMeter:
    """Counts what a router grants and refuses, by model. `now` is a moment of the router's clock."""

    def __init__(self) -> None:
        self._asked: defaultdict[str, _Asked] = defaultdict(_Asked)

    def granted(self, model: str, request: str, work: float, now: float) -> None:
        """A replica was found, whose prompt work is so many seconds."""
        asked = self._asked[model]
        asked.advance(now)
        asked.unserved.pop(request, None)
        asked.requests += 1
        asked.load += work / LATELY_S

    def unserved(self, model: str, request: str, now: float) -> None:
        """No replica is ready; whoever waits for one asks again."""
        asked = self._asked[model]
        asked.advance(now)
        asked.unserved.pop(request, None)
        asked.unserved[request] = now

    def refused(self, model: str, now: float) -> None:
        """Every queue is full."""
        asked = self._asked[model]
        asked.advance(now)
        asked.refused += 1 / LATELY_S

    def demand(
        self, fleet: Fleet, replicas: Iterable[tuple[int, EngineInfo, EngineStats]], now: float
    ) -> dict[str, ModelDemand]:
        """Of every model that was asked for or has a replica. `replicas` are those that are ready, with their slots."""
        slots: defaultdict[str, list[int]] = defaultdict(list)
        blocks: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        for slot, info, stats in replicas:
            slots[info.model].append(slot)
            blocks[info.model][0] += stats.blocks_in_use
            blocks[info.model][1] += info.blocks
        return {
            model: self._of(model, fleet, np.array(slots[model], np.int64), blocks[model][0], blocks[model][1], now)
            for model in sorted({*self._asked, *slots})
        }

    def _of(self, model: str, fleet: Fleet, at: Ints, used: int, blocks: int, now: float) -> ModelDemand:
        asked = self._asked[model]
        asked.advance(now)
        waits = np.maximum(fleet.ahead[Class.LOW][at] - now, 0.0)
        over = np.maximum(fleet.sequences[at] - fleet.places[at] + 1, 0) * fleet.stay[at] / fleet.places[at]
        return ModelDemand(
            ready=len(at),
            running=int(fleet.running[at].sum()),
            waiting=int(fleet.waiting[at].sum()),
            granted=int(fleet.granted[at].sum()),
            places=int(fleet.places[at].mean()) if len(at) else 0,
            queued_s=float(waits.sum()),
            first_token_s=float(np.maximum(waits, over).min()) if len(at) else 0.0,
            load=asked.load,
            cache=used / blocks if blocks else 0.0,
            unserved=len(asked.unserved),
            refused=asked.refused,
            requests=asked.requests,
        )
