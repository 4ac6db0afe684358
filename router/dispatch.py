"""Opens a gateway's streams, and tells the router what became of its assignments. A stream itself: `router.stream`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from router.channels import ChannelPool
from router.clock import Clock
from router.port import Query, RouterPort
from router.stream import Stream
from router.tracing import StreamTrace
from router.validate import ValidRequest
from understudy.errors import ModelNotFound, Overloaded, Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """Seconds: `first` for a replica of a new stream, `again` for one to go on at, `retry` between the first tries and
    `most_retry` between later ones; and how many tokens may wait for a slow client before its stream is parked, all its
    sequences together."""

    first: float = 2.0
    again: float = 300.0
    retry: float = 0.1
    most_retry: float = 0.5
    buffered_tokens: int = 4096


class Dispatcher:
    """Opens streams. One per gateway, used from its event loop. `superseded` says of a model and a fingerprint whether
    only other versions have replicas."""

    def __init__(
        self,
        router: RouterPort,
        pool: ChannelPool,
        clock: Clock,
        patience: Patience | None = None,
        superseded: Callable[[str, str], bool] = lambda _model, _fingerprint: False,
    ) -> None:
        self.superseded = superseded
        self.router = router
        self.pool = pool
        self.clock = clock
        self.patience = patience if patience is not None else Patience()
        self.streams: set[Stream] = set()
        self.failovers = 0
        self._leases: list[int] = []
        self._cleared: list[int] = []
        self._releasing: asyncio.Task[None] | None = None

    def open(
        self,
        request: ValidRequest,
        deadline: float | None = None,
        indexes: Iterable[int] | None = None,
        trace: StreamTrace | None = None,
    ) -> Stream:
        """A stream of the tokens after `request.received`, of all sequences or those of `indexes`. `deadline` is a
        moment of the clock. Close the stream."""
        stream = Stream(self, request, deadline, range(request.n) if indexes is None else indexes, trace)
        self.streams.add(stream)
        return stream

    async def want(self, model: str, request: str) -> None:
        """Lets the router know that somebody waits for the first replica of a model."""
        with suppress(ConnectionError, Unavailable, ModelNotFound, Overloaded):
            query = Query(model, 0, request=f"{self.pool.gateway}/{request}")
            self.release((await self.router.assign(query)).lease)

    def release(self, lease: int) -> None:
        """Gives an assignment back, soon."""
        self._leases.append(lease)
        self._tell_router()

    def clear(self, lease: int) -> None:
        """Lets the router know, soon, that a suspect has got on."""
        self._cleared.append(lease)
        self._tell_router()

    def _tell_router(self) -> None:
        if self._releasing is None or self._releasing.done():
            self._releasing = asyncio.create_task(self._release(), name="release leases")

    async def _release(self) -> None:
        while self._leases or self._cleared:
            leases, self._leases = self._leases, []
            cleared, self._cleared = self._cleared, []
            try:
                if cleared:
                    await self.router.clear(cleared)
                if leases:
                    await self.router.release(leases)
            except ConnectionError as error:  # harmless: grants settle by themselves, and probation ends
                log.info("%d leases not released: %s", len(leases), error)

    async def close(self) -> None:
        """Ends all streams with Unavailable and gives their leases back."""
        for stream in list(self.streams):
            stream.abandon()
        if self._releasing is not None:
            await self._releasing
