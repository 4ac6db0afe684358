"""Where rows go while certain hosts are there: a placement, changed only for experts whose homes are all lost. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workers.experts.placement import HostsView
from workers.experts.split import Split

Place = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True, slots=True)
class Table:
    """`splits` of each layer, for the hosts that are `present`. `moved`: who has experts instead of their lost homes;
    `homeless`: how many nobody has and nobody has room for."""

    splits: list[Split]
    present: frozenset[str]
    moved: dict[Place, str]
    homeless: int


def arrange(view: HostsView, present: frozenset[str], before: Mapping[Place, str]) -> Table:
    """The homes that are left of each expert; one that has none goes where there is most room, ties by name.

    The same hosts and losses give the same homes. What was moved `before` stays where it is.
    """
    placement = view.placement
    room = {h.name: h.capacity for h in view.hosts if h.name in present}
    for row in placement.table:
        for of in row:
            for host, _ in of:
                if (name := placement.hosts[host]) in room:
                    room[name] -= 1
    index = {name: i for i, name in enumerate(placement.hosts) if name in room}
    here = set(index.values())
    moved: dict[Place, str] = {}
    splits, homeless = [], 0
    for layer, row in zip(placement.layers, placement.table, strict=True):
        homes = []
        for expert, of in enumerate(row):
            left = tuple(home for home in of if home[0] in here)
            if not left:
                stand_in = before.get((layer, expert), "")
                if stand_in := stand_in if stand_in in index else _roomiest(room, index):
                    room[stand_in] -= 1
                    moved[layer, expert] = stand_in
                    left = ((index[stand_in], 1.0),)
            homes.append(left)
            homeless += not left
        splits.append(Split(homes))
    return Table(splits, present, moved, homeless)


def _roomiest(room: Mapping[str, int], index: Mapping[str, int]) -> str:
    """The host of the placement with most room; "" where none has any."""
    return max((name for name in index if room[name] > 0), key=lambda name: (room[name], name), default="")
