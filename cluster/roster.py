"""Who is there: places that replicas hold, and the processes of the service. A plain class inside the router actor.

A place, such as `demo-0`, outlives its holders: each claim gives it a larger epoch, and what a holder of an older
epoch says is dropped. The roster is rebuilt from what members announce.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

Role = Literal["replica", "gateway", "redis"]


class ProcessInfo(msgspec.Struct, frozen=True):
    """A process: `role` is gateway, router, replica (the Serve supervisor), shard (rank 0 is the leader), expert_host
    or redis."""

    role: str
    pid: int
    node: str
    replica: str = ""
    rank: int = 0


class Claim(msgspec.Struct, frozen=True):
    """A place and which of its lives this is."""

    replica: str
    epoch: int


class Member(msgspec.Struct, frozen=True):
    """A replica or gateway as it announces itself, or the service's own Redis.

    `holder` names its life and nothing else. `stage` is starting, loading, warming, ready, draining or failed, and
    `done` the share of it in [0, 1]; `error_kind` and `error` say why it failed. `address` is where a gateway listens.
    """

    holder: str
    role: Role
    stage: str
    processes: tuple[ProcessInfo, ...]
    done: float = 0.0
    model: str = ""
    claim: Claim | None = None
    error_kind: str = ""
    error: str = ""
    address: str = ""


class Roster:
    """Members by holder. A member that is silent for `timeout_s` seconds has left: its place may be claimed.

    `first_epoch` is larger than any epoch given out before, where an earlier roster was lost.
    """

    def __init__(self, clock: Callable[[], float], *, timeout_s: float = 5.0, first_epoch: int = 1) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._first_epoch = first_epoch
        self._epochs: dict[str, int] = {}  # place -> its latest life
        self._members: dict[str, Member] = {}
        self._heard: dict[str, float] = {}

    def claim(self, model: str, holder: str, processes: tuple[ProcessInfo, ...]) -> Claim:
        """The first place of `model` that nobody holds, in a new life."""
        self._forget_silent()
        taken = {m.claim.replica for m in self._members.values() if m.claim is not None}
        number = 0
        while f"{model}-{number}" in taken:
            number += 1
        place = f"{model}-{number}"
        epoch = self._epochs[place] = max(self._epochs.get(place, 0) + 1, self._first_epoch)
        claim = Claim(place, epoch)
        self.announce(Member(holder, "replica", "starting", processes, model=model, claim=claim))
        return claim

    def announce(self, member: Member) -> bool:
        """Takes what a member says of itself. False, and nothing changes, where its place has a newer life."""
        if member.claim is not None:
            known = self._epochs.get(member.claim.replica, 0)
            if known > member.claim.epoch:
                return False
            self._epochs[member.claim.replica] = member.claim.epoch
        self._members[member.holder] = member
        self._heard[member.holder] = self._clock()
        return True

    def leave(self, holder: str) -> None:
        """A member is gone on purpose. Unknown ones are ignored."""
        self._members.pop(holder, None)
        self._heard.pop(holder, None)

    def members(self) -> list[Member]:
        """Those that were heard of lately, in the order of their coming."""
        self._forget_silent()
        return list(self._members.values())

    def _forget_silent(self) -> None:
        now = self._clock()
        for holder in [h for h, heard in self._heard.items() if now - heard > self._timeout_s]:
            self.leave(holder)
