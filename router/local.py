"""What a gateway decides by itself while the router actor cannot be reached."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Collection, Sequence

import msgspec

from router.channels import ChannelPool, Link
from router.clock import Clock
from router.policy import choose_of_two
from router.port import Assignment, Query, ReplicaView, RouterPort, State
from router.suspects import Probation
from understudy.errors import ModelNotFound, Unavailable

log = logging.getLogger(__name__)
ALONE = "alone"  # why a replica was chosen


def is_local(lease: int) -> bool:
    """Whether a gateway granted it to itself."""
    return lease < 0


class LocalRouter:
    """Chooses the less loaded of two among the replicas that this gateway has a live wire to, by their last beats.

    Its own suspects are kept apart (`router.suspects`); of those of other gateways it knows nothing.
    """

    def __init__(self, pool: ChannelPool, rng: random.Random, clock: Clock) -> None:
        self._pool = pool
        self._rng = rng
        self._clock = clock
        self._numbers = itertools.count(-1, -1)  # the router's are positive
        self._probation: Probation[tuple[str, int]] = Probation()
        self.addresses: dict[str, str] = {}

    async def assign(self, query: Query, among: Collection[tuple[str, int]] | None = None) -> Assignment:
        """`among` restricts the choice to these lives. Raises Unavailable when no wire to a fitting one is alive."""
        links = {
            link.replica: link
            for link in self._pool.alive()
            if self._fits(link, query) and (among is None or (link.replica, link.epoch) in among)
        }
        if not links:
            raise Unavailable(f"no replica of {query.model!r} can be reached; try again shortly")
        if query.together:
            links = self._apart(links, query.together)
        names = list(links)
        # Our own streams may be newer than the last beat.
        stats = [msgspec.structs.replace(k.stats, running=max(k.stats.running, k.attempts)) for k in links.values()]
        infos = [k.info for k in links.values()]
        chosen = names[choose_of_two(stats, infos, query.prompt_tokens, self._rng)]
        epoch, number = links[chosen].epoch, next(self._numbers)
        if query.together:
            self._probation.enter(number, (chosen, epoch), query.together, self._clock.now())
        return Assignment(chosen, self.addresses.get(chosen, ""), epoch, number, ALONE)

    def _apart(self, links: dict[str, Link], together: int) -> dict[str, Link]:
        """Those that would take one more suspect. Raises Unavailable where there is none."""
        self._probation.expire(self._clock.now())
        alive = {(link.replica, link.epoch) for link in self._pool.alive()}
        for life in self._probation.places:
            if life not in alive:
                self._probation.forget(life)
        apart = {name: link for name, link in links.items() if self._probation.takes((name, link.epoch), together)}
        if not apart:
            raise Unavailable("others under which a replica was lost are being tried first; try again shortly")
        return apart

    @staticmethod
    def _fits(link: Link, query: Query) -> bool:
        info = link.info
        return (
            info.model == query.model
            and (link.replica, link.epoch) not in query.exclude
            and query.fingerprint in ("", info.model_fingerprint)
            and query.numerics_id in ("", info.numerics_id)
        )

    async def release(self, leases: Sequence[int]) -> None:
        for number in leases:
            self._probation.leave(number)

    async def clear(self, leases: Sequence[int]) -> None:
        for number in leases:
            self._probation.leave(number)

    async def replicas(self) -> list[ReplicaView]:
        return [
            ReplicaView(k.replica, self.addresses.get(k.replica, ""), k.epoch, State.READY, k.info, k.stats, k.silent_s)
            for k in self._pool.alive()
        ]


class FallbackRouter:
    """The router actor, and the gateway's own judgement while that cannot be reached or has just begun anew, or takes
    for lost whom the gateway hears well: a report that came late costs no stream.

    After a failure the router is left alone for `retry_s` seconds, so that its absence costs no stream any time.
    """

    def __init__(self, router: RouterPort, local: LocalRouter, clock: Clock, retry_s: float = 1.0) -> None:
        self._router = router
        self._local = local
        self._clock = clock
        self._retry_s = retry_s
        self._down_until = float("-inf")
        self._lost: set[tuple[str, int]] = set()  # in the router's eyes
        self.alone = 0  # decisions made without the router

    @property
    def reachable(self) -> bool:
        """Whether the router answered the last time it was asked, or may be asked again."""
        return self._clock.now() >= self._down_until

    def _down(self, error: ConnectionError) -> None:
        if self.reachable:
            log.warning("the router cannot be reached (%s); choosing replicas by myself", error)
        self._down_until = self._clock.now() + self._retry_s

    async def assign(self, query: Query) -> Assignment:
        """Raises what `Router.assign` raises."""
        if self.reachable:
            try:
                return await self._router.assign(query)
            except ConnectionError as error:
                self._down(error)
            except Unavailable as error:
                return await self._despite(error, query)
            except ModelNotFound:
                pass  # a router that restarted knows nobody yet; the wires are still there
        return await self._alone(query)

    async def _alone(self, query: Query, among: Collection[tuple[str, int]] | None = None) -> Assignment:
        assignment = await self._local.assign(query, among)
        self.alone += 1
        return assignment

    async def _despite(self, error: Unavailable, query: Query) -> Assignment:
        """A replica that only the router has not heard of lately. Raises `error` where there is none."""
        try:
            return await self._alone(query, self._lost)
        except Unavailable:
            raise error from None

    async def clear(self, leases: Sequence[int]) -> None:
        await self._local.clear([n for n in leases if is_local(n)])
        theirs = [n for n in leases if not is_local(n)]
        if theirs and self.reachable:
            try:
                await self._router.clear(theirs)
            except ConnectionError as error:
                self._down(error)

    async def release(self, leases: Sequence[int]) -> None:
        await self._local.release([n for n in leases if is_local(n)])
        theirs = [n for n in leases if not is_local(n)]
        if theirs and self.reachable:
            try:
                await self._router.release(theirs)
            except ConnectionError as error:
                self._down(error)

    async def replicas(self) -> list[ReplicaView]:
        """What the router knows, else what the wires say."""
        if self.reachable:
            try:
                views = await self._router.replicas()
            except ConnectionError as error:
                self._down(error)
            else:
                if views:
                    self._local.addresses = {v.replica: v.address for v in views}
                    self._lost = {(v.replica, v.epoch) for v in views if v.state is State.LOST}
                    return views
        return await self._local.replicas()
