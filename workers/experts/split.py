"""Which host gets which rows: the same placement and history give the same split. No bit of an answer depends on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.experts.placement import Homes

NOBODY = -1
_GOLDEN = 0.6180339887498949  # turns by it fall evenly into [0, 1) however many there are


class Split:
    """One layer's rows to hosts. A row of an expert with one home goes there. Several homes share a step's rows of
    their expert in runs, by their shares; where the first run begins turns from step to step, so that single rows are
    shared as well."""

    def __init__(self, homes: Sequence[Homes]) -> None:
        self._only = np.full(len(homes), NOBODY, np.int64)
        self._several: dict[int, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        self._turn: dict[int, float] = {}
        for expert, of in enumerate(homes):
            if len(of) == 1:
                self._only[expert] = of[0][0]
            elif of:
                shares = np.array([max(0.0, share) for _, share in of])
                shares = shares if shares.sum() > 0 else np.ones(len(of))
                ends = np.cumsum(shares / shares.sum())[:-1]
                self._several[expert] = np.array([host for host, _ in of], np.int64), ends
                self._turn[expert] = 0.0

    def __call__(self, experts: NDArray[np.int32]) -> NDArray[np.int64]:
        """The host of each row; NOBODY where its expert has none. experts: [S] -> [S]"""
        hosts = self._only[experts]
        for expert, (several, ends) in self._several.items():
            rows = np.flatnonzero(experts == expert)
            if len(rows):
                points = (self._turn[expert] + (np.arange(len(rows)) + 0.5) / len(rows)) % 1.0
                hosts[rows] = several[np.searchsorted(ends, points, side="right")]
                self._turn[expert] = (self._turn[expert] + _GOLDEN) % 1.0
        return hosts
