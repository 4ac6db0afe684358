"""Which full blocks of past prompts and answers are still in the cache, by key.

The tree is implied: a key names its whole prefix, so a flat table is enough, and a node's parent is kept only for
those who want to tell others. Presence is per cache group: a group whose layers have a sliding window may have given
a block back that another group still has.

What is told to an observer is of the full-attention groups: a block is on the device while every one of those has it
(of a model that has none, while every group has it). A windowed group only needs the last few blocks before the next
row; where it has given those back, a hit is shorter than was told, and no answer depends on that.

Why eviction takes leaves first without looking for them: a sequence that holds a block of a full-attention group
holds its ancestors too and releases a table from its end, so whoever is least recently released has no descendants
left. (A windowed group needs no ancestors at all.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.cache.events import Observer, Tier

ABSENT = -1


@dataclass(slots=True)
class Node:
    """One full block: `blocks[g]` is where group g has it, or ABSENT."""

    parent: bytes
    blocks: list[int]


class PrefixTree:
    """Block keys to block ids, for `groups` cache groups. Knows nothing of references: see `BlockPool`.

    `observer` hears which blocks the groups `told` (all, unless said otherwise) have, and have no more.
    """

    def __init__(self, groups: int, observer: Observer | None = None, told: Sequence[int] = ()) -> None:
        self._groups = groups
        self._observer = observer
        self._told = tuple(told) or tuple(range(groups))
        self._nodes: dict[bytes, Node] = {}
        self._key_of: list[dict[int, bytes]] = [{} for _ in range(groups)]

    def __len__(self) -> int:
        return len(self._nodes)

    def find(self, key: bytes, group: int) -> int:
        """The block that holds `key` in `group`, or ABSENT."""
        node = self._nodes.get(key)
        return ABSENT if node is None else node.blocks[group]

    def knows(self, block: int, group: int) -> bool:
        return block in self._key_of[group]

    def insert(self, key: bytes, parent: bytes, group: int, block: int) -> None:
        """Publishes a fully computed block. Raises ValueError when the group has another block of that key."""
        node = self._nodes.setdefault(key, Node(parent, [ABSENT] * self._groups))
        if node.blocks[group] != ABSENT:
            raise ValueError(f"group {group} already has this key in block {node.blocks[group]}")
        node.blocks[group] = block
        self._key_of[group][block] = key
        if self._observer is not None and group in self._told and self._on_device(node):
            self._observer(Tier.DEVICE, True, key)

    def forget(self, block: int, group: int) -> None:
        """The block's content is about to be overwritten."""
        key = self._key_of[group].pop(block)
        node = self._nodes[key]
        if self._observer is not None and group in self._told and self._on_device(node):
            self._observer(Tier.DEVICE, False, key)
        node.blocks[group] = ABSENT
        if all(b == ABSENT for b in node.blocks):
            del self._nodes[key]

    def match(self, keys: Sequence[bytes], needed: Sequence[int | None]) -> int:
        """How many leading blocks of `keys` a new sequence can take over.

        `needed[g]` is how many blocks before its next row group g reads at most; None: all of them. The answer m is
        the largest for which every group has its last min(m, needed) blocks of keys[:m].
        """
        return reach(len(keys), needed, lambda i, group: self.find(keys[i], group) != ABSENT)

    def _on_device(self, node: Node) -> bool:
        return all(node.blocks[group] != ABSENT for group in self._told)

    def blocks(self, group: int) -> dict[int, bytes]:
        """All known blocks of a group and their keys (a view: do not change it)."""
        return self._key_of[group]


def reach(count: int, needed: Sequence[int | None], present: Callable[[int, int], bool]) -> int:
    """The largest m <= count for which every group g has its last min(m, needed[g]) of the first m blocks; None: all
    of them. `present(i, g)` says whether group g has block i."""
    runs = [0] * len(needed)  # blocks present in a row, up to here
    best = 0
    for i in range(count):
        enough = True
        for group, need in enumerate(needed):
            there = present(i, group)
            runs[group] = runs[group] + 1 if there else 0
            if need is None and not there:
                return best  # no longer prefix can be whole
            enough = enough and runs[group] >= (i + 1 if need is None else min(i + 1, need))
        if enough:
            best = i + 1
    return best
