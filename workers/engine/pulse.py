"""A token of its own, now and then, from an engine that nobody asks anything: so that it is known to make some."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable

from understudy.errors import Unavailable
from workers.engine.contract import Request, StepOutput
from workers.engine.loop import EngineLoop

log = logging.getLogger(__name__)

PERIOD_S = 2.0
SHARE = 0.02  # of the time that idle engines spend on this, at most
ANSWER_S = 3.0


async def one_sequence(loop: EngineLoop, id: str, tokens: int) -> str:
    """Makes so many tokens after three; what went wrong, or nothing. Raises Unavailable where the engine takes none."""
    here = asyncio.get_running_loop()
    ended: asyncio.Future[str] = here.create_future()

    def finish(error: str) -> None:
        if not ended.done():
            ended.set_result(error)

    def sink(output: StepOutput) -> None:
        if output.lost:
            here.call_soon_threadsafe(finish, output.lost)
        for sequence in output.outputs:
            if sequence.finish is not None:
                here.call_soon_threadsafe(finish, sequence.error)

    with loop.attach(sink) as session:
        session.submit(Request(id, [0, 0, 0], tokens, bypass_prefix_cache=True))
        return await ended


class Pulse:
    """Sets `loop.concern` while an idle engine owes a token. `run` until cancelled, or until the engine takes nothing
    more. Seconds: `period_s` between tokens, longer where one takes long; `answer_s` for one to come. `prepare` is
    called once, on a thread, when the engine is first found idle: neither its start nor its steps wait for it."""

    def __init__(
        self,
        loop: EngineLoop,
        *,
        period_s: float = PERIOD_S,
        answer_s: float = ANSWER_S,
        prepare: Callable[[], None] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._period_s, self._answer_s, self._prepare = period_s, answer_s, prepare
        self._sleep, self._clock = sleep, clock
        self._numbers = itertools.count(1)
        self._took_s = 0.0

    async def run(self) -> None:
        while True:
            await self._sleep(max(self._period_s, self._took_s / SHARE))
            stats = self._loop.stats()
            if stats.running or stats.waiting:
                continue  # its steps say enough
            if self._prepare is not None:
                prepare, self._prepare = self._prepare, None
                await asyncio.to_thread(prepare)
            try:
                await self._beat()
            except Unavailable:  # it drains or has failed: others say so
                return

    async def _beat(self) -> None:
        began, steps = self._clock(), self._loop.stats().steps
        asked = asyncio.ensure_future(one_sequence(self._loop, f"pulse-{next(self._numbers)}", 1))
        try:
            while not asked.done():
                await asyncio.wait([asked], timeout=self._answer_s)
                now = self._loop.stats().steps
                if not asked.done() and now == steps:
                    self._loop.concern = f"idle, and a token of its own has not come for {self._clock() - began:.1f} s"
                steps = now
            error = asked.result()
            self._took_s = self._clock() - began
            self._loop.concern = f"idle, and cannot make a token: {error}" if error else ""
        finally:
            asked.cancel()
