"""Block tables of sequences over one pool per cache group, and the prefix tree over the pools.

Positions of one sequence, in a windowed group, while it runs (half-open ranges; P positions a block):

    0          behind             computed      allocated
    |----------|------------------|-------------|
      -1: given   full, published   being         a table entry b covers [b P, (b + 1) P)
      back        in the tree       written

Nothing half-computed is published: only `register` puts blocks into the tree, and it is told how many positions are
computed. Ask (`can_allocate`), then commit (`allocate`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from workers.cache.blocks import BlockPool
from workers.cache.events import Observer
from workers.cache.keys import extend_keys
from workers.cache.orders import Fetch, Save
from workers.cache.prefix_tree import ABSENT, PrefixTree, reach


@dataclass(slots=True)
class BlockTable:
    """What one sequence holds. `groups[g][b]` is a block id, or -1 where the window has passed, or in the `gaps` of a
    windowed group: entries before those that a load brings, which are only taken if rows are computed there."""

    groups: tuple[array[int], ...]
    keys: list[bytes] = field(default_factory=list)
    registered: int = 0  # leading full blocks that `register` has dealt with
    behind: list[int] = field(default_factory=list)  # per group: leading entries that are -1
    gaps: list[range] = field(default_factory=list)  # per group: further entries that are -1
    loaded: set[int] = field(default_factory=set)  # entries whose content came from a tier behind this cache


class CacheManager:
    """Owns every block of every cache group.

    `blocks[g]` is the number of blocks of group g and `windows[g]` the positions that its layers see (None: all).
    `observer` hears which blocks are on the device: see `PrefixTree`.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        windows: Sequence[int | None],
        block_tokens: int,
        prefix_cache: bool = True,
        observer: Observer | None = None,
    ) -> None:
        if len(blocks) != len(windows) or not blocks:
            raise ValueError(f"{len(blocks)} block counts for {len(windows)} cache groups; there must be one for each")
        self.block_tokens = block_tokens
        self.windows = tuple(windows)
        self.prefix_cache = prefix_cache
        self._pools = [BlockPool(count) for count in blocks]
        self._tree = PrefixTree(len(blocks), observer, [g for g, window in enumerate(windows) if window is None])
        # A row sees `window` positions, itself among them: those before it reach into at most this many blocks.
        self._needed = [None if w is None else -(-(w - 1) // block_tokens) for w in windows]
        self._tables = 0
        self.fresh: list[Save] | None = None  # where not None: what `register` has published since it was emptied

    # Counting.

    @property
    def blocks_in_use(self) -> int:
        return sum(pool.held for pool in self._pools)

    @property
    def blocks_kept(self) -> int:
        return sum(pool.kept for pool in self._pools)

    def available(self, group: int) -> int:
        return self._pools[group].available

    def fits(self, positions: int, chunk: int) -> bool:
        """Whether a sequence of `positions`, computed at most `chunk` at a time, fits into the empty cache."""
        return all(self.peak(positions, chunk, g) <= pool.blocks for g, pool in enumerate(self._pools))

    def peak(self, positions: int, chunk: int, group: int) -> int:
        """Blocks that a sequence holds in a group at most while it grows to `positions`."""
        blocks = -(-positions // self.block_tokens)
        window = self.windows[group]
        if window is None:
            return blocks
        return min(blocks, -(-(window - 1 + chunk) // self.block_tokens) + 1)

    # One sequence's life.

    def open(self) -> BlockTable:
        """An empty table; `free` it when the sequence leaves."""
        self._tables += 1
        return BlockTable(self._no_entries(), behind=[0] * len(self._pools), gaps=self._no_gaps())

    def match(self, table: BlockTable, root: bytes, tokens: Sequence[int]) -> int:
        """Takes over the cached prefix of `tokens` into an empty table; how many positions it spares.

        At most len(tokens) - 1, so that at least one row is left to compute.
        """
        if not self.prefix_cache:
            return 0
        extend_keys(table.keys, root, tokens, self.block_tokens)
        keys = table.keys[: (len(tokens) - 1) // self.block_tokens]
        count = self._tree.match(keys, self._needed)
        for group, entries in enumerate(table.groups):
            first = self._first_needed(count * self.block_tokens, group)
            for i in range(count):
                block = self._tree.find(keys[i], group) if i >= first else ABSENT
                if block != ABSENT:
                    self._pools[group].hold(block)
                entries.append(block)
            table.behind[group] = min(first, count)
        table.registered = count
        return count * self.block_tokens

    def share(self, source: BlockTable, table: BlockTable, blocks: int) -> bool:
        """Holds the first `blocks` blocks of `source`, all of them computed, in the empty `table` too: as far as a
        row after them reads them. False, and nothing is held, where the source has given one of those back."""
        firsts = [min(self._first_needed(blocks * self.block_tokens, g), blocks) for g in range(len(self._pools))]
        for entries, first in zip(source.groups, firsts, strict=True):
            if len(entries) < blocks or ABSENT in entries[first:blocks]:
                return False
        for group, first in enumerate(firsts):
            for i in range(blocks):
                block = source.groups[group][i] if i >= first else ABSENT
                if block != ABSENT:
                    self._pools[group].hold(block)
                table.groups[group].append(block)
            table.behind[group] = first
        table.keys = source.keys[:blocks]
        table.registered = min(source.registered, blocks)
        return True

    def missing(self, table: BlockTable, positions: int, group: int) -> int:
        """Blocks that the table lacks in a group to cover [0, positions)."""
        blocks, gap = -(-positions // self.block_tokens), table.gaps[group]
        return max(0, blocks - len(table.groups[group])) + max(0, min(blocks, gap.stop) - gap.start)

    def held(self, table: BlockTable, group: int) -> int:
        """Blocks that the table holds in a group."""
        return len(table.groups[group]) - table.behind[group] - len(table.gaps[group])

    def can_allocate(self, table: BlockTable, positions: int) -> bool:
        """Whether `allocate` would succeed now."""
        return all(self.missing(table, positions, g) <= p.available for g, p in enumerate(self._pools))

    def allocate(self, table: BlockTable, positions: int) -> None:
        """Makes every group's table cover [0, positions). Ask `can_allocate` first."""
        blocks = -(-positions // self.block_tokens)
        for group, entries in enumerate(table.groups):
            gap = table.gaps[group]
            if gap:
                end = max(gap.start, min(blocks, gap.stop))
                for i in range(gap.start, end):
                    entries[i] = self._take(group)
                table.gaps[group] = range(end, gap.stop)
            for _ in range(len(entries), blocks):
                entries.append(self._take(group))

    def register(self, table: BlockTable, root: bytes, tokens: Sequence[int], computed: int) -> None:
        """Publishes the full blocks of [0, computed) of `tokens`.

        Where the tree already has a block of that key, the sequence goes on with that one and its own becomes free:
        their bits are equal (the row law), and holding it keeps the ancestors of its later blocks in the cache.
        """
        if not self.prefix_cache:
            return
        full = computed // self.block_tokens
        if full <= table.registered:
            return
        extend_keys(table.keys, root, tokens, self.block_tokens)
        for i in range(table.registered, full):
            parent, new = table.keys[i - 1] if i else root, [ABSENT] * len(self._pools)
            for group, entries in enumerate(table.groups):
                if entries[i] != ABSENT and self._publish(table.keys[i], parent, group, entries, i):
                    new[group] = entries[i]
            if self.fresh is not None and i not in table.loaded and any(block != ABSENT for block in new):
                self.fresh.append(Save(table.keys[i], tuple(new)))
        table.registered = full

    def trim(self, table: BlockTable, computed: int) -> None:
        """Gives back the blocks that lie wholly behind the window of every row from position `computed` on."""
        for group, entries in enumerate(table.groups):
            first = self._first_needed(computed, group)
            end, gap = min(first, len(entries)), table.gaps[group]
            for i in range(table.behind[group], end):
                if i not in gap:
                    self._release(entries[i], group)
                    entries[i] = ABSENT
            if gap:
                table.gaps[group] = range(max(gap.start, min(end, gap.stop)), gap.stop)
            table.behind[group] = max(table.behind[group], end)

    def free(self, table: BlockTable) -> None:
        """Releases everything, from the end, so that leaves are evicted before their ancestors. The table is empty
        afterwards and may be used again."""
        for group, entries in enumerate(table.groups):
            for block in reversed(entries):
                if block != ABSENT:
                    self._release(block, group)
            table.behind[group] = 0
        table.gaps = self._no_gaps()
        table.loaded.clear()
        table.groups = self._no_entries()  # new arrays: a step that failed may still have the old ones in view
        table.registered = 0

    def close(self, table: BlockTable) -> None:
        """The end of a table's life: `free`, and counted as gone."""
        self.free(table)
        self._tables -= 1

    # Loads from the tiers behind the cache.

    @property
    def windowed(self) -> bool:
        """Whether a group sees less than everything."""
        return any(need is not None for need in self._needed)

    def sharable(self, key: bytes, group: int) -> bool:
        """Whether a load may take this block from the tree. Not where there are windows: rows may yet be computed
        there because a window's blocks are missing, and nobody writes to a block that others read."""
        return not self.windowed and self._tree.find(key, group) != ABSENT

    def covered(self, table: BlockTable, index: int) -> bool:
        """Whether the table has a block there in some group."""
        return any(entries[index] != ABSENT for entries in table.groups)

    def loadable(self, table: BlockTable, first: int, present: Callable[[int, int], bool], last: int) -> int:
        """How many leading blocks of a sequence could be there: the first `first` are in the table, of the others
        those that can be shared, and those for which `present(index, group)`; at most `last`.

        `first` where nothing can be gained.
        """
        keys = table.keys

        def there(i: int, group: int) -> bool:
            if i < first:
                return table.groups[group][i] != ABSENT
            return self.sharable(keys[i], group) or present(i, group)

        return max(first, reach(last, self._needed, there))

    def reserve(self, table: BlockTable, end: int) -> list[Fetch] | None:
        """Makes the table cover the first `end` blocks, as far as the row after them reads them; what has to be
        fetched into it, in order. None, and nothing is taken, where there are not enough blocks. What can be shared
        is."""
        begin = len(table.groups[0])
        firsts = [max(begin, min(self._first_needed(end * self.block_tokens, g), end)) for g in range(len(self._pools))]
        find = self._tree.find if not self.windowed else (lambda key, group: ABSENT)
        known = [[find(table.keys[i], g) for i in range(f, end)] for g, f in enumerate(firsts)]
        for pool, blocks in zip(self._pools, known, strict=True):
            kept = sum(1 for b in blocks if b != ABSENT and pool.is_kept(b))
            if blocks.count(ABSENT) > pool.available - kept:
                return None
        wanted: dict[int, list[int]] = {i: [ABSENT] * len(self._pools) for i in range(min(firsts), end)}
        for group, (entries, first, blocks) in enumerate(zip(table.groups, firsts, known, strict=True)):
            for block in blocks:  # before any is taken: taking evicts kept ones
                if block != ABSENT:
                    self._pools[group].hold(block)
            if first > begin:
                table.gaps[group] = range(begin, first)
                entries.extend([ABSENT] * (first - begin))
            for i, block in enumerate(blocks, first):
                if block == ABSENT:
                    wanted[i][group] = self._take(group)
                entries.append(block if block != ABSENT else wanted[i][group])
        return [Fetch(i, table.keys[i], tuple(b)) for i, b in sorted(wanted.items()) if any(x != ABSENT for x in b)]

    def leap(self, table: BlockTable, first: int, end: int, ready: Callable[[int], bool]) -> int:
        """How many leading blocks are there, where the first `first` are computed and those with `ready(index)` were
        loaded; `first` where that is all."""

        def there(i: int, group: int) -> bool:
            return table.groups[group][i] != ABSENT and (i < first or ready(i))

        return max(first, reach(end, self._needed, there))

    # Integrity.

    def check(self, tables: Sequence[BlockTable]) -> None:
        """Raises RuntimeError unless `tables` hold exactly the references that the pools count, each block in one
        state, and every kept block is known to the tree. For tests: it looks at every block."""
        for group, pool in enumerate(self._pools):
            pool.check()
            counts = array("i", [0]) * pool.blocks
            for table in tables:
                for block in table.groups[group]:
                    if block != ABSENT:
                        counts[block] += 1
            for block, count in enumerate(counts):
                if count != pool.references(block):
                    raise RuntimeError(
                        f"block {block} of group {group}: {count} holders, {pool.references(block)} counted"
                    )
                if pool.is_kept(block) and not self._tree.knows(block, group):
                    raise RuntimeError(f"block {block} of group {group} is kept but unknown to the tree")
            for block in self._tree.blocks(group):
                if not pool.is_kept(block) and not pool.references(block):
                    raise RuntimeError(f"block {block} of group {group} is free but known to the tree")

    def check_idle(self) -> None:
        """Raises RuntimeError when a block is held or a table open though no sequence is there."""
        if self._tables:
            raise RuntimeError(f"{self._tables} block tables are open though no sequence is there")
        self.check([])

    # Inside.

    def _no_entries(self) -> tuple[array[int], ...]:
        return tuple(array("i") for _ in self._pools)

    def _first_needed(self, computed: int, group: int) -> int:
        """The first table entry that the row at position `computed` reads."""
        window = self.windows[group]
        return 0 if window is None else max(0, computed - window + 1) // self.block_tokens

    def _publish(self, key: bytes, parent: bytes, group: int, entries: array[int], i: int) -> bool:
        """Publishes a block, or exchanges the entry for one that the tree has; whether it was published."""
        block, known = entries[i], self._tree.find(key, group)
        if known == ABSENT:
            self._tree.insert(key, parent, group, block)
            return True
        if known != block:
            self._pools[group].hold(known)
            self._release(block, group)
            entries[i] = known
        return False

    def _take(self, group: int) -> int:
        block, evicted = self._pools[group].take()
        if evicted:
            self._tree.forget(block, group)
        return block

    def _no_gaps(self) -> list[range]:
        return [range(0)] * len(self._pools)

    def _release(self, block: int, group: int) -> None:
        self._pools[group].release(block, keep=self._tree.knows(block, group))
