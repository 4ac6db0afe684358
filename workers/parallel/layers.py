"""What a divided model is made of beside its operations: sums over ranks, and rows of a divided table.

T rows, H hidden, V vocabulary; K and N of a linear.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.kernels.ops import Linear, Ops
from workers.parallel.group import Group, tree_sum


class RowParallel:
    """A linear whose inputs are divided over the ranks, and here over parts: the sum over all of them.

    Each part is rounded to the dtype, the parts are added in float32 over one tree, the bias then, and the result is
    rounded once.
    """

    def __init__(self, parts: Sequence[Linear], bias: Tensor | None, group: Group) -> None:
        self.n, self.k = parts[0].n, sum(part.k for part in parts)
        self._parts, self._bias, self._group = list(parts), bias, group

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        if len(self._parts) == 1:
            y = self._parts[0](x)
        else:
            cuts = x.split([part.k for part in self._parts], dim=1)
            y = tree_sum([part(cut) for part, cut in zip(self._parts, cuts, strict=True)])
        return self._group.sum(y, x.dtype, self._bias)


class DividedTable:
    """Rows [first, first + n) of a table [V, H] that the ranks hold together."""

    def __init__(self, table: Tensor, first: int, group: Group) -> None:
        self.table = table
        self._first, self._group = first, group

    def __call__(self, ops: Ops, ids: Tensor) -> Tensor:  # int64 [T] -> [T, H]
        here = (ids >= self._first) & (ids < self._first + len(self.table))
        x = ops.embed(self.table, torch.where(here, ids - self._first, 0))
        x.masked_fill_(~here[:, None], -0.0)  # which changes no bit of what it is added to
        return self._group.sum(x, x.dtype)


def gather_heads(x: Tensor, group: Group, holders: int) -> Tensor:
    """All ranks' [T, N] side by side, of `holders` ranks in a row that have the same only the first's."""
    return torch.cat(group.gather(x)[::holders], dim=1)
