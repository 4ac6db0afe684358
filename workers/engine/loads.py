"""What the engine does with the tiers behind its cache: which blocks are loaded for whom, and who waits for them.

A load and the computation of a prompt meet in the middle: rows are computed from the front, blocks are fetched from
the back, and once they touch the sequence leaps to the end of what was loaded:

    0         computed             ready          end
    |--- there ---|--- in flight ----|--- loaded ---|--- to compute ---
                  rows ->      <- blocks

How far each goes is a matter of measured rates. Where the store is much faster, the sequence waits for it and computes
nothing (the others go on); where it is not, it computes meanwhile, and takes from the load what it overtakes. A store
that is much slower is not asked, but for a load now and then that measures it. The sequence waits for a silent store no
longer than `PATIENCE` of the time that computing would take, so that a store that hangs costs that much and no more.
Blocks that never come are computed: nothing here can fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from workers.cache.events import Tier
from workers.cache.manager import CacheManager
from workers.cache.orders import NEVER, Arrived, Fetch, Found, Load, StorePort
from workers.cache.rates import Probes, Rate
from workers.engine.contract import EngineStats
from workers.engine.plan import StepPlan
from workers.engine.sequence import Sequence

PATIENCE = 0.05  # of the time that computing would take: how long nothing may come before rows are computed
LEAST_S = 0.003  # and that long in any case: threads take a while to be heard
WORTH = 1 / 8  # of what is being loaded: fewer rows are not computed meanwhile, for they would only slow it
COMPUTE_TOKENS_S = 1000.0  # until the first prompt was computed
FIRST_BYTES = 2 << 20  # what may come at once: after so many bytes something must have been heard
FILLED = (
    "host_loaded_bytes", "host_load_seconds", "store_loaded_bytes", "store_load_seconds", "store_bad_values",
    "store_misses", "store_written_bytes", "store_writes_dropped", "store_failures",
)  # fmt: skip
SLOW = 2.0  # times as long as computing: a load that takes longer spares less than it costs in steps cut short
WAIT_S = 0.005  # at most, where a step has nothing to compute: requests come meanwhile


@dataclass(slots=True, eq=False)
class OpenLoad:
    """One sequence's load. It first asks what is there (`end` is 0), then fetches blocks before `end`."""

    number: int
    sequence: Sequence
    until: float  # rows are held back until then
    patience_s: float
    begun: float
    asked: list[tuple[bytes, tuple[int, ...]]] = field(default_factory=list)  # keys and groups, of the shared store
    found: set[tuple[bytes, int]] = field(default_factory=set)
    end: int = 0
    pending: dict[int, tuple[Fetch, Tier, int]] = field(default_factory=dict)  # in flight, by index; tier and bytes
    ready: dict[int, Tier] = field(default_factory=dict)
    arrived_bytes: int = 0
    given_up: bool = False
    probes: bool = False  # begun to measure a store that seems too slow: nobody waits for it


