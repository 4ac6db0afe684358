"""Whole experts over the ranks of a group: each rank computes the rows that chose one of its own.

Every rank gets all rows' outputs and adds them in the order of the gate's slots, so that the result has the bits of one
process, wherever the experts are. That is a placement of the router's: ranks load what they gain beside their steps,
and all of them change over before the same step, whose plan says so.

T rows, H hidden, k slots per row, S slots in all.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.experts.keeper import Keeper
from workers.experts.placement import (
    DispatchReport,
    HostAddress,
    HostReport,
    HostsView,
    Placement,
    rank_name,
    rank_of,
    spread_placement,
)
from workers.experts.shelf import Place, Shelf
from workers.experts.split import Split
from workers.kernels.ops import Experts, Ops
from workers.model.load import Loader
from workers.model.spec import MoeFfn
from workers.parallel.group import Group
from workers.parallel.share import Share


class Spread:
    """One rank's part in all layers. `latest`, `adopt` and what layers ask are for the thread of the steps, all else is
    for any. `start` it when the model is loaded, `close` it at the end."""

    def __init__(self, shelf: Shelf, share: Share, group: Group) -> None:
        self.shelf, self.group = shelf, group
        self._share = share
        self.keeper = Keeper(shelf, f"rank {share.rank}")
        self._slot = {layer: i for i, layer in enumerate(shelf.layers)}
        self._offered: dict[int, HostsView] = {}
        self._lock = threading.Lock()
        self._capacity = 0
        first = spread_placement(shelf.layers, shelf.experts, share.size)
        self._view = HostsView(0, first, ())
        self._splits = _splits(first)

    def experts(self, ffn: MoeFfn, _hidden: int, prefix: str, _load: Loader) -> Experts:
        """The experts of a layer, as `workers.model.load.Loader.experts_factory`: packs this rank's."""
        layer = int(prefix.rpartition(".")[2])
        for expert in self._share.some(ffn.experts):
            self.shelf.load((layer, expert))
        return SpreadExperts(self, layer, self.shelf.ops)

    def start(self, room: int) -> None:
        """`room`: how many more experts than its own this rank has memory for."""
        self._capacity = min(len(self.shelf.held) + room, sum(self.shelf.experts))
        self.keeper.start()

    # What the group's supervisor says and asks ------------------------------------------------------------------------

    def offer(self, view: HostsView) -> None:
        """A newer placement. Other ranks are to have it before rank 0 has."""
        with self._lock:
            if view.number > self._view.number:
                self._offered[view.number] = view

    def hold(self, places: list[Place]) -> None:
        """See `Keeper.hold`."""
        self.keeper.hold(places)

    def keep(self, places: list[Place]) -> None:
        """See `Keeper.keep`."""
        self.keeper.keep(places)

    def host(self, node: str) -> HostReport:
        """This rank as an expert host of its group."""
        address = HostAddress(rank_name(self._share.rank), 1, "", "", self._capacity)
        return self.keeper.report(address, node)

    def report(self) -> DispatchReport:
        """What is in force."""
        return DispatchReport(self._view.placement.version, self._view.number, (), 0, 0)

    def close(self) -> None:
        """Idempotent."""
        self.keeper.stop()

    # What a step asks -------------------------------------------------------------------------------------------------

    def latest(self) -> int:
        """The number of the newest view, for rank 0 to put into the plan of a step."""
        with self._lock:
            return max(self._offered, default=self._view.number)

    def adopt(self, number: int) -> None:
        """Before a step: the view that its plan names. Raises RuntimeError where this rank was not handed it."""
        if number == self._view.number:
            return
        with self._lock:
            view = self._offered.pop(number, None)
            if view is None:
                raise RuntimeError(f"placement view {number} of the experts was not handed to this rank")
            self._offered = {n: v for n, v in self._offered.items() if n > number}
            self._view = view
        self._splits = _splits(view.placement)

    def ranks(self, layer: int, experts: NDArray[np.int32]) -> NDArray[np.int64]:
        """The rank that computes each slot, the same at all of them. [S] -> [S]"""
        return self._splits[self._slot[layer]](experts)


@dataclass(frozen=True, slots=True)
class SpreadExperts:
    """One layer's. See `workers.kernels.ops.Experts`."""

    spread: Spread
    layer: int
    ops: Ops

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], ids int32 [T, k], weights float32 [T, k] -> [T, H]"""
        (t, k), group = ids.shape, self.spread.group
        experts = ids.reshape(-1).cpu().numpy()
        ranks = self.spread.ranks(self.layer, experts)
        order = np.argsort(ranks, kind="stable")
        counts = np.bincount(ranks, minlength=group.size).tolist()
        begin = sum(counts[: group.rank])
        here = order[begin : begin + counts[group.rank]]
        rows = x[:0]
        if len(here):
            of = torch.from_numpy((here // k).astype(np.int32)).to(x.device)
            rows = self.spread.keeper.compute(self.layer, x, of, experts[here])
        outputs = x.new_empty(t * k, x.shape[1])
        outputs[torch.from_numpy(order).to(x.device)] = torch.cat(group.gather(rows, counts=counts))
        return self.ops.combine(outputs.view(t, k, -1), weights)


def _splits(placement: Placement) -> list[Split]:
    """Of each layer, to numbers of ranks."""
    ranks = [rank_of(name) for name in placement.hosts]
    return [Split([tuple((ranks[host], share) for host, share in of) for of in row]) for row in placement.table]
