"""Which part of a model a rank holds: arithmetic over a spec, no torch.

Attention is divided by heads, a feed-forward by the columns of its first half and the rows of its second, embedding and
head by the vocabulary (https://arxiv.org/abs/1909.08053, section 3). Keys and values are divided by their heads where
there are enough, else each is held by several ranks; latents (MLA) are held by all. Experts are divided like a
feed-forward, or spread whole over the ranks.

The invariant option cuts every sum over ranks into the same PARTS at each degree, which are added over one fixed tree:
a rank's parts are a subtree of it. So the degrees that have it give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from understudy.errors import ConfigError
from workers.model.spec import Attention, DenseFfn, ModelSpec, MoeFfn

MOST_RANKS = 16  # of a group
PARTS = 8  # of a sum, under the invariant option, where its length allows it


@dataclass(frozen=True, slots=True)
class Share:
    """What rank `rank` of `size` holds. `invariant`: sums go over the fixed tree, also at size 1. `whole_experts`:
    each expert lies whole at one rank."""

    rank: int = 0
    size: int = 1
    invariant: bool = False
    whole_experts: bool = False

    @property
    def alone(self) -> bool:
        """Whether nothing is divided and no sum is cut."""
        return self.size == 1 and not self.invariant

    def even(self, n: int) -> range:
        """This rank's of `n` things that divide by the size."""
        each = n // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def of_rank(self, n: int, rank: int) -> range:
        """A rank's of `n` things that need not divide: the first ranks have one more."""
        each, more = divmod(n, self.size)
        begin = rank * each + min(rank, more)
        return range(begin, begin + each + (rank < more))

    def some(self, n: int) -> range:
        """This rank's of `n` things that need not divide."""
        return self.of_rank(n, self.rank)

    def kv_heads(self, a: Attention) -> range:
        """The KV heads that this rank's query heads read, which several ranks may hold."""
        if a.latent is not None:
            return range(1)
        if a.kv_heads >= self.size:
            return self.even(a.kv_heads)
        one = self.rank * a.kv_heads // self.size
        return range(one, one + 1)

    def attention(self, a: Attention) -> Attention:
        """What this rank has of it: its query heads, and the KV heads that those read."""
        return replace(a, heads=len(self.even(a.heads)), kv_heads=a.kv_heads if a.latent else len(self.kv_heads(a)))

    @property
    def numerics(self) -> str:
        """What it adds to a numerics id: how sums are cut decides their bits."""
        if not self.invariant and self.size == 1:
            return ""
        sums = f"/tree-{PARTS}" if self.invariant else f"/tensor-parallel-{self.size}"
        return sums + ("/whole-experts" if self.whole_experts else "")

    def summed(self, units: int) -> list[range]:
        """This rank's parts of a sum over `units` (heads, or columns), each a part of its own in the tree."""
        mine = self.even(units)
        parts = tree_parts(units) // self.size if self.invariant else 1
        each = len(mine) // parts
        return [range(begin, begin + each) for begin in range(mine.start, mine.stop, each)]


ALONE = Share()


def tree_parts(units: int) -> int:
    """How many parts a sum over `units` is cut into under the invariant option."""
    return math.gcd(PARTS, units)


def tree(count: int) -> Iterator[tuple[int, int]]:
    """The order of a sum over `count` parts: for each (a, b), part a becomes a + b. Neighbours first, then their sums:
    of 4, (0, 1), (2, 3), (0, 2)."""
    step = 1
    while step < count:
        for a in range(0, count - step, 2 * step):
            yield a, a + step
        step *= 2


def misfit(spec: ModelSpec, size: int, invariant: bool = False, whole_experts: bool = False) -> str:
    """Why a model cannot be divided over `size` ranks; empty where it can."""
    a = spec.attention
    if a.heads % size:
        return f"its {a.heads} query heads cannot be divided evenly"
    if a.latent is None and a.kv_heads % size and size % a.kv_heads:
        return f"its {a.kv_heads} KV heads can neither be divided nor repeated evenly"
    if invariant and tree_parts(a.heads) % size:
        return f"its {a.heads} query heads make {tree_parts(a.heads)} parts of the invariant sum"
    for ffn in dict.fromkeys(spec.ffn):
        for what, units in _summed_sizes(ffn, whole_experts):
            if units % size:
                return f"{what} of {units} columns cannot be divided evenly"
            if invariant and tree_parts(units) % size:
                return f"{what} of {units} columns makes {tree_parts(units)} parts of the invariant sum"
        if isinstance(ffn, MoeFfn) and whole_experts and ffn.experts < size:
            return f"its layers have {ffn.experts} experts, fewer than ranks"
    return ""


def check_degree(
    spec: ModelSpec, size: int, invariant: bool = False, whole_experts: bool = False, key: str = "tensor_parallel"
) -> None:
    """Raises ConfigError with the numbers, and the degrees that work, unless `size` ranks can share the model."""
    if size < 1:
        raise ConfigError(f"{key}: {size} is below 1")
    if whole_experts and not any(isinstance(ffn, MoeFfn) for ffn in spec.ffn):
        raise ConfigError(f"expert_parallel: {spec.architecture} has no experts; leave it off")
    if why := misfit(spec, size, invariant, whole_experts):
        work = [n for n in range(1, MOST_RANKS + 1) if not misfit(spec, n, invariant, whole_experts)]
        near = sorted(sorted(work, key=lambda n: (abs(n - size), n))[:4])
        option = " with the invariant sum" if invariant else ""
        raise ConfigError(
            f"{key}: {size} ranks cannot share this {spec.architecture}{option}: {why}; "
            f"the nearest that work: {', '.join(map(str, near)) or 'none'}"
        )


def _summed_sizes(ffn: DenseFfn | MoeFfn, whole_experts: bool) -> Iterator[tuple[str, int]]:
    if isinstance(ffn, DenseFfn):
        yield "a feed-forward", ffn.size
        return
    if not whole_experts:
        yield "an expert", ffn.size
    if ffn.shared:
        yield "a shared expert", ffn.shared
