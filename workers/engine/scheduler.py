"""Which rows the next step computes. Integers only: no torch, no clock.

The rules, in order:

1. Every decoding sequence gets its row, in every step. That is the whole of fairness among decoders: nobody takes
   turns, nobody waits for a prompt, however long.
2. What is left of `chunk_tokens`, but at most half of it while anybody decodes (a step is what a decoder waits for),
   goes to prompts under way, by rank (larger priority, then first come).
3. What is left then admits waiting sequences, by rank, while `max_running` and the blocks allow. The first that does
   not fit stops admission, so that a large one is not overtaken for ever by small ones. One in eight is whoever has
   waited longest, of any rank (`workers.engine.turns`).
   Members of a family (`workers.engine.family`) whose prompt is being computed are passed over until it is, and so are
   those whose next block is being loaded for another (`workers.engine.loads`).
4. When blocks run out, the running sequence of the worst rank gives all of its blocks back and waits; it is computed
   again later, prompt and answer so far, as a prompt (and finds those of its blocks that were not needed meanwhile in
   the prefix tree). The best rank is never preempted, so some sequence always advances.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from workers.cache.manager import CacheManager
from workers.cache.orders import StorePort
from workers.engine.contract import EngineStats
from workers.engine.family import Families
from workers.engine.loads import PATIENCE, Loads
from workers.engine.plan import Chunk, StepPlan
from workers.engine.sequence import Sequence
from workers.engine.turns import Turns

PROMPT_LOGIT_ROWS = 64  # rows per step of a prompt whose logprobs are wanted: they need a row of logits each
# Rows of decoding and drafts, above which a step of drafts is no longer nearly as short as one without.
DRAFTED_ROWS = 32

_rank = attrgetter("rank")


def _class(sequence: Sequence) -> int:
    """0 below priority 0, 1 at it, 2 above."""
    return (sequence.request.priority >= 0) + (sequence.request.priority > 0)


class Scheduler:
    """Waiting and running sequences, and their blocks.

    | owns | does not own |
    |---|---|
    | order of sequences, rows per step | what a token is, when an answer ends |
    | when blocks are taken, published, given back | where blocks lie: the runner |
    """

    def __init__(
        self,
        cache: CacheManager,
        max_running: int,
        chunk_tokens: int,
        store: StorePort | None = None,
        patience: float | None = None,
    ) -> None:
        for name, value in (("max_running", max_running), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.cache = cache
        self.max_running = max_running
        self.chunk_tokens = chunk_tokens
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # by rank
        self.families = Families(cache)
        self._turns = Turns()
        self.counts = EngineStats()  # those that run since the start
        self.loads: Loads | None = None
        if store is not None:
            self.loads = Loads(store, cache, self.counts, patience=PATIENCE if patience is None else patience)
        self._waiting_tokens = [0, 0, 0]  # by class of priority
        self._windowed = any(window is not None for window in cache.windows)
        self.planned: list[Sequence] = []  # whose chunks the latest plan holds, in its order
        self._preempted = False  # in the step being planned

    def refusal(self, prompt_tokens: int, max_tokens: int) -> str | None:
        """Why a sequence of these sizes can never run; None when it can."""
        positions = prompt_tokens + max_tokens - 1  # the last token is never computed
        if self.cache.fits(positions, self.chunk_tokens):
            return None
        return (
            f"{prompt_tokens} prompt tokens and {max_tokens} more need more blocks than the whole cache has; "
            "ask for fewer tokens or give the engine more cache_bytes"
        )

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. It must be able to run: ask `refusal`."""
        if sequence.request.family:
            self.families.join(sequence)
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """A sequence leaves, finished or not; its blocks are free from now on."""
        if self.loads is not None:
            self.loads.drop(sequence)
        if sequence.running:
            self.running.remove(sequence)
            sequence.running = False
        else:
            self.waiting.remove(sequence)
            self._waiting_tokens[_class(sequence)] -= len(sequence.tokens)
        if sequence.family is not None:
            self.families.leave(sequence, sequence.family)
        self.cache.close(sequence.table)

    def schedule(self) -> StepPlan:
        """The next step's rows: decoding first, then prompts; `planned[i]` is the sequence of chunk i.

        Empty only when nothing is there to run, or everybody waits for a load. Rows of prompts never exceed what
        decoding leaves of `chunk_tokens`; rows of decoding are at most `max_running`.
        """
        plan, self.planned, self._preempted = StepPlan(self.counts.steps), [], False
        decoding = [s for s in self.running if len(s.tokens) - s.computed == 1]
        prompts = [s for s in self.running if len(s.tokens) - s.computed > 1]
        for sequence in decoding:
            self._give(plan, sequence, 1)
        budget = self.chunk_tokens - len(plan.chunks)
        if plan.chunks:
            budget = min(budget, (self.chunk_tokens + 1) // 2)
        for sequence in prompts:
            if budget <= 0:
                break
            budget -= self._give(plan, sequence, min(sequence.left, budget))
        while budget > 0 and (admitted := self._admit()) is not None:
            budget -= self._give(plan, admitted, min(admitted.left, budget))
        if self.loads is not None:
            self.loads.orders(plan)
        return plan

    def room_for_drafts(self, plan: StepPlan, most: int) -> list[tuple[Chunk, Sequence, int]]:
        """Chunks of decoding sequences that may be followed by drafts, and by how many: at most `most`, while rows are
        left in the step and it stays small, and no further than the answer may go."""
        each = min(most, DRAFTED_ROWS // max(1, len(plan.chunks)) - 1)
        room = min(self.chunk_tokens, DRAFTED_ROWS) - plan.rows
        result = []
        for chunk, sequence in zip(plan.chunks, self.planned, strict=True):
            if len(chunk.tokens) == 1 and chunk.wanted and sequence.made:
                count = min(each, room, sequence.request.max_tokens - sequence.made - 1)
                if count > 0:
                    result.append((chunk, sequence, count))
                    room -= count
        return result

    def add_drafts(self, chunk: Chunk, sequence: Sequence, drafts: list[int]) -> None:
        """Appends guesses to a chunk of this step, unless it would take a block from somebody."""
        end = chunk.start + len(chunk.tokens) + len(drafts)
        if drafts and self.cache.can_allocate(sequence.table, end):
            self.cache.allocate(sequence.table, end)
            chunk.tokens += drafts
            chunk.wanted += len(drafts)
            chunk.drafts = len(drafts)
            self.counts.drafted_tokens += len(drafts)

    def accept_drafts(self, chunk: Chunk, count: int) -> None:
        """The first `count` drafts were right. The others leave the plan; what was written of them is written over."""
        wrong = chunk.drafts - count
        if wrong:
            del chunk.tokens[-wrong:]
        chunk.drafts = 0

    def advance(self, plan: StepPlan) -> None:
        """The plan's rows are computed, and its drafts are accepted or gone: publishes the blocks that became full,
        gives back those behind a window."""
        self.counts.steps += 1
        for chunk, sequence in zip(plan.chunks, self.planned, strict=True):
            sequence.computed += len(chunk.tokens)
            if not sequence.request.bypass_prefix_cache:
                self.cache.register(sequence.table, sequence.root, sequence.tokens, sequence.computed)
            if sequence.family is not None:
                self.families.computed(sequence, sequence.family)
            if self._windowed:
                self.cache.trim(sequence.table, sequence.computed)

    def stats(self) -> EngineStats:
        """Counts at this moment. The same object every time: copy what must not change."""
        counts = self.counts
        counts.running, counts.waiting = len(self.running), len(self.waiting)
        left = list(self._waiting_tokens)
        for sequence in self.running:
            if sequence.left > 1:
                left[_class(sequence)] += sequence.left
        counts.waiting_prefill_tokens, counts.waiting_prefill_urgent = sum(left), left[2]
        counts.waiting_prefill_normal = left[1] + left[2]
        counts.blocks_in_use, counts.blocks_cached = self.cache.blocks_in_use, self.cache.blocks_kept
        return counts

    # Inside one step.

    def _give(self, plan: StepPlan, sequence: Sequence, rows: int) -> int:
        """Plans `rows` of a running sequence, taking blocks from worse ranks if need be.

        Returns the rows planned: 0 when the sequence is, or becomes, preempted.
        """
        if sequence.load is not None and self.loads is not None and sequence.running:
            rows = self.loads.limit(sequence, rows)
            if not rows:
                return 0
        asked = sequence.told is not None and sequence.asks_prompt
        if asked:
            rows = min(rows, PROMPT_LOGIT_ROWS)
        end = sequence.computed + rows
        while sequence.running and not self.cache.can_allocate(sequence.table, end):
            if not self.families.let_go():
                self._preempt(plan, self.running[-1])
        if not sequence.running:
            return 0
        self.cache.allocate(sequence.table, end)
        tokens = sequence.tokens[sequence.computed : end]
        wanted = rows if asked else int(end == len(sequence.tokens))
        chunk = Chunk(sequence.id, sequence.computed, tokens, sequence.table.groups, wanted, long=sequence.long)
        plan.chunks.append(chunk)
        self.planned.append(sequence)
        if rows > 1 or end <= sequence.prompt_tokens:
            self.counts.computed_prompt_tokens += rows
        return rows

    def _preempt(self, plan: StepPlan, victim: Sequence) -> None:
        """Takes a running sequence's blocks, and its rows if this step had given it some."""
        if victim in self.planned:
            at = self.planned.index(victim)
            del self.planned[at], plan.chunks[at]
        self.running.remove(victim)
        if self.loads is not None:
            self.loads.drop(victim)
        self.cache.free(victim.table)
        if victim.family is not None:
            self.families.interrupted(victim, victim.family)
        victim.running, victim.computed = False, 0
        self._wait(victim)
        self.counts.preemptions += 1
        self._preempted = True

    def _wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)
        self._waiting_tokens[_class(sequence)] += len(sequence.tokens)

    def _admit(self) -> Sequence | None:
        """Lets the first waiting sequence run if there is room; not in a step that had to preempt."""
        if not self.waiting or self._preempted or len(self.running) >= self.max_running:
            return None
        for sequence in self._turns.order(self.waiting):
            if self._passed_over(sequence):
                continue
            hit, looked = 0, not sequence.request.bypass_prefix_cache and not sequence.asks_prompt
            if looked:
                hit = self.cache.match(sequence.table, sequence.root, sequence.tokens)
            if self.loads is None or not looked or not self.loads.covers(sequence, hit // self.cache.block_tokens):
                return self._admit_one(sequence, hit, looked)
            self.cache.free(sequence.table)
        return None

    def _admit_one(self, sequence: Sequence, hit: int, looked: bool) -> Sequence | None:
        """Lets a waiting sequence run if there is room; `hit` positions are in its table. `looked`: those that are
        wanting may be elsewhere."""
        family = sequence.family
        if family is not None:
            hit = self.families.share(sequence, family, hit)
        if self.running and not self._room_for(sequence):
            self.cache.free(sequence.table)
            return None
        self.waiting.remove(sequence)
        self._waiting_tokens[_class(sequence)] -= len(sequence.tokens)
        self._turns.admitted(sequence, self.waiting)
        insort(self.running, sequence, key=_rank)
        sequence.running, sequence.computed = True, hit
        if sequence.cached is None:
            self._introduce(sequence, hit)
        if family is not None:
            self.families.admitted(sequence, family)
        if self.loads is not None and looked:
            better = (s.left for s in self.running if s.left > 1 and s.load is None and s.rank < sequence.rank)
            self.loads.begin(sequence, sum(better))
        return sequence

    def _introduce(self, sequence: Sequence, hit: int) -> None:
        """First admission: how much of the prompt was cached. Members of a family say what the first of them did:
        what they share was computed for them."""
        family = sequence.family
        if family is not None and family.known and not sequence.asks_prompt:
            sequence.cached, sequence.loaded = family.cached, family.loaded
        else:
            sequence.cached = min(hit, sequence.prompt_tokens)
            self.counts.queried_tokens += sequence.prompt_tokens
            self.counts.hit_tokens += sequence.cached
        if family is not None:
            self.families.introduced(sequence, family)

    def _passed_over(self, sequence: Sequence) -> bool:
        return sequence.family is not None and self.families.waits(sequence, sequence.family)

    def _room_for(self, newcomer: Sequence) -> bool:
        """Whether the newcomer's whole prompt fits beside what running sequences still need for theirs and one more
        block for each, so that admission does not lead straight to preemption."""
        for group in range(len(self.cache.windows)):
            promised = len(self.running)
            for sequence in (*(s for s in self.running if s.left > 1), newcomer):
                peak = self.cache.peak(len(sequence.tokens), self.chunk_tokens, group)
                promised += max(0, peak - self.cache.held(sequence.table, group))
            if promised > self.cache.available(group):
                return False
        return True
