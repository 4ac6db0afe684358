"""What the expert hosts of a replica talk to: hosts, the leader, the router."""

from __future__ import annotations

from typing import Protocol

from router.rebalance import ExpertsOrder, ExpertsReport
from workers.experts.placement import HostReport, HostsView


class HostPort(Protocol):
    """A host in a process of its own. Any call raises ConnectionError when that process is gone."""

    async def start(self) -> HostReport:
        """Raises UnderstudyError where it cannot serve."""

    async def report(self) -> HostReport: ...

    async def hold(self, places: list[tuple[int, int]]) -> None: ...

    async def keep(self, places: list[tuple[int, int]]) -> None: ...

    def kill(self) -> None:
        """Ends the process now. Idempotent."""


class LeaderPlaces(Protocol):
    """The leader, as far as its experts go. Raises ConnectionError when it is gone."""

    async def place_experts(self, view: HostsView) -> None: ...


class ExpertsRouter(Protocol):
    """The router actor, as far as experts go. Raises ConnectionError when it cannot be reached."""

    async def experts(self, report: ExpertsReport) -> ExpertsOrder: ...
