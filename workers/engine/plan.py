"""One step's work, as integers: what the scheduler writes and the runner reads. No torch here."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from workers.cache.orders import Load, Save
from workers.engine.contract import Probe, TokenTrace


@dataclass(slots=True)
class Chunk:
    """Consecutive rows of one sequence.

    Row i of the chunk is token `tokens[i]` at absolute position `start + i`. `tables[g]` is the sequence's block
    table in cache group g: entry b holds the positions [b * block, (b + 1) * block), so that a row at position p
    is written to block `tables[g][p // block]`; it may be longer than needed. Entries that lie wholly behind a
    group's window may be -1: they are never read. `wanted` is how many of the last rows' logits are wanted: 0, 1 to
    sample, k + 1 to check k drafts, up to all of them for logprobs of the prompt. The last `drafts` tokens are
    guesses, not yet part of the sequence. Where `probe` asks for what happens inside the layers, the runner puts into
    `seen` a trace for each of the last `drafts + 1` rows. `long`: the prompt is longer than the model's
    `long_prompt`, and its rows are rotated by other tables. Without `whole` the likeliest token of each wanted row is
    all that is asked for, and a model that is divided by its vocabulary gives no more.
    """

    id: str
    start: int
    tokens: list[int]
    tables: tuple[array[int], ...]  # each array('i')
    wanted: int
    drafts: int = 0
    probe: Probe | None = None
    seen: list[TokenTrace] | None = None
    long: bool = False
    whole: bool = True


@dataclass(slots=True)
class StepPlan:
    """Chunks in order; the rows of a step are their concatenation, T in all.

    Before it computes anything, each rank does what the plan says about the prefix store, in the order of these
    fields: `floors` (number of a load, index) gives up what that load has not yet brought of the blocks before the
    index, so that nobody but the step writes to them from now on; `saves` are copied out of the cache; `loads` begin,
    beside this and later steps. With `gather`, all ranks then tell the leader what has arrived at theirs. A block that
    is being fetched is in no chunk of the plan. Where whole experts are spread over the ranks, `experts` is the number
    of the view of them that the step goes by. With `halves` the step's rows are computed in two halves that take turns.
    """

    step: int
    chunks: list[Chunk] = field(default_factory=list)
    floors: list[tuple[int, int]] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    gather: bool = False
    experts: int = 0
    halves: bool = False

    @property
    def orders(self) -> bool:
        """Whether ranks have something to do besides computing."""
        return bool(self.floors or self.saves or self.loads or self.gather)

    @property
    def rows(self) -> int:
        return sum(len(c.tokens) for c in self.chunks)


def halved(chunks: Sequence[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
    """The same rows in the same order, half of them each; of a chunk that is divided, too. For two rows or more, and
    without probes."""
    first: list[Chunk] = []
    left = sum(len(c.tokens) for c in chunks) // 2
    if not left:
        raise ValueError("a step of fewer than two rows has no halves")
    for i, chunk in enumerate(chunks):
        count = len(chunk.tokens)
        if left >= count:
            first.append(chunk)
            left -= count
            continue
        if not left:
            break
        wanted = min(chunk.wanted, count - left)
        first.append(replace(chunk, tokens=chunk.tokens[:left], wanted=chunk.wanted - wanted, drafts=0))
        rest = replace(chunk, start=chunk.start + left, tokens=chunk.tokens[left:], wanted=wanted)
        return first, [rest, *chunks[i + 1 :]]
    return first, list(chunks[i:])
