"""Experts of one layer and the ranks: a slice of each at every rank, or experts elsewhere that all ranks ask. Whole
experts over the ranks are in `workers.experts.spread`.

T rows, H hidden, E experts, k slots per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.kernels.ops import Experts
from workers.parallel.group import Group, tree_sum
from workers.parallel.share import Share


class SlicedExperts:
    """Every rank has some columns of each expert, in parts; their weighted sums are added as a linear's are."""

    def __init__(self, parts: Sequence[Experts], group: Group) -> None:
        self._parts, self._group = list(parts), group

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids int32 [T, k], weights float32 [T, k] -> [T, H]"""
        sums = [part(x, ids, weights) for part in self._parts]
        return self._group.sum(sums[0] if len(sums) == 1 else tree_sum(sums), x.dtype)


class StartedExperts(Experts, Protocol):
    """Experts elsewhere."""

    def start(self, x: Tensor, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """Sends the rows; what is returned waits for their results and adds them by the weights."""


class SharedRows:
    """Experts that every rank can ask, each for its share of the rows."""

    def __init__(self, experts: StartedExperts, share: Share, group: Group) -> None:
        self._experts, self._share, self._group = experts, share, group

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids int32 [T, k], weights float32 [T, k] -> [T, H]"""
        return self.start(x, ids)(weights)

    def start(self, x: Tensor, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """As that of experts elsewhere: `workers.experts.dispatch.RemoteExperts`."""
        rows = [self._share.of_rank(len(x), rank) for rank in range(self._group.size)]
        some = slice(rows[self._group.rank].start, rows[self._group.rank].stop)
        finish = self._experts.start(x[some], ids[some]) if some.start < some.stop else None

        def end(weights: Tensor) -> Tensor:
            mine = x[:0] if finish is None else finish(weights[some])
            return torch.cat(self._group.gather(mine, counts=[len(r) for r in rows]))

        return end


def shared_rows(make: Callable[..., StartedExperts], share: Share, group: Group) -> Callable[..., Experts]:
    """A factory of experts that are elsewhere, as one that divides their rows over the ranks."""
    if group.size == 1:
        return make

    def made(*arguments: Any) -> Experts:
        return SharedRows(make(*arguments), share, group)

    return made
