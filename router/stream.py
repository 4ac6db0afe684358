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
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from router.channels import Attempt, Link
from router.clock import sleep
from router.local import is_local
from router.port import Assignment, Query
from router.suspects import CLEARING_TOKENS, Suspicion
from router.tracing import StreamTrace
from router.validate import ValidRequest
from understudy.errors import DeadlineExceeded, InternalError, InvalidRequest, ModelNotFound, Overloaded, Unavailable
from workers.cache.events import hints
from workers.cache.keys import block_keys, prompt_root
from workers.engine import EngineInfo, FinishReason, SequenceOutput, TokenLogprob, TokenTrace

if TYPE_CHECKING:
    from router.dispatch import Dispatcher

log = logging.getLogger(__name__)

_INLINE_TOKENS = 4096  # hashing a longer prompt takes over half a millisecond: it is done in a thread


@dataclass(slots=True)
class Batch:
    """All that came of one sequence since its last batch. `finish` is set in its last one; `cached_tokens` is known
    in its first, and `prompt_logprobs` in that of one sequence, where they were asked for."""

    index: int = 0
    step: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    traces: list[TokenTrace] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int | None = None
    cached_host: int = 0
    cached_store: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None


class Superseded(Unavailable):
    """The version of the model that a request was checked for has no replica any more, and another one has. Nothing of
    its answer was made: it can be checked for that one."""


@dataclass(slots=True)
class _Place:
    """A replica that some sequences of a stream run on together. `suspected`: until one of them has got on."""

    link: Link
    to: Assignment
    sequences: int
    suspected: bool


class _Sequence:
    """One of a stream's sequences: what it has, and where it runs now. Without an attempt it waits for a place."""

    __slots__ = ("attempt", "begun", "done", "index", "place", "tokens")

    def __init__(self, index: int, received: list[int]) -> None:
        self.index = index
        self.tokens = list(received)
        self.attempt: Attempt | None = None
        self.place: _Place | None = None
        self.begun = 0  # tokens that it had when it came to its place
        self.done = False


