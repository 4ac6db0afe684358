"""Which host has which experts, as data that crosses the cluster. No torch: the router knows it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from workers.parallel.share import Share

Homes = tuple[tuple[int, float], ...]  # of one expert: (index of a host, its share of the rows); shares sum to 1


class Placement(msgspec.Struct, frozen=True):
    """Where every expert is; hot ones at several hosts.

    `layers` are the model's layers that have experts, `hosts` the hosts' names, and `table[i][e]` the homes of expert
    e of layer `layers[i]`. A greater `version` is newer.
    """

    version: int
    layers: tuple[int, ...]
    hosts: tuple[str, ...]
    table: tuple[tuple[Homes, ...], ...]

    def held_by(self, host: str) -> list[tuple[int, int]]:
        """(layer, expert) of all that a host has, in order."""
        if host not in self.hosts:
            return []
        index = self.hosts.index(host)
        return [
            (self.layers[i], expert)
            for i, row in enumerate(self.table)
            for expert, homes in enumerate(row)
            if any(home == index for home, _ in homes)
        ]

    @property
    def copies(self) -> int:
        """Experts in memory of all hosts together."""
        return sum(len(homes) for row in self.table for homes in row)


def rank_name(rank: int) -> str:
    """A rank as the host of a placement."""
    return f"r{rank}"


def rank_of(name: str) -> int:
    """The inverse."""
    return int(name[1:])


def spread_placement(layers: Sequence[int], experts: Sequence[int], ranks: int) -> Placement:
    """Where whole experts lie when the ranks of a group have just loaded them: in runs, `experts[i]` of `layers[i]`."""
    share = Share(size=ranks)
    table = tuple(
        tuple(((rank, 1.0),) for rank in range(ranks) for _ in share.of_rank(count, rank)) for count in experts
    )
    return Placement(1, tuple(layers), tuple(map(rank_name, range(ranks))), table)


class HostAddress(msgspec.Struct, frozen=True):
    """One life of a host: `life` counts them. `local` is the name of its socket on its own node, `tcp` HOST:PORT.
    `capacity` is how many experts it has room for. A rank that is a host has no socket: both are empty."""

    name: str
    life: int
    local: str
    tcp: str
    capacity: int


class HostsView(msgspec.Struct, frozen=True):
    """A placement and where its hosts are. `number` grows with each one that is handed out."""

    number: int
    placement: Placement
    hosts: tuple[HostAddress, ...]


class ExpertsPlan(msgspec.Struct, frozen=True):
    """What an engine has to know whose experts are elsewhere.

    `secret`: what both ends of a channel know. `silence_s`: a host that says nothing for so long is lost. `wait_s`: how
    long a step waits for experts that no host has.
    """

    view: HostsView
    secret: str
    silence_s: float = 2.0
    wait_s: float = 30.0

    def __repr__(self) -> str:
        return f"ExpertsPlan(view {self.view.number}, {len(self.view.hosts)} hosts)"


class HostReport(msgspec.Struct, frozen=True):
    """A host as it describes itself. `held` of `asked` experts are packed, of `expert_bytes` each; `rows[i][e]` were
    computed since its start. `failure`: why it could not load what it was asked for."""

    address: HostAddress
    pid: int
    node: str
    held: int
    asked: int
    expert_bytes: int
    rows: tuple[tuple[int, ...], ...]
    failure: str = ""
    failure_kind: str = ""


class HoldOrder(msgspec.Struct, frozen=True):
    """What a rank of a group should have: `places`, as (layer, expert), beside what it has; with `kept` no others."""

    places: tuple[tuple[int, int], ...]
    kept: bool = False


class DispatchReport(msgspec.Struct, frozen=True):
    """What a dispatcher has seen. `version` is that of the placement in force; `lost` are names of hosts that it
    cannot reach; `moved` counts experts that were loaded elsewhere because their host was lost; `homeless` are those
    that nobody has and nobody has room for."""

    version: int
    view: int
    lost: tuple[str, ...]
    exchanges: int
    moved: int
    homeless: int = 0
