"""Follows one stream to its end, on as many replicas as that takes.

| owns | does not own |
|---|---|
| what was passed on, and where the stream runs now | what tokens mean: `router.answer` |
| going on elsewhere when a replica is lost | which replica: the router |
| the stream's deadline | the wires: `router.channels` |
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from router.channels import Attempt, ChannelPool, Link
from router.clock import Clock, sleep
from router.state import Assignment, Query, RouterPort
from router.validate import ValidRequest
from understudy.errors import DeadlineExceeded, InternalError, ModelNotFound, Overloaded, Unavailable
from workers.engine import EngineInfo, FinishReason, SequenceOutput, TokenLogprob

log = logging.getLogger(__name__)

# A request under which this many replicas in a row were lost before they gave it a token is not sent to a next one.
MAX_BARREN = 3


@dataclass(slots=True)
class Batch:
    """All that came since the last batch. `finish` is set in the last one; `cached_tokens` is known in the first."""

    step: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True)
class Patience:
    """Seconds: `first` for a replica of a new stream, `again` for one to go on at, `retry` between tries; and how
    many tokens may wait for a slow client before its stream is parked."""

    first: float = 2.0
    again: float = 15.0
    retry: float = 0.1
    buffered_tokens: int = 4096


class Dispatcher:
    """Opens streams. One per gateway, used from its event loop."""

    def __init__(self, router: RouterPort, pool: ChannelPool, clock: Clock, patience: Patience | None = None) -> None:
        self.router = router
        self.pool = pool
        self.clock = clock
        self.patience = patience if patience is not None else Patience()
        self.streams: set[Stream] = set()
        self.failovers = 0
        self._leases: list[int] = []
        self._releasing: asyncio.Task[None] | None = None

    def open(self, request: ValidRequest, deadline: float | None = None) -> Stream:
        """A stream of the tokens after `request.received`. `deadline` is a moment of the clock. Close the stream."""
        stream = Stream(self, request, deadline)
        self.streams.add(stream)
        return stream

    def release(self, lease: int) -> None:
        """Gives an assignment back, soon."""
        self._leases.append(lease)
        if self._releasing is None or self._releasing.done():
            self._releasing = asyncio.create_task(self._release(), name="release leases")

    async def _release(self) -> None:
        while self._leases:
            leases, self._leases = self._leases, []
            try:
                await self.router.release(leases)
            except ConnectionError as error:  # harmless: grants settle by themselves
                log.info("%d leases not released: %s", len(leases), error)

    async def close(self) -> None:
        """Ends all streams with Unavailable and gives their leases back."""
        for stream in list(self.streams):
            stream.abandon()
        if self._releasing is not None:
            await self._releasing


class Stream:
    """One request under way. `next` gives batches until one has `finish`; `close` in any case."""

    def __init__(self, owner: Dispatcher, request: ValidRequest, deadline: float | None) -> None:
        self._owner = owner
        self._request = request
        self.info: EngineInfo | None = None  # of the first replica; those that follow have its weights and arithmetic
        self._pinned = request.pinned
        self._tokens = list(request.received)
        self._attempt: Attempt | None = None
        self._link: Link | None = None
        self._assignment: Assignment | None = None
        self._excluded: list[tuple[str, int]] = []
        self._errors = 0
        self._barren = 0
        self._placed = False
        self._expired = self._abandoned = False
        self._waiter: asyncio.Future[None] | None = None
        self._timer = owner.clock.call_at(deadline, self._expire) if deadline is not None else None

    async def next(self) -> Batch:
        """What has come, waiting where nothing has.

        Raises DeadlineExceeded after everything made until then, Overloaded and Unavailable when no replica can be
        had, InternalError when the engine failed on this request twice, or several replicas were lost under it.
        """
        while True:
            if self._attempt is None:
                await self._until_deadline(self._place())
            attempt = self._attempt
            assert attempt is not None
            if attempt.outputs:
                batch = self._merge(attempt)
                if batch is not None:
                    return batch
            elif attempt.lost is not None:
                self._count_loss(attempt)
                self._leave(failed=True)
            elif attempt.parked:
                self._leave(failed=False)
            else:
                self._check()
                await self._wait()

    def close(self) -> None:
        """Cancels at the replica what is still under way, at once. Idempotent."""
        self._leave(failed=False, counts=False)
        if self._timer is not None:
            self._timer.cancel()
        self._owner.streams.discard(self)

    def abandon(self) -> None:
        """The gateway ends: `next` raises Unavailable."""
        self._abandoned = True
        self._wake()

    # Waiting.

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _expire(self) -> None:
        self._expired = True
        self._wake()

    def _check(self) -> None:
        if self._expired:
            raise DeadlineExceeded("the deadline passed before the answer was complete; give it more time")
        if self._abandoned:
            raise Unavailable("this gateway is stopping; go on at another")

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def _until_deadline(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._wake())
        try:
            while not task.done():
                self._check()
                await self._wait()
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # Places.

    async def _place(self) -> None:
        """Finds a replica and starts there after the tokens that we have."""
        owner = self._owner
        give_up = owner.clock.now() + (owner.patience.again if self._placed else owner.patience.first)
        while True:
            try:
                await self._try_place()
                return
            except (Unavailable, Overloaded, ModelNotFound, ConnectionError) as error:
                if isinstance(error, Overloaded) and not self._placed:
                    raise
                if owner.clock.now() >= give_up:
                    why = "none can be reached" if isinstance(error, ConnectionError) else error
                    raise Unavailable(f"no replica can take this stream: {why}; try again shortly") from error
                if not isinstance(error, ConnectionError):
                    self._excluded.clear()  # nobody else is there: a replica that was silent may be back
            await sleep(owner.clock, owner.patience.retry)

    async def _try_place(self) -> None:
        owner, request, pinned = self._owner, self._request, self._pinned
        query = Query(
            request.model,
            len(request.prompt) + len(self._tokens),
            tuple(self._excluded),
            *(pinned if pinned is not None else ("", "")),
        )
        to = await owner.router.assign(query)
        try:
            link = await owner.pool.get(to)
            same = (link.info.model_fingerprint, link.info.numerics_id)
            if pinned is not None and same != pinned:
                raise ConnectionError(f"replica {to.replica} has other weights or arithmetic than was promised")
            attempt = Attempt(owner.pool.attempt_id(request.request_id), self._wake, owner.patience.buffered_tokens)
            link.open(request.to_engine(attempt.id, list(self._tokens)), attempt)
        except BaseException as error:
            owner.release(to.lease)
            if isinstance(error, ConnectionError):
                self._excluded.append((to.replica, to.epoch))
            raise
        self._attempt, self._link, self._assignment, self._placed = attempt, link, to, True
        self._pinned = same
        self.info = link.info if self.info is None else self.info

    def _leave(self, *, failed: bool, counts: bool = True) -> None:
        """Gives up the present place; `failed` keeps the stream from coming back to it."""
        attempt, link, to = self._attempt, self._link, self._assignment
        self._attempt = self._link = self._assignment = None
        if attempt is None or link is None or to is None:
            return
        link.close_attempt(attempt)
        self._owner.release(to.lease)
        if failed:
            self._excluded.append((to.replica, to.epoch))
        if counts and failed:
            self._owner.failovers += 1
            log.warning(
                "request %s leaves replica %s after %d tokens: %s",
                self._request.request_id, to.replica, len(self._tokens), attempt.lost or "ended there",
            )  # fmt: skip

    def _count_loss(self, attempt: Attempt) -> None:
        """Keeps a request that kills replicas from walking through all of them."""
        self._barren += attempt.broken
        if self._barren >= MAX_BARREN:
            request_id = self._request.request_id
            log.error("request %s: %d replicas in a row were lost under it", request_id, self._barren)
            raise InternalError(f"{self._barren} replicas in a row were lost under request {request_id}")

    # Tokens.

    def _merge(self, attempt: Attempt) -> Batch | None:
        """One batch of what has come; None when there is nothing to pass on."""
        batch = Batch(attempt.step)
        for output in attempt.take():
            batch.token_ids += output.token_ids
            if output.logprobs is not None:
                batch.logprobs += output.logprobs
            if batch.cached_tokens is None:
                batch.cached_tokens = output.cached_tokens
            if output.finish is not None:
                batch.finish = self._finish(output, attempt)
        if batch.token_ids:
            self._tokens += batch.token_ids
            self._barren = 0
        if batch.token_ids or batch.finish is not None or batch.cached_tokens is not None:
            return batch
        return None

    def _finish(self, output: SequenceOutput, attempt: Attempt) -> FinishReason | None:
        """How the engine's end counts here: a cancellation that we did not ask for, and a first failure, are a
        replica lost."""
        if output.finish is FinishReason.ERROR:
            self._errors += 1
            log.error("request %s: the engine failed: %s", self._request.request_id, output.error)
            if self._errors > 1:
                raise InternalError(f"the engine failed on request {self._request.request_id}")
            attempt.lost = output.error
            return None
        if output.finish is FinishReason.CANCELLED:
            attempt.lost = output.error or "cancelled by the replica"
            return None
        return output.finish
