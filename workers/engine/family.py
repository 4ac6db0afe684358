"""Sequences of one prompt: the first computes it, the others wait and then share its full blocks by reference.

    0                           blocks * P      prompt_tokens
    |---- shared by reference ------|--- each by itself ---|--- answer ...

A family's own table holds the shared blocks from when they are computed until every member was admitted (or until
blocks run out: then it lets go, and the next member computes the prompt again). So members may end, be cancelled or
be preempted in any order. It works without the prefix tree, and beside it.
"""

from __future__ import annotations

from workers.cache.manager import BlockTable, CacheManager
from workers.engine.sequence import Sequence


class Family:
    """`blocks`: full blocks of the prompt before its last token. `fresh`: members that were never admitted."""

    __slots__ = ("blocks", "cached", "first", "fresh", "known", "loaded", "members", "prompt", "table")

    def __init__(self, prompt: list[int], blocks: int) -> None:
        self.prompt, self.blocks = prompt, blocks
        self.members = self.fresh = self.cached = 0
        self.loaded = [0, 0, 0]  # and what loads spared it
        self.known = False  # a member was admitted, and `cached` is what it found in the prefix tree
        self.first: Sequence | None = None  # who computes the prompt now
        self.table: BlockTable | None = None


class Families:
    """All families with members in the scheduler; it tells what happens to them."""

    def __init__(self, cache: CacheManager) -> None:
        self._cache = cache
        self._families: dict[tuple[str, bytes], Family] = {}

    def tables(self) -> list[BlockTable]:
        """Those that families hold themselves."""
        return [f.table for f in self._families.values() if f.table is not None]

    def join(self, sequence: Sequence) -> None:
        """A new member; of no family where its prompt is another one, or too short to share."""
        request = sequence.request
        blocks = (len(request.prompt) - 1) // self._cache.block_tokens
        if not blocks:
            return
        family = self._families.setdefault((request.family, sequence.root), Family(request.prompt, blocks))
        if family.prompt == request.prompt:
            sequence.family = family
            family.members += 1
            family.fresh += 1

    def leave(self, sequence: Sequence, family: Family) -> None:
        """A member ends, whatever it was doing."""
        self.interrupted(sequence, family)
        family.members -= 1
        if sequence.cached is None:
            self._admitted(family)
        if not family.members:
            del self._families[(sequence.request.family, sequence.root)]

    def interrupted(self, sequence: Sequence, family: Family) -> None:
        """A member runs no more: if the prompt was its to compute, it is another's now."""
        if family.first is sequence:
            family.first = None

    def waits(self, sequence: Sequence, family: Family) -> bool:
        """Whether a member waits for the first: one that needs every row of the prompt never does."""
        return family.first is not None and sequence.cached is None and not sequence.asks_prompt

    def share(self, sequence: Sequence, family: Family, hit: int) -> int:
        """Shared blocks into the member's table, where they are more than the `hit` positions that it has; how many
        positions it has now."""
        spared = family.blocks * self._cache.block_tokens
        if family.table is None or spared <= hit or sequence.asks_prompt:
            return hit
        self._cache.free(sequence.table)
        self._cache.share(family.table, sequence.table, family.blocks)
        return spared

    def admitted(self, sequence: Sequence, family: Family) -> None:
        """A member runs, for the first time or again, with `sequence.computed` positions."""
        if (
            family.table is None
            and family.first is None
            and sequence.computed < family.blocks * self._cache.block_tokens
        ):
            family.first = sequence

    def introduced(self, sequence: Sequence, family: Family) -> None:
        """A member was admitted for the first time; its `cached` is set."""
        if not family.known:
            family.known, family.cached, family.loaded = True, sequence.cached or 0, sequence.loaded
        self._admitted(family)

    def computed(self, sequence: Sequence, family: Family) -> None:
        """A member's rows are computed, and nothing is given back yet of what lies behind its window."""
        if family.first is not sequence or sequence.computed < family.blocks * self._cache.block_tokens:
            return
        family.first = None
        if family.fresh:
            table = self._cache.open()
            if self._cache.share(sequence.table, table, family.blocks):
                family.table = table
            else:
                self._cache.close(table)

    def let_go(self) -> bool:
        """Blocks have run out: families hold none by themselves any more. Whether one did."""
        held = [f for f in self._families.values() if f.table is not None]
        for family in held:
            self._drop(family)
        return bool(held)

    def _admitted(self, family: Family) -> None:
        family.fresh -= 1
        if not family.fresh:
            self._drop(family)

    def _drop(self, family: Family) -> None:
        if family.table is not None:
            self._cache.close(family.table)
            family.table = None
