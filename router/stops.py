"""Finds the first of many stop strings in text that comes in pieces: Aho and Corasick's automaton, over characters."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class Match(NamedTuple):
    """Stop string `text` lies at the characters [start, end) of all the text fed so far."""

    start: int
    end: int
    text: str


class StopStrings:
    """The automaton of a set of stop strings; built once per request, in time linear in their characters.

    Where several end at the same character, the longest counts: it begins first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._goto: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()
        self.first = frozenset(self._goto[0])

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            child = self._goto[node].get(char)
            if child is None:
                child = len(self._goto)
                self._goto[node][char] = child
                self._goto.append({})
                self._fail.append(0)
                self._depth.append(self._depth[node] + 1)
                self._match.append(None)
            node = child
        self._match[node] = stop

    def _link(self) -> None:
        queue = deque(self._goto[0].values())
        while queue:
            node = queue.popleft()
            if self._match[node] is None:
                self._match[node] = self._match[self._fail[node]]
            for char, child in self._goto[node].items():
                queue.append(child)
                self._fail[child] = self.step(self._fail[node], char)

    def step(self, node: int, char: str) -> int:
        """The node after `char`: the longest prefix of a stop string that the text now ends with."""
        goto = self._goto
        while char not in goto[node]:
            if node == 0:
                return 0
            node = self._fail[node]
        return goto[node][char]

    def depth(self, node: int) -> int:
        return self._depth[node]

    def match(self, node: int) -> str | None:
        return self._match[node]


class StopMatcher:
    """One sequence's walk through the automaton."""

    __slots__ = ("_node", "_seen", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._node = 0
        self._seen = 0

    def feed(self, text: str) -> Match | None:
        """The first stop string completed by `text`, if any; nothing may be fed after it."""
        stops, node = self._stops, self._node
        if node == 0 and stops.first.isdisjoint(text):
            self._seen += len(text)
            return None
        for i, char in enumerate(text):
            node = stops.step(node, char)
            found = stops.match(node)
            if found is not None:
                end = self._seen + i + 1
                return Match(end - len(found), end, found)
        self._node = node
        self._seen += len(text)
        return None

    @property
    def held(self) -> int:
        """Characters at the end of the text that could begin a stop string."""
        return self._stops.depth(self._node)