class Stream:
    """One request under way: its sequences, which begin together at one replica, and go on by themselves.

    `next` gives batches until every sequence has had one with `finish`; `close` in any case.
    """

    def __init__(
        self,
        owner: Dispatcher,
        request: ValidRequest,
        deadline: float | None,
        indexes: Iterable[int],
        trace: StreamTrace | None = None,
    ) -> None:
        self._owner = owner
        self._trace = trace
        self._request = request
        self._id = owner.pool.attempt_id(request.request_id)
        self.info: EngineInfo | None = None  # of the first replica; those that follow have its weights and arithmetic
        self._pinned = request.pinned
        self._sequences = {i: _Sequence(i, request.received_of(i)) for i in indexes}
        self._turns = deque(self._sequences.values())
        # A stream that goes on elsewhere has told them.
        self._wants_prompt = request.prompt_logprobs is not None and request.pinned is None
        self._family = self._id if len(self._sequences) > 1 else ""
        self._buffered = max(owner.patience.buffered_tokens // max(len(self._sequences), 1), 32)
        self._excluded: list[tuple[str, int]] = []
        self._blamed: set[tuple[str, int]] = set()  # lives that count in `_suspicion`
        self._suspicion = Suspicion()
        self._placing: asyncio.Task[None] | None = None
        self._placed = False
        self._expired = self._abandoned = False
        self._refused: InvalidRequest | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer = owner.clock.call_at(deadline, self._expire) if deadline is not None else None

    async def next(self) -> Batch:
        """What has come of one sequence, waiting where nothing has. Sequences take turns.

        Raises DeadlineExceeded after everything made until then, and so InvalidRequest where the request's own rules
        end an answer; Overloaded and Unavailable when no replica can be had, InternalError when the engine failed, or
        the replica was lost, twice while nothing else can have been the reason.
        """
        while True:
            batch = self._take()
            if batch is not None:
                return batch
            if self._refused is not None:
                raise self._refused
            if self._placing is not None and self._placing.done():
                placing, self._placing = self._placing, None
                placing.result()
            if self._placing is None:
                self._place_those_that_wait()
            self._check()
            await self._wait()

    def finish(self, index: int) -> None:
        """Nothing more is wanted of this sequence: cancels it at its replica. Idempotent."""
        sequence = self._sequences[index]
        self._leave(sequence)
        sequence.done = True

    def close(self) -> None:
        """Cancels at their replicas what is still under way, at once. Idempotent."""
        if self._placing is not None:
            self._placing.cancel()
        for index in self._sequences:
            self.finish(index)
        if self._timer is not None:
            self._timer.cancel()
        if self._trace is not None:
            self._trace.close()
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

    # Places.

    def _place_those_that_wait(self) -> None:
        waiting = [s for s in self._sequences.values() if s.attempt is None and not s.done]
        if waiting:
            self._placing = asyncio.create_task(self._place(waiting), name=f"place {self._request.request_id}")
            self._placing.add_done_callback(self._on_placed)

    def _on_placed(self, placing: asyncio.Task[None]) -> None:
        if not placing.cancelled():
            placing.exception()  # seen, also where nobody waits for it any more
        self._wake()

    async def _place(self, waiting: list[_Sequence]) -> None:
        """Finds a replica for these sequences together, and starts each there after the tokens that we have."""
        owner = self._owner
        patience, request = owner.patience, self._request
        give_up, pause = owner.clock.now() + (patience.again if self._placed else patience.first), patience.retry
        while True:
            try:
                await self._try_place(waiting)
                return
            except (Unavailable, Overloaded, ModelNotFound, ConnectionError) as error:
                if isinstance(error, Overloaded) and not self._placed:
                    raise
                if self._pinned is None and owner.superseded(request.model, request.fingerprint):
                    raise Superseded(f"{request.model!r} is being upgraded; try again shortly") from error
                if owner.clock.now() >= give_up:
                    why = "none can be reached" if isinstance(error, ConnectionError) else error
                    raise Unavailable(f"no replica can take this stream: {why}; try again shortly") from error
                if not isinstance(error, ConnectionError):
                    self._excluded.clear()  # nobody else is there: a replica that was silent may be back
            await sleep(owner.clock, pause)
            pause = min(1.25 * pause, max(patience.retry, patience.most_retry))

    async def _try_place(self, waiting: list[_Sequence]) -> None:
        owner, request, pinned = self._owner, self._request, self._pinned
        query = Query(
            request.model,
            len(request.prompt) + sum(len(s.tokens) for s in waiting),
            tuple(self._excluded),
            *(pinned if pinned is not None else (request.fingerprint, "")),
            keys=await self._keys(waiting),
            sequences=len(waiting),
            priority=request.priority,
            together=self._suspicion.together,
            request=f"{owner.pool.gateway}/{request.request_id}",
        )
        to = await self._assign(query)
        try:
            link = await owner.pool.get(to)
            same = (link.info.model_fingerprint, link.info.numerics_id)
            if pinned is not None and same != pinned:
                raise ConnectionError(f"replica {to.replica} has other weights or arithmetic than was promised")
            if pinned is None and request.fingerprint not in ("", same[0]):
                raise ConnectionError(f"replica {to.replica} has another version of the model than was asked for")
            self._start(waiting, link, to)
        except BaseException as error:
            owner.release(to.lease)
            if isinstance(error, ConnectionError):
                self._excluded.append((to.replica, to.epoch))
            raise
        self._placed, self._pinned = True, same
        self.info = link.info if self.info is None else self.info

    async def _assign(self, query: Query) -> Assignment:
        if self._trace is None:
            return await self._owner.router.assign(query)
        with self._trace.route(len(self._request.prompt), len(query.exclude)) as answer:
            to = await self._owner.router.assign(query)
            answer(to)
        return to

    async def _keys(self, waiting: list[_Sequence]) -> bytes:
        """What the blocks of the prompt, and of a single answer that goes on, are called at the replicas; nothing where
        there is no choice or no use of them."""
        request = self._request
        infos = [link.info for link in self._owner.pool.alive() if link.info.model == request.model]
        infos = [i for i in infos if request.fingerprint in ("", i.model_fingerprint)]
        infos = [i for i in infos if self._pinned in (None, (i.model_fingerprint, i.numerics_id))]
        if len(infos) < 2 or request.bypass_prefix_cache or self._wants_prompt:
            return b""
        info, prompt = infos[0], request.prompt
        tokens = prompt + waiting[0].tokens if len(waiting) == 1 else prompt

        def compute() -> bytes:
            root = prompt_root(
                info.model_fingerprint, info.dtype, info.numerics_id, request.cache_salt, len(prompt), info.long_prompt
            )
            return hints(block_keys(root, tokens[:-1], info.block_tokens))  # the last row is always computed

        return compute() if len(tokens) <= _INLINE_TOKENS else await asyncio.to_thread(compute)

    def _start(self, waiting: list[_Sequence], link: Link, to: Assignment) -> None:
        """Sends each sequence. Raises ConnectionError, and has started none, where the wire is broken."""
        if link.lost is not None:
            raise ConnectionError(link.lost)
        owner = self._owner
        place = _Place(link, to, 0, self._suspicion.together > 0)
        for sequence in waiting:
            if sequence.done:
                continue
            attempt = Attempt(owner.pool.attempt_id(self._request.request_id), self._wake, self._buffered, self._id)
            prompt = self._wants_prompt and place.sequences == 0
            tokens, context = list(sequence.tokens), ""
            if self._trace is not None:
                context = self._trace.sent(attempt.id, sequence.index, len(tokens), to)
            link.open(
                self._request.to_engine(attempt.id, sequence.index, tokens, self._family, prompt, context), attempt
            )
            sequence.attempt, sequence.place, sequence.begun = attempt, place, len(sequence.tokens)
            place.sequences += 1
        if not place.sequences:
            owner.release(to.lease)

    def _leave(self, sequence: _Sequence) -> None:
        """Gives up the sequence's present place."""
        attempt, place = sequence.attempt, sequence.place
        sequence.attempt = sequence.place = None
        if attempt is None or place is None:
            return
        if self._trace is not None:
            self._trace.left(attempt.id)
        place.link.close_attempt(attempt)
        place.sequences -= 1
        if not place.sequences:
            self._owner.release(place.to.lease)

    def _lose(self, sequence: _Sequence, attempt: Attempt, place: _Place) -> None:
        """The sequence has to go on elsewhere. Raises InternalError where the request alone can be the reason."""
        request_id = self._request.request_id
        log.warning(
            "request %s leaves replica %s after %d tokens of sequence %d: %s",
            request_id, place.to.replica, len(sequence.tokens), sequence.index, attempt.lost,
        )  # fmt: skip
        if self._trace is not None:
            self._trace.lost(attempt.id, place.to.replica, attempt.lost or "")
        life = (place.to.replica, place.to.epoch)
        first = life not in self._excluded  # once for all the sequences that it held
        again = place.link.lost is not None and life in self._blamed  # its end was seen already, as a step that failed
        if first and attempt.crowd and not again:
            self._blamed.add(life)
            self._suspicion.fell(attempt.crowd, apart=not is_local(place.to.lease))
        self._leave(sequence)
        if self._suspicion.guilty:
            log.error("request %s is refused: %s", request_id, attempt.lost)
            raise InternalError(
                f"request {request_id} is not tried again: {self._suspicion.alone} times its replica failed while "
                "nothing else can have been the reason; the service's log says how, under this id"
            )
        if first:
            self._excluded.append(life)
            self._owner.failovers += 1

    def _clear(self, place: _Place) -> None:
        """A sequence there has got on: the request is not what a replica died of."""
        place.suspected = False
        self._suspicion.clear()
        self._owner.clear(place.to.lease)

    # Tokens.

    def _take(self) -> Batch | None:
        """A batch of the next sequence that has something to pass on; None when there is nothing."""
        for _ in range(len(self._turns)):
            sequence = self._turns[0]
            self._turns.rotate(-1)
            attempt, place = sequence.attempt, sequence.place
            if attempt is None or place is None:
                continue
            if attempt.outputs:
                batch = self._merge(sequence, attempt)
                if batch is not None:
                    return batch
            if attempt.lost is not None:
                self._lose(sequence, attempt, place)
            elif attempt.parked:
                self._leave(sequence)
        return None

    def _merge(self, sequence: _Sequence, attempt: Attempt) -> Batch | None:
        """One batch of what has come; None when there is nothing to pass on."""
        batch = Batch(sequence.index, attempt.step)
        for output in attempt.take():
            batch.token_ids += output.token_ids
            batch.logprobs += output.logprobs or ()
            batch.traces += output.traces or ()
            if batch.cached_tokens is None:
                batch.cached_tokens = output.cached_tokens
                batch.cached_host, batch.cached_store = output.cached_host, output.cached_store
            if output.prompt_logprobs is not None and self._wants_prompt:
                batch.prompt_logprobs, self._wants_prompt = output.prompt_logprobs, False
            if output.finish is not None:
                batch.finish = self._end(sequence, output, attempt)
        sequence.tokens += batch.token_ids
        place = sequence.place
        got_on = batch.finish is not None or len(sequence.tokens) - sequence.begun >= CLEARING_TOKENS
        if got_on and place is not None and place.suspected:
            self._clear(place)
        if self._trace is not None:
            self._tell_trace(self._trace, attempt, batch)
        if batch.finish is not None:
            self.finish(sequence.index)
        if batch.token_ids or batch.finish is not None or batch.cached_tokens is not None:
            return batch
        return None

    @staticmethod
    def _tell_trace(trace: StreamTrace, attempt: Attempt, batch: Batch) -> None:
        cached = None
        if batch.cached_tokens is not None:
            cached = (batch.cached_tokens, batch.cached_host, batch.cached_store)
        trace.came(attempt.id, len(batch.token_ids), cached)
        if batch.finish is not None:
            trace.finished(attempt.id, batch.finish)

    def _end(self, sequence: _Sequence, output: SequenceOutput, attempt: Attempt) -> FinishReason | None:
        """How the engine's end counts here: a cancellation that we did not ask for is a replica lost, and a failure is
        one for which this request, or another of its step, may be the reason."""
        if output.finish is FinishReason.ERROR:
            if output.field:
                self._refused = self._refused or InvalidRequest(output.error, output.field)
                return None
            log.error("request %s: the engine failed: %s", self._request.request_id, output.error)
            attempt.lost = output.error
            return None
        if output.finish is FinishReason.CANCELLED:
            attempt.lost = output.error or "cancelled by the replica"
            return None
        return output.finish
