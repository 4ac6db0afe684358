"""Which expert lives on which host, by measured load. Pure functions: the same arguments give the same placement.

T rows, L layers, E experts. A layer is one exchange with all hosts and lasts as long as its slowest host, so each layer
is balanced for itself: balance = mean over maximum load of its hosts, and that of several layers the sum of the means
over the sum of the maxima. An expert may live on several hosts, which share its rows. `capacity` is how many experts
fit in a host's memory, over all layers; each layer gets an equal part of it.

Even loads are uneven in a single step. So where there is room some experts have a second home although no load asks for
it, and the dispatcher gives each step's rows to whichever of the two has less to do (`workers/experts/split.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from understudy.errors import ConfigError
from workers.experts.placement import Homes, Placement

Loads = Sequence[Sequence[float]]  # [L][E]: rows
ENOUGH = 0.95  # a balance that no more experts are moved for
_SPARE = 8  # one of so many experts has a second home for single steps' sake
_ROUNDS = 4  # of sharing rows out again
_PATIENCE = 8  # steps without a better balance


def make_placement(
    before: Placement | None, layers: Sequence[int], loads: Loads, capacity: Mapping[str, int], enough: float = ENOUGH
) -> Placement:
    """A placement over the hosts of `capacity`, near `before` and balanced for `loads`.

    Every expert is there at least once. Hosts that `before` knows and `capacity` does not are gone; new ones are empty.
    Raises ConfigError where the hosts have no room for all experts.
    """
    hosts = tuple(sorted(capacity))
    check_capacity(capacity, [len(row) for row in loads])
    table = []
    for i, row in enumerate(loads):
        # What is left over of an equal part goes to the first layers.
        room = [capacity[name] // len(loads) + (i < capacity[name] % len(loads)) for name in hosts]
        old = _homes_before(before, i, hosts) if before is not None and i < len(before.table) else None
        table.append(_Layer(row, room, old, i).settle(enough))
    return Placement(before.version + 1 if before is not None else 1, tuple(layers), hosts, tuple(table))


def check_capacity(capacity: Mapping[str, int], experts: Sequence[int]) -> None:
    """Raises ConfigError where not all experts fit: `experts` of each layer."""
    if not capacity:
        raise ConfigError("expert_hosts: there is no host; start one")
    need, most = sum(experts), max(experts, default=0)
    fits = sum(each // len(experts) for each in capacity.values())
    if fits < most:
        least = min(capacity.values())
        enough = -(-most // max(1, least // len(experts)))
        way = f"{enough} hosts of {least} would do" if least >= len(experts) else "give each more memory"
        raise ConfigError(
            f"expert_hosts: {len(capacity)} hosts have room for {', '.join(map(str, capacity.values()))} experts of "
            f"the model's {need}; {way}"
        )


def host_loads(homes: Sequence[Homes], loads: Sequence[float], hosts: int) -> list[float]:
    """Rows of each host, of one layer."""
    total = [0.0] * hosts
    for of, load in zip(homes, loads, strict=True):
        for host, share in of:
            total[host] += share * load
    return total


def balance(placement: Placement, loads: Loads) -> float:
    """Mean over maximum, of all layers together; 1 where there is no load."""
    means = most = 0.0
    for homes, row in zip(placement.table, loads, strict=True):
        per_host = host_loads(homes, row, len(placement.hosts))
        means += sum(per_host) / len(per_host)
        most += max(per_host)
    return means / most if most > 0 else 1.0


def moves(before: Placement, after: Placement) -> int:
    """Experts that hosts have to load."""
    return sum(len(set(after.held_by(host)) - set(before.held_by(host))) for host in after.hosts)


def _homes_before(before: Placement, layer: int, hosts: Sequence[str]) -> list[list[int]]:
    """Of each expert, which of `hosts` have it."""
    index = {name: i for i, name in enumerate(hosts)}
    return [[index[name] for host, _ in of if (name := before.hosts[host]) in index] for of in before.table[layer]]


class _Layer:
    """One layer on its way to balance: homes of each expert, and how they share its rows."""

    def __init__(self, loads: Sequence[float], room: list[int], before: list[list[int]] | None, number: int) -> None:
        self._number = number
        self._loads = [float(load) for load in loads]
        self._room = room
        self._hosts = range(len(room))
        self._homes: list[list[int]] = before or [[] for _ in loads]
        self._shares: list[list[float]] = [[] for _ in loads]
        self._used = [0] * len(room)
        self._total = [0.0] * len(room)
        for of in self._homes:
            for host in of:
                self._used[host] += 1
        self._fit()

    def settle(self, enough: float) -> tuple[Homes, ...]:
        """Places who has no home, then moves and copies experts while that helps."""
        for expert in self._by_load(e for e, of in enumerate(self._homes) if not of):
            host = self._emptiest()
            self._homes[expert] = [host]
            self._used[host] += 1
            self._share(expert)
        self._even_out(32)
        best, kept, since = self._balance(), self._copy_of_all(), 0
        while best < enough and since < _PATIENCE and self._improve():
            since += 1
            if self._balance() > best + 1e-6:
                best, kept, since = self._balance(), self._copy_of_all(), 0
        self._homes, self._shares, self._used, self._total = kept
        self._drop_idle()
        self._add_spares()
        return tuple(tuple(zip(of, shares, strict=True)) for of, shares in zip(self._homes, self._shares, strict=True))

    def _copy_of_all(self) -> tuple[list[list[int]], list[list[float]], list[int], list[float]]:
        return [of[:] for of in self._homes], [of[:] for of in self._shares], self._used[:], self._total[:]

    # Where experts are ----------------------------------------------------------------------------------------------

    def _fit(self) -> None:
        """Takes experts away from hosts with less room than before: copies first, then the lightest."""
        for host in self._hosts:
            while self._used[host] > self._room[host]:
                there = [e for e, of in enumerate(self._homes) if host in of]
                gone = min(there, key=lambda e: (len(self._homes[e]) == 1, self._loads[e], e))
                self._homes[gone].remove(host)
                self._used[host] -= 1

    def _emptiest(self) -> int:
        """The least loaded host with room. One that has none gives a copy up, where nobody has any."""
        while not (free := [h for h in self._hosts if self._used[h] < self._room[h]]):
            expert = min((e for e, of in enumerate(self._homes) if len(of) > 1), key=lambda e: (self._loads[e], e))
            self._leave(expert, max(self._homes[expert], key=lambda h: (self._total[h], h)))
        return min(free, key=lambda h: (self._total[h], self._used[h] / self._room[h], h))

    def _improve(self) -> bool:
        """One step that takes load from the most loaded host: a move, a swap or a copy. False where none helps."""
        top = max(self._hosts, key=lambda h: (self._total[h], -h))
        there = self._by_load(e for e, of in enumerate(self._homes) if top in of and self._loads[e] > 0)
        for low in sorted(self._hosts, key=lambda h: (self._total[h], h)):
            gap = self._total[top] - self._total[low]
            if low == top or gap <= 0:
                continue
            if self._move(there, top, low, gap) or self._swap(there, top, low, gap) or self._copy(there, top, low, gap):
                self._even_out(_ROUNDS)
                return True
        return False

    def _move(self, there: list[int], top: int, low: int, gap: float) -> bool:
        """The expert whose load comes nearest to half of the gap, where `low` has room."""
        if self._used[low] >= self._room[low]:
            return False
        fitting = [e for e in there if len(self._homes[e]) == 1 and 0.05 * gap < self._loads[e] < 0.95 * gap]
        if not fitting:
            return False
        expert = min(fitting, key=lambda e: (abs(self._loads[e] - gap / 2), e))
        self._leave(expert, top)
        self._enter(expert, low)
        return True

    def _swap(self, there: list[int], top: int, low: int, gap: float) -> bool:
        """Two experts whose difference comes nearest to half of the gap."""
        back = [e for e, of in enumerate(self._homes) if of == [low]]
        pairs = [
            (abs(self._loads[a] - self._loads[b] - gap / 2), a, b)
            for a in there
            if self._homes[a] == [top]
            for b in back
            if 0.05 * gap < self._loads[a] - self._loads[b] < 0.95 * gap
        ]
        if not pairs:
            return False
        _, a, b = min(pairs)
        for expert, here, other in ((a, top, low), (b, low, top)):
            self._leave(expert, here)
            self._enter(expert, other)
        return True

    def _copy(self, there: list[int], top: int, low: int, gap: float) -> bool:
        """Another home for the hottest expert, where there is room, or a copy that carries little makes some."""
        hot = [e for e in there if low not in self._homes[e] and self._part(e, top) > 0.05 * gap]
        if not hot:
            return False
        if self._used[low] >= self._room[low]:
            idle = [
                e for e, of in enumerate(self._homes)
                if low in of and len(of) > 1 and self._part(e, low) < self._part(hot[0], top) / 4
            ]  # fmt: skip
            if not idle:
                return False
            self._leave(min(idle, key=lambda e: (self._part(e, low), e)), low)
        self._enter(hot[0], low)
        return True

    def _enter(self, expert: int, host: int) -> None:
        self._take_back(expert)
        self._homes[expert].append(host)
        self._used[host] += 1
        self._share(expert)

    def _leave(self, expert: int, host: int) -> None:
        self._take_back(expert)
        self._homes[expert].remove(host)
        self._used[host] -= 1
        self._share(expert)

    def _copies(self) -> int:
        """Homes beyond each expert's first."""
        return sum(self._used) - len(self._homes)

    def _drop_idle(self) -> None:
        """Copies that carry nothing are given back, so that there is room for the next hot one; but for the spare."""
        for expert, of in enumerate(self._homes):
            for host in [h for h in of if self._part(expert, h) <= 0.01 * self._loads[expert]]:
                if len(of) > 1 and self._copies() > len(self._homes) // _SPARE:
                    self._leave(expert, host)

    def _add_spares(self) -> None:
        """Second homes for the most wanted experts of each host in turn, in half of the room that is left."""
        free = sum(self._room) - sum(self._used)
        shared = [0] * len(self._room)  # experts that a host has together with another
        for of in self._homes:
            for host in of if len(of) > 1 else ():
                shared[host] += 1
        single = self._by_load(e for e, of in enumerate(self._homes) if len(of) == 1)
        for _ in range(min(len(self._homes) // _SPARE - self._copies(), free // 2)):
            roomy = [h for h in self._hosts if self._used[h] < self._room[h]]
            # Another host comes first in each layer, or the first one would get them all.
            turn = self._number
            expert = min(single, key=lambda e: (shared[h := self._homes[e][0]], (h + turn) % len(shared)), default=None)
            others = [h for h in roomy if expert is not None and h != self._homes[expert][0]]
            if expert is None or not others:
                return
            host = min(others, key=lambda h: (shared[h], self._used[h] / self._room[h], h))
            shared[host] += 1
            shared[self._homes[expert][0]] += 1
            single.remove(expert)
            self._enter(expert, host)

    # How homes share rows ---------------------------------------------------------------------------------------------

    def _part(self, expert: int, host: int) -> float:
        """Rows of the expert that this host computes."""
        return self._loads[expert] * self._shares[expert][self._homes[expert].index(host)]

    def _take_back(self, expert: int) -> None:
        for host, share in zip(self._homes[expert], self._shares[expert], strict=False):
            self._total[host] -= share * self._loads[expert]
        self._shares[expert] = []

    def _share(self, expert: int) -> None:
        """Pours the expert's rows into its homes, the least loaded first, up to one level."""
        self._take_back(expert)
        of, load = self._homes[expert], self._loads[expert]
        if not of:
            return
        if len(of) == 1 or load <= 0:
            parts = [load / len(of)] * len(of)
        else:
            heights = sorted(self._total[h] for h in of)
            level = heights[-1]
            for count in range(1, len(of) + 1):
                level = (load + sum(heights[:count])) / count
                if count == len(of) or level <= heights[count]:
                    break
            parts = [max(0.0, level - self._total[h]) for h in of]
        whole = sum(parts)
        self._shares[expert] = [part / whole for part in parts] if whole > 0 else [1 / len(of)] * len(of)
        for host, share in zip(of, self._shares[expert], strict=True):
            self._total[host] += share * load

    def _even_out(self, rounds: int) -> None:
        several = self._by_load(e for e, of in enumerate(self._homes) if len(of) > 1)
        for expert in (e for e, of in enumerate(self._homes) if of and not self._shares[e]):
            self._share(expert)
        for _ in range(rounds if several else 0):
            for expert in several:
                self._share(expert)

    def _balance(self) -> float:
        most = max(self._total)
        return sum(self._total) / len(self._total) / most if most > 0 else 1.0

    def _by_load(self, experts: object) -> list[int]:
        return sorted(experts, key=lambda e: (-self._loads[e], e))  # type: ignore[call-overload,no-any-return]
