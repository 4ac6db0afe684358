"""Which host gets which rows of a step: the same placement and history give the same split. No bit of an answer depends
on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.experts.placement import Homes

NOBODY = -1
READ_ROWS = 3  # what reading an expert's weights costs, in rows: 2 with AVX2, more where rows are fast
_ROUNDS = 2  # in which rows are poured anew
_LEAST_PART = 4 * READ_ROWS  # rows that are worth reading an expert's weights at one more host


class Split:
    """One layer's rows to hosts, so that the slowest is done early: a layer lasts as long as that one.

    A row of an expert with one home goes there. Then experts with several, the most wanted first, go whole to the home
    with least to do, or, where their rows are many, are poured into several up to one level. Which of equal homes comes
    first turns from step to step. What a home's share is on average does not matter here.
    """

    def __init__(self, homes: Sequence[Homes]) -> None:
        self._only = np.full(len(homes), NOBODY, np.int64)
        self._several: list[tuple[int, list[int]]] = []
        for expert, of in enumerate(homes):
            if len(of) == 1:
                self._only[expert] = of[0][0]
            elif of:
                self._several.append((expert, [host for host, _ in of]))
        self._numbers = np.array([expert for expert, _ in self._several], np.int64)
        self._hosts = 1 + max((host for of in homes for host, _ in of), default=NOBODY)
        self._turn = 0

    def __call__(self, experts: NDArray[np.int32]) -> NDArray[np.int64]:
        """The host of each row; NOBODY where its expert has none. experts: [S] -> [S]. Raises IndexError for an expert
        that there is not."""
        hosts: NDArray[np.int64] = self._only[experts.astype(np.uint32)]  # a negative one becomes too large
        if not self._several or not len(experts):
            return hosts
        counts = np.bincount(experts, minlength=len(self._only))
        costs = np.where(counts > 0, counts + READ_ROWS, 0)
        loads = np.bincount(self._only - NOBODY, costs, self._hosts - NOBODY)[-NOBODY:].tolist()
        wanted = counts[self._numbers]
        host_of = self._only.copy()
        many: dict[int, tuple[int, list[int], list[tuple[int, int]]]] = {}  # experts with many rows, and where those go
        self._turn = (self._turn + 1) % self._hosts
        for i in np.argsort(-wanted, kind="stable").tolist():
            rows = int(wanted[i])
            if not rows:
                break
            expert, of = self._several[i]
            parts = self._pour(rows, of, loads)
            host_of[expert] = parts[0][0]
            if rows >= 2 * _LEAST_PART:
                many[expert] = rows, of, parts
        for _ in range(_ROUNDS):  # those that came first did not know of the others
            for expert, (rows, of, parts) in many.items():
                for host, count in parts:
                    loads[host] -= READ_ROWS + count
                many[expert] = rows, of, self._pour(rows, of, loads)
        hosts = host_of[experts]
        for expert, (_, _, parts) in many.items():
            hosts[experts == expert] = np.repeat([host for host, _ in parts], [count for _, count in parts])
        return hosts

    def _pour(self, rows: int, of: list[int], loads: list[float]) -> list[tuple[int, int]]:
        """(host, rows) of one expert's homes that take part; adds what they cost to `loads`."""
        turn, hosts = self._turn, self._hosts
        if rows < 2 * _LEAST_PART:
            host = min(of, key=lambda h: (loads[h], (h + turn) % hosts))
            loads[host] += READ_ROWS + rows
            return [(host, rows)]
        of = sorted(of, key=lambda h: (loads[h], (h + turn) % hosts))[: rows // _LEAST_PART]
        level, total, takes = float("inf"), float(rows), 0
        for takes, host in enumerate(of, 1):
            total += loads[host] + READ_ROWS
            if total / takes >= level:  # it has more to do already than the others with this
                takes -= 1
                break
            level = total / takes
        parts, given, end = [], 0, 0.0
        for host in of[:takes]:
            end += level - loads[host] - READ_ROWS
            count = (rows if host == of[takes - 1] else round(end)) - given
            if count:
                parts.append((host, count))
                loads[host] += READ_ROWS + count
                given += count
        return parts
