"""When the experts of a replica are placed anew. Plain data and a plain class per replica; time is an argument.

A replica's supervisor reports what its hosts have computed; the answer is the placement that the replica should have.
It is another one when hosts come or go, or when the measured balance falls below a bound. What keeps it from flapping:
a whole window is measured before each decision, the measurement begins anew after each change, and a new placement has
to be better by a margin. After a restart of the router the placement in force is what the next report says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from router.experts import balance, check_capacity, make_placement
from understudy.errors import ConfigError, ModelNotFound
from workers.experts.placement import Placement


class HostState(msgspec.Struct, frozen=True):
    """A host as its supervisor sees it. `state` is starting, loading, ready, lost or leaving. `held` experts are in
    memory of the `capacity` that there is room for; `rows` were computed in this life."""

    name: str
    life: int
    state: str
    node: str = ""
    pid: int = 0
    held: int = 0
    capacity: int = 0
    rows: int = 0


class ExpertsReport(msgspec.Struct, frozen=True):
    """A replica's experts. `experts` are those of each of `layers`; `rows[i][e]` were computed since the replica's
    start, and only grow. `in_force` is the placement that its engine applies. `at_ranks`: its hosts are the ranks of
    its own group, as many as there are."""

    model: str
    replica: str
    epoch: int
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    hosts: tuple[HostState, ...]
    rows: tuple[tuple[int, ...], ...]
    in_force: Placement | None = None
    at_ranks: bool = False


class ExpertsOrder(msgspec.Struct, frozen=True):
    """What the replica should have: this placement, on so many hosts (None: as many as it has). `problem`: why there is
    no better placement."""

    placement: Placement | None
    hosts: int | None = None
    problem: str = ""


class ExpertsView(msgspec.Struct, frozen=True):
    """A replica's experts for operators. `balance` is measured, in force; `target` the version that is being loaded;
    `age_s` since the placement last changed."""

    model: str
    replica: str
    version: int
    target: int
    balance: float
    age_s: float
    experts: int
    copies: int
    hosts: tuple[HostState, ...]
    wanted: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Rules:
    """`bound` of the balance, over `window_s`, in which each layer has at least `rows_per_host` rows per host. A new
    placement is better by `margin`."""

    bound: float = 0.85
    margin: float = 0.05
    window_s: float = 20.0
    rows_per_host: int = 64


class Rebalancer:
    """One replica's placement."""

    def __init__(self, epoch: int, now: float, rules: Rules) -> None:
        self.epoch = epoch
        self.heard = now
        self._rules = rules
        self._changed = now
        self._samples: deque[tuple[float, tuple[tuple[int, ...], ...]]] = deque()
        self._target: Placement | None = None
        self.report: ExpertsReport | None = None
        self._problem = ""

    def hear(self, report: ExpertsReport, now: float) -> Placement | None:
        """The placement that should be in force; None while there is no host."""
        self.report, self.heard = report, now
        in_force = report.in_force
        if in_force is not None and (self._target is None or self._target.version < in_force.version):
            self._target = in_force
        self._samples.append((now, report.rows))
        while len(self._samples) > 2 and self._samples[1][0] <= now - self._rules.window_s:
            self._samples.popleft()
        capacity = {h.name: h.capacity for h in report.hosts if h.state != "leaving" and h.capacity > 0}
        if capacity and self._wants_other(capacity, in_force, now):
            self._place(capacity, now)
        return self._target

    def view(self, now: float, wanted: int | None) -> ExpertsView | None:
        """For operators."""
        report, target = self.report, self._target
        if report is None:
            return None
        placed = report.in_force or target
        return ExpertsView(
            model=report.model,
            replica=report.replica,
            version=report.in_force.version if report.in_force is not None else 0,
            target=target.version if target is not None else 0,
            balance=balance(placed, self._measured()) if placed is not None else 1.0,
            age_s=now - self._changed,
            experts=sum(report.experts),
            copies=placed.copies if placed is not None else 0,
            hosts=report.hosts,
            wanted=wanted if wanted is not None else sum(h.state != "leaving" for h in report.hosts),
            problem=self._problem,
        )

    def order(self, wanted: int | None) -> ExpertsOrder:
        """The answer to a report."""
        return ExpertsOrder(self._target, wanted, self._problem)

    def _wants_other(self, capacity: dict[str, int], in_force: Placement | None, now: float) -> bool:
        target = self._target
        if target is None or set(target.hosts) != set(capacity):
            return True
        if in_force is None or in_force.version != target.version or not self._measurable(now, len(capacity)):
            return False
        return balance(target, self._measured()) < self._rules.bound

    def _place(self, capacity: dict[str, int], now: float) -> None:
        assert self.report is not None
        before, loads = self._target, self._measured()
        try:
            made = make_placement(before, self.report.layers, loads, capacity)
        except ConfigError as error:
            self._problem = error.message
            return
        self._problem = ""
        better = before is None or balance(made, loads) >= balance(before, loads) + self._rules.margin
        if before is None or set(before.hosts) != set(made.hosts) or better:
            self._target, self._changed = made, now
        self._samples = deque([self._samples[-1]])

    def _measurable(self, now: float, hosts: int) -> bool:
        enough = self._rules.rows_per_host * hosts
        whole = now - self._samples[0][0] >= self._rules.window_s
        return whole and all(sum(row) >= enough for row in self._window())

    def _window(self) -> list[list[float]]:
        oldest, latest = self._samples[0][1], self._samples[-1][1]
        return [[max(0.0, b - a) for a, b in zip(*rows, strict=True)] for rows in zip(oldest, latest, strict=True)]

    def _measured(self) -> list[list[float]]:
        """The window's rows; alike for all experts of a layer that has none yet."""
        return [row if sum(row) > 0 else [1.0] * len(row) for row in self._window()]


