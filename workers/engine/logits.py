"""Logits of a step that nobody has as a whole, because the vocabulary is divided over ranks or most of it was not
computed: the likeliest of every row, and whole rows where asked for.

S rows, W of them whole, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from workers.kernels.ops import Ops
from workers.parallel.group import Group
from workers.parallel.share import Share


class DividedLogits:
    """What the leader has of logits [S, V]. `ids` and `values` [S]: each row's likeliest token and its logit; `place`
    [S]: where a row lies in `whole` [W, V], or -1."""

    def __init__(self, ids: Tensor, values: Tensor, place: Sequence[int], whole: Tensor) -> None:
        self.ids, self.values, self._place, self._whole = ids, values, place, whole

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: slice | list[int]) -> DividedLogits:
        place = self._place[which] if isinstance(which, slice) else [self._place[i] for i in which]
        return DividedLogits(self.ids[which], self.values[which], place, self._whole)

    def rows(self, which: Sequence[int]) -> Tensor:
        """Whole rows [len(which), V]. Raises ValueError for one that nobody said was wanted whole."""
        places = [self._place[i] for i in which]
        if min(places, default=0) < 0:
            raise ValueError(f"row {which[places.index(-1)]} of the step was not asked for as a whole")
        return self._whole if places == list(range(len(self._whole))) else self._whole[places]


Logits: TypeAlias = Tensor | DividedLogits


def likeliest_only(ids: Tensor, values: Tensor) -> DividedLogits:
    """Of rows that nobody wants whole: their likeliest tokens int64 [S] and the logits of those."""
    return DividedLogits(ids, values, [-1] * len(ids), values.new_zeros(0, 0))


def whole_rows(logits: Logits, which: Sequence[int] | None = None) -> Tensor:
    """Rows of logits as they are: [len(which), V]; None: all."""
    if isinstance(logits, DividedLogits):
        return logits.rows(range(len(logits)) if which is None else which)
    every = which is None or len(which) == len(logits)
    rows: Tensor = logits if every else logits[which]
    return rows


def collect(
    mine: Tensor, wanted_whole: Sequence[bool], vocabulary: int, share: Share, group: Group, ops: Ops
) -> Logits:
    """From each rank's columns [S, V / size] to what the leader needs; the other ranks get theirs back."""
    if group.size == 1 or not len(mine):
        return mine
    ids = ops.argmax(mine)
    values = mine.gather(1, ids[:, None])[:, 0].float()
    first = share.some(vocabulary).start
    found = group.gather(torch.stack([(ids + first).double(), values.double()], dim=1), root=0)
    places = [i for i, whole in enumerate(wanted_whole) if whole]
    parts: list[Tensor] = []
    if places:
        most = len(share.of_rank(vocabulary, 0))
        some = mine if len(places) == len(mine) else mine[places]
        if some.shape[1] < most:
            some = torch.nn.functional.pad(some, (0, most - some.shape[1]))
        parts = group.gather(some, root=0)
    if group.rank:
        return mine
    each = torch.stack(found).cpu().numpy()  # [size, S, 2]
    best = each[:, :, 1].argmax(axis=0)  # the lowest rank of equals, and a NaN before all: as Ops.argmax has it
    chosen = each[best, np.arange(len(mine))]
    cut = [part[:, : len(share.of_rank(vocabulary, rank))] for rank, part in enumerate(parts)]
    place = np.full(len(mine), -1)
    place[places] = np.arange(len(places))
    return DividedLogits(
        torch.from_numpy(chosen[:, 0].astype(np.int64)),
        torch.from_numpy(chosen[:, 1].astype(np.float32)),
        place.tolist(),
        torch.cat(cut, dim=1) if cut else mine[:0],
    )
