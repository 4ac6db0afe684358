"""Ids of one cache group's blocks, and who holds them. Integers only.

A block is in exactly one of three states:

    free    nobody holds it and its content means nothing
    held    `references(block) > 0`: that many sequences read it, one of them may still be writing it
    kept    nobody holds it, but the prefix tree knows its content: it may be held again, or taken when none is free
"""

from __future__ import annotations

from array import array
from collections import OrderedDict


class BlockPool:
    """`blocks` ids, 0 .. blocks - 1. Every method is O(1) but `check`."""

    def __init__(self, blocks: int) -> None:
        if blocks < 1:
            raise ValueError(f"blocks is {blocks}; a cache needs at least 1")
        self.blocks = blocks
        self._references = array("i", [0]) * blocks
        self._free = list(range(blocks - 1, -1, -1))  # a stack: the block freed last is warm in the CPU's cache
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently released first

    @property
    def available(self) -> int:
        """Blocks that `take` could give: free ones and kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        return len(self._kept)

    @property
    def held(self) -> int:
        return self.blocks - self.available

    def references(self, block: int) -> int:
        return self._references[block]

    def is_kept(self, block: int) -> bool:
        return block in self._kept

    def take(self) -> tuple[int, bool]:
        """A block for one holder, and whether it was a kept one, whose content the tree must now forget.

        Free blocks first, then the kept one released longest ago. Raises IndexError when `available` is 0.
        """
        if self._free:
            block, evicted = self._free.pop(), False
        elif self._kept:
            (block, _), evicted = self._kept.popitem(last=False), True
        else:
            raise IndexError(f"none of {self.blocks} blocks is free; ask `available` before taking")
        self._references[block] = 1
        return block, evicted

    def hold(self, block: int) -> None:
        """One holder more of a block that is held or kept."""
        if self._references[block] == 0:
            del self._kept[block]  # KeyError: the block is free, its content means nothing
        self._references[block] += 1

    def release(self, block: int, keep: bool) -> None:
        """One holder less; without holders the block is kept (if the tree knows it) or free."""
        count = self._references[block] - 1
        if count < 0:
            raise ValueError(f"block {block} is released more often than held")
        self._references[block] = count
        if count == 0:
            if keep:
                self._kept[block] = None
            else:
                self._free.append(block)

    def drop(self, block: int) -> None:
        """A kept block becomes free."""
        del self._kept[block]
        self._free.append(block)

    def check(self) -> None:
        """Raises RuntimeError unless every block is in exactly one state."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("a block is twice in the free list")
        for block in range(self.blocks):
            states = (block in free) + (block in self._kept) + (self._references[block] > 0)
            if states != 1:
                raise RuntimeError(f"block {block} is in {states} states; {self._references[block]} references")