class Rebalancers:
    """The replicas of a service by name. Silent ones are forgotten after `forget_s`."""

    def __init__(self, clock: Callable[[], float], rules: Rules | None = None, forget_s: float = 30.0) -> None:
        self._clock, self._forget_s = clock, forget_s
        self._rules = rules if rules is not None else Rules()
        self._replicas: dict[str, Rebalancer] = {}
        self._wanted: dict[str, int] = {}  # by model

    def hear(self, report: ExpertsReport) -> ExpertsOrder:
        """A replica's report, and what it should have."""
        now = self._clock()
        known = self._replicas.get(report.replica)
        if known is not None and known.epoch > report.epoch:
            return ExpertsOrder(None)  # of a life that is over
        if known is None or known.epoch < report.epoch:
            known = self._replicas[report.replica] = Rebalancer(report.epoch, now, self._rules)
        wanted = self._wanted.get(report.model)
        known.hear(report, now)
        return known.order(wanted)

    def scale(self, model: str, hosts: int) -> None:
        """How many hosts each replica of a model should have from now on.

        Raises ConfigError where so few have no room for the experts or so many would have none, or where ranks have
        them, ModelNotFound where no replica of that name has hosts.
        """
        reports = [r.report for r in self._replicas.values() if r.report is not None and r.report.model == model]
        if not reports:
            raise ModelNotFound(f"no replica of {model!r} has expert hosts; start it with --expert-hosts N")
        if any(report.at_ranks for report in reports):
            raise ConfigError(
                f"the experts of {model!r} are at its {len(reports[0].hosts)} ranks (--expert-parallel), whose number "
                "is fixed; start it with --expert-hosts N to have hosts that come and go"
            )
        most = min(max(report.experts) for report in reports)
        if not 1 <= hosts <= most:
            raise ConfigError(f"{hosts} expert hosts for {most} experts in a layer; 1 to {most} can be had")
        for report in reports:
            staying = [h.capacity for h in report.hosts if h.state != "leaving" and h.capacity][:hosts]
            if len(staying) == hosts:
                check_capacity({f"h{i}": each for i, each in enumerate(staying)}, report.experts)
        self._wanted[model] = hosts

    def views(self) -> list[ExpertsView]:
        """Every replica that was heard of lately, by name."""
        now = self._clock()
        for name in [n for n, r in [*self._replicas.items()] if now - r.heard > self._forget_s]:
            self._replicas.pop(name, None)
        found = []
        for _, replica in sorted([*self._replicas.items()]):
            view = replica.view(now, None)
            if view is not None:
                found.append(msgspec.structs.replace(view, wanted=self._wanted.get(view.model, view.wanted)))
        return found