class Loads:
    """The leader's side of the prefix store; integers, keys and times only. `clock` gives seconds."""

    def __init__(
        self,
        port: StorePort,
        cache: CacheManager,
        counts: EngineStats,
        clock: Callable[[], float] = time.monotonic,
        patience: float = PATIENCE,
    ) -> None:
        self._port, self._cache, self._counts, self._clock, self._patience = port, cache, counts, clock, patience
        self._open: dict[int, OpenLoad] = {}
        self._keys: dict[bytes, OpenLoad] = {}  # asked for or in flight
        self._numbers = 0
        self._floors: list[tuple[int, int]] = []
        self._begun: list[Load] = []
        self._loading, self._asking = Probes(clock), Probes(clock)  # tries of a store that seems too slow
        self.compute = Rate(COMPUTE_TOKENS_S, 2048)
        cache.fresh = []

    # What the scheduler asks.

    def begin(self, sequence: Sequence, ahead: int) -> None:
        """A sequence was admitted with what the device has of it. `ahead` tokens of other prompts are computed before
        its own."""
        first, last = self._bounds(sequence)
        if first >= last:
            return
        now = self._clock()
        spared_s = (ahead + (last - first) * self._cache.block_tokens) / self.compute.value
        self._numbers += 1
        load = OpenLoad(self._numbers, sequence, now, max(LEAST_S, self._patience * spared_s), now)
        latency = self._port.latency_s()
        slow = latency >= spared_s / 2 + load.patience_s
        if self._port.reachable and (not slow or self._asking.may(latency)):
            load.asked = self._unknown(sequence, first, last)
        if load.asked:
            load.until = now if slow else now + min(load.patience_s, 4 * latency + self._patience)
            self._add(load, [key for key, _ in load.asked])
            self._port.find(load.number, load.asked)
        else:
            self._fetch(load, spared_s)

    def limit(self, sequence: Sequence, rows: int) -> int:
        """How many of `rows` rows the sequence computes in this step: 0 where it waits. What is in flight there is
        given up."""
        load = sequence.load
        if load is None:
            return rows
        now, tokens, at = self._clock(), self._cache.block_tokens, sequence.computed
        if not load.end:
            return 0 if now < load.until else rows
        gap = self._stop(load) * tokens - at
        if gap <= 0:
            return rows
        rows = min(rows, gap)
        if load.pending and now < load.until:
            loading = gap / max(1e-9, self._left_s(load, now))  # tokens per second
            own = gap * self.compute.value / (self.compute.value + loading)
            if own < max(tokens, WORTH * gap):
                return 0
            rows = min(rows, -(-(at + int(own)) // tokens) * tokens - at)
        self._raise_floor(load, -(-(at + rows) // tokens), overdue=now >= load.until)
        return rows

    def covers(self, sequence: Sequence, blocks: int) -> bool:
        """Whether another sequence waits for the block after the first `blocks` of this one: soon it is on the device
        for both."""
        keys = sequence.table.keys
        load = self._keys.get(keys[blocks]) if blocks < len(keys) else None
        return load is not None and load.sequence is not sequence and self._clock() < load.until

    def drop(self, sequence: Sequence) -> None:
        """The sequence gives its blocks back: nothing may be written to them any more."""
        if sequence.load is not None:
            if sequence.load.pending:
                self._floors.append((sequence.load.number, NEVER))
            self._close(sequence.load)

    def orders(self, plan: StepPlan) -> None:
        """Puts into the plan what ranks have to do."""
        plan.floors, self._floors = self._floors, []
        plan.loads, self._begun = self._begun, []
        plan.gather = self._port.gathers and any(load.pending for load in self._open.values())
        if self._cache.fresh:
            plan.saves, self._cache.fresh = self._cache.fresh, []

    # What the engine asks.

    def note(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long: how fast prompts are computed."""
        rows = sum(len(c.tokens) for c in plan.chunks if len(c.tokens) > 1 and not c.drafts)
        if rows:
            self.compute.add(rows, seconds)

    @property
    def pending(self) -> bool:
        """Whether ranks have something to do, whether or not there is something to compute."""
        return bool(self._floors or self._begun or self._cache.fresh)

    def wait(self) -> None:
        """A step had nothing to compute: until something has come, or somebody has waited long enough."""
        if self._open:
            soonest = min(load.until for load in self._open.values()) - self._clock()
            if soonest > 0:
                self._port.wait(min(soonest, WAIT_S))

    def poll(self) -> None:
        """Takes what has come, and lets sequences leap over it."""
        for event in self._port.poll():
            load = self._open.get(event.ticket if isinstance(event, Found) else event.number)
            if load is None:
                continue
            if isinstance(event, Arrived):
                self._arrived(load, event)
            elif not load.end:
                pairs = zip(load.asked, event.present, strict=True)
                load.found = {(k, g) for (k, groups), there in pairs for g, t in zip(groups, there, strict=True) if t}
                self._close(load)
                first, last = self._bounds(load.sequence)
                self._fetch(load, (last - first) * self._cache.block_tokens / self.compute.value)
        for load in list(self._open.values()):
            if load.end:
                self._leap(load)

    def fill(self, stats: EngineStats) -> None:
        """The tiers' counts."""
        counts = self._port.counts
        for name in FILLED:
            setattr(stats, name, getattr(counts, name))

    def check_idle(self) -> None:
        """Raises RuntimeError when a load is open though no sequence is there."""
        if self._open or self._keys:
            raise RuntimeError(f"loads {sorted(self._open)} are open though no sequence is there")

    def close(self) -> None:
        self._port.close()

    # Inside.

    def _bounds(self, sequence: Sequence) -> tuple[int, int]:
        """The first block that the table lacks, and the end of those that could be loaded: the last token is always
        computed."""
        return len(sequence.table.groups[0]), (len(sequence.tokens) - 1) // self._cache.block_tokens

    def _unknown(self, sequence: Sequence, first: int, last: int) -> list[tuple[bytes, tuple[int, ...]]]:
        """What of blocks [first, last) neither the device nor host memory has: keys and groups."""
        groups = range(len(self._cache.windows))
        found = []
        for key in sequence.table.keys[first:last]:
            lacking = tuple(g for g in groups if not self._cache.sharable(key, g) and not self._port.has_host(key, g))
            if lacking:
                found.append((key, lacking))
        return found

    def _fetch(self, load: OpenLoad, spared_s: float) -> None:
        """Begins to fetch what is there of the blocks that the sequence has not come to yet, if something of it would
        come before it is computed."""
        sequence, cache, port, found = load.sequence, self._cache, self._port, load.found
        table = sequence.table
        first, last = self._bounds(sequence)

        def present(i: int, group: int) -> bool:
            return (table.keys[i], group) in found or port.has_host(table.keys[i], group)

        end = cache.loadable(table, first, present, last) if first < last else first
        if end <= first:
            return
        if self._too_slow(load, first, end, spared_s):
            load.probes = self._loading.may(1 / port.rate(Tier.STORE))
            if not load.probes:
                return
        fetches = cache.reserve(table, end)
        if fetches is None:
            return
        load.end, load.begun = end, self._clock()
        load.pending = {f.index: (f, self._tier(f), self._bytes(f)) for f in fetches}
        load.ready = {i: Tier.DEVICE for i in range(first, end) if i not in load.pending and cache.covered(table, i)}
        load.until = load.begun + (0.0 if load.probes else self._sooner_s(load.number) + load.patience_s)
        self._add(load, [f.key for f in fetches])
        if fetches:
            self._begun.append(Load(load.number, fetches[::-1]))

    def _too_slow(self, load: OpenLoad, first: int, end: int, spared_s: float) -> bool:
        """Whether nothing would come before it is computed, or all of it much later."""
        keys, groups = load.sequence.table.keys[first:end], range(len(self._cache.windows))
        lacking = [[g for g in groups if (key, g) in load.found and not self._port.has_host(key, g)] for key in keys]
        size = sum(self._port.block_bytes[g] for each in lacking for g in each)
        if not size:
            return False
        whole_s = (self._queued(load.number, Tier.STORE) + size) / self._port.rate(Tier.STORE)
        soon_s = self._sooner_s(load.number)
        return soon_s >= spared_s + load.patience_s or whole_s > SLOW * spared_s + load.patience_s

    def _add(self, load: OpenLoad, keys: list[bytes]) -> None:
        self._open[load.number] = load
        load.sequence.load = load
        for key in keys:
            self._keys.setdefault(key, load)

    def _close(self, load: OpenLoad) -> None:
        del self._open[load.number]
        load.sequence.load = None
        for key in [*(k for k, _ in load.asked), *(f.key for f, _, _ in load.pending.values())]:
            self._forget(key, load)

    def _forget(self, key: bytes, load: OpenLoad) -> None:
        if self._keys.get(key) is load:
            del self._keys[key]

    def _arrived(self, load: OpenLoad, event: Arrived) -> None:
        entry = load.pending.pop(event.index, None)
        if entry is None:
            return
        fetch, _, size = entry
        self._forget(fetch.key, load)
        if event.ok:
            load.ready[event.index] = event.tier
            load.sequence.table.loaded.add(event.index)
            load.arrived_bytes += size
            if load.probes:
                return
            load.until = max(load.until, self._clock() + FIRST_BYTES / self._port.rate(event.tier) + load.patience_s)

    def _leap(self, load: OpenLoad) -> None:
        """The sequence goes on behind what is there. Closes a load that has nothing more to give."""
        s, tokens = load.sequence, self._cache.block_tokens
        if load.ready and s.computed % tokens == 0:
            at = s.computed // tokens
            end = self._cache.leap(s.table, at, load.end, load.ready.__contains__)
            if end > at:
                farthest = max(load.ready.values())  # also of what lies behind a window and was not loaded
                self._count(s, [(i, load.ready.get(i, farthest)) for i in range(at, end)])
                s.computed = end * tokens
                if self._cache.windowed:
                    self._cache.trim(s.table, s.computed)
                self._raise_floor(load, end, overdue=False)
        if not load.pending and not any(i * tokens >= s.computed for i in load.ready):
            self._close(load)

    def _count(self, s: Sequence, blocks: list[tuple[int, Tier]]) -> None:
        """Tokens of the prompt that were spared, where they came from; of a sequence of which nobody was told yet."""
        if s.reported:
            return
        tokens = self._cache.block_tokens
        for i, tier in blocks:
            spared = max(0, min(s.prompt_tokens, (i + 1) * tokens) - i * tokens)
            s.loaded[tier] += spared
            if tier is Tier.HOST:
                self._counts.host_hit_tokens += spared
            elif tier is Tier.STORE:
                self._counts.store_hit_tokens += spared
            else:
                self._counts.hit_tokens += spared

    def _stop(self, load: OpenLoad) -> int:
        """The first block that need not be computed, once everything before it is, as things stand."""
        at = load.sequence.computed / self._cache.block_tokens
        if not self._cache.windowed:
            return min((i for i in load.ready if i > at), default=load.end)
        stop = load.end  # one run, at the end: what lies before it may lack the blocks of a window
        while stop - 1 in load.ready and stop - 1 > at:
            stop -= 1
        return stop

    def _raise_floor(self, load: OpenLoad, floor: int, overdue: bool) -> None:
        """Blocks before `floor` are not wanted of this load any more."""
        overtaken = [i for i in load.pending if i < floor]
        if not overtaken:
            return
        for i in overtaken:
            fetch, _, _ = load.pending.pop(i)
            self._forget(fetch.key, load)
        self._floors.append((load.number, floor))
        if overdue and not load.given_up:
            load.given_up = True
            self._counts.store_loads_given_up += 1

    # Times.

    def _tier(self, fetch: Fetch) -> Tier:
        groups = [g for g, block in enumerate(fetch.blocks) if block >= 0]
        return Tier.HOST if all(self._port.has_host(fetch.key, g) for g in groups) else Tier.STORE

    def _bytes(self, fetch: Fetch) -> int:
        return sum(b for b, block in zip(self._port.block_bytes, fetch.blocks, strict=True) if block >= 0)

    def _queued(self, number: int, tier: Tier) -> int:
        """Bytes that loads before this one wait for."""
        earlier = (load for load in self._open.values() if load.number < number)
        return sum(size for load in earlier for _, t, size in load.pending.values() if t is tier)

    def _sooner_s(self, number: int) -> float:
        """Until the first blocks of a load may be there."""
        rate = self._port.rate(Tier.STORE)
        return (self._queued(number, Tier.STORE) + min(FIRST_BYTES, 2 * sum(self._port.block_bytes))) / rate

    def _left_s(self, load: OpenLoad, now: float) -> float:
        """Until all of a load is there, if it goes on as it did."""
        left = {Tier.HOST: 0, Tier.STORE: 0}
        for _, tier, size in load.pending.values():
            left[tier] += size
        store = self._port.rate(Tier.STORE)
        if load.arrived_bytes:  # its own pace, where that is slower
            store = min(store, (load.arrived_bytes + FIRST_BYTES) / max(1e-9, now - load.begun))
        ahead = self._queued(load.number, Tier.STORE) if left[Tier.STORE] else 0
        return max(left[Tier.HOST] / self._port.rate(Tier.HOST), (ahead + left[Tier.STORE]) / store)
