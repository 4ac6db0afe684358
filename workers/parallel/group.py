"""Collectives as a value that is passed in. Every rank calls the same methods in the same order.

Sums are taken over the ranks' tree (`workers.parallel.share.tree`), in float32, and rounded once: every rank gets the
same bits, each time. `tests/contract/test_groups.py` runs one suite over every implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from workers.parallel.share import tree


class Group(Protocol):
    """Ranks 0 .. size - 1 that compute together; rank 0 leads. Used by one thread of each rank.

    Raises GroupBroken from any method, at every rank, once one of them is lost.
    """

    rank: int
    size: int
    kind: str  # for people and metrics

    def sum(self, x: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        """The sum of all ranks' x [T, N] (float32, or `dtype`), plus bias (float32 [N]), rounded once to `dtype`."""

    def gather(self, x: Tensor, root: int | None = None, counts: Sequence[int] | None = None) -> list[Tensor]:
        """All ranks' x, in the order of ranks. Shape and dtype are the same everywhere, but for the first size, which
        every rank then tells of all in `counts`. Where `root` is given only that rank gets them, the others an empty
        list."""

    def tell(self, message: bytes) -> None:
        """Rank 0 says something to the others, who `hear` it; does not wait until they have."""

    def hear(self) -> bytes:
        """What rank 0 tells next; waits as long as it takes."""

    def exchange(self, message: bytes) -> list[bytes]:
        """Everybody's message, in the order of ranks. For small ones."""

    def abort(self, why: str) -> None:
        """Breaks the group: for every rank on this machine, for those elsewhere once this process has ended.
        Idempotent; may be called from any thread."""

    def close(self) -> None:
        """Gives back what this rank holds. Idempotent."""


class Alone:
    """A group of one: nothing to wait for."""

    rank, size, kind = 0, 1, "alone"

    def sum(self, x: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        if bias is None:
            return x.to(dtype)
        return (x.float() + bias).to(dtype)

    def gather(self, x: Tensor, root: int | None = None, counts: Sequence[int] | None = None) -> list[Tensor]:
        return [x]

    def tell(self, message: bytes) -> None:
        """There is nobody."""

    def hear(self) -> bytes:
        raise RuntimeError("rank 0 leads; nobody tells it anything")

    def exchange(self, message: bytes) -> list[bytes]:
        return [message]

    def abort(self, why: str) -> None:
        """There is nobody."""

    def close(self) -> None:
        """It holds nothing."""


ALONE = Alone()


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """The parts added over their tree: float32, not rounded."""
    sums = [part.float() for part in parts]
    for a, b in tree(len(sums)):
        sums[a] = sums[a] + sums[b]
    return sums[0]
