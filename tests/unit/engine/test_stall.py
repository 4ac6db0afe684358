"""When a step counts as stalled, and what an idle engine is asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine import Request
from workers.engine.fake import FakeEngine
from workers.engine.loop import EngineLoop
from workers.engine.pulse import Pulse, one_sequence
from workers.engine.stall import FLOOR_S, SLACK, StallBound


def test_a_quick_engine_has_the_floor_and_a_slow_one_what_it_is_used_to() -> None:
    quick, slow = StallBound(512), StallBound(512)
    for _ in range(10):
        quick.note(0.01, 512)
        slow.note(3.0, 512)
    assert quick.seconds == FLOOR_S
    assert slow.seconds == SLACK * 3.0


def test_before_a_full_step_was_seen_its_length_is_guessed_from_small_ones() -> None:
    bound = StallBound(512)
    bound.note(0.3, 3)
    assert bound.seconds == pytest.approx(0.1 * 512)
    bound.note(2.5, 400)
    assert bound.seconds == SLACK * 2.5


@given(st.lists(st.floats(0.0, 1.0), min_size=1), st.floats(60.0, 1e6))
def test_one_step_that_the_machine_slept_through_does_not_make_it_blind(usual: list[float], slept: float) -> None:
    bound = StallBound(8)
    for seconds in usual:
        bound.note(seconds, 8)
    before = bound.seconds
    bound.note(slept, 8)
    assert bound.seconds <= 2 * SLACK * before


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what is waited for belongs to a thread
            await asyncio.sleep(0.001)


class Clock:
    """Time that the test sets; read by the engine's thread too."""

    time = 100.0

    def __call__(self) -> float:
        return self.time


def test_a_step_that_stays_is_trouble_until_it_ends() -> None:
    begun, free, clock = threading.Event(), threading.Event(), Clock()

    def stay(_seconds: float) -> None:
        begun.set()
        assert free.wait(30)

    ended = threading.Event()
    with EngineLoop(FakeEngine(step_s=1.0, sleep=stay), clock=clock) as loop:
        with loop.attach(lambda output: ended.set() if output.outputs[0].finish else None) as session:
            session.submit(Request("a", [1, 2], 2))
            assert begun.wait(30)
            assert loop.trouble() == ""
            clock.time += 3.0
            assert loop.trouble() == "a step has been running for 3.0 s; the slowest before took 0.00 s"
            assert not loop.wedged
            clock.time += 100.0
            assert loop.wedged
            free.set()
            assert ended.wait(30)
        assert loop.trouble() == ""


async def test_an_idle_engine_shows_that_it_makes_tokens() -> None:
    engine, rounds = FakeEngine(), asyncio.Semaphore(0)
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await rounds.acquire()

    with EngineLoop(engine) as loop:
        prepared: list[int] = []
        pulse = Pulse(loop, period_s=2.0, sleep=sleep, prepare=lambda: prepared.append(loop.stats().generated_tokens))
        beating = asyncio.create_task(pulse.run())
        for made in (1, 2, 3):
            rounds.release()
            await until(lambda made=made: len(waits) > made)
            assert (loop.stats().generated_tokens, loop.concern) == (made, "")
        assert prepared == [0], "once, before the first token of its own"
        assert waits[0] == 2.0
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


async def test_an_idle_engine_that_owes_a_token_is_trouble() -> None:
    free = threading.Event()

    def stay(_seconds: float) -> None:
        assert free.wait(30)

    async def sleep(_seconds: float) -> None:
        await asyncio.sleep(0)

    with EngineLoop(FakeEngine(step_s=1.0, sleep=stay)) as loop:
        beating = asyncio.create_task(Pulse(loop, sleep=sleep, answer_s=0.01).run())
        await until(loop.trouble)
        assert "idle, and a token of its own has not come" in loop.trouble()
        free.set()
        await until(lambda: not loop.trouble())
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


async def test_an_engine_that_fails_says_so_to_everybody() -> None:
    engine = FakeEngine()
    engine.fail_next_step(RuntimeError("the device is gone"))
    loop = EngineLoop(engine)
    assert await one_sequence(loop, "a", 1) == "the engine failed: RuntimeError: the device is gone"
    assert "the device is gone" in loop.trouble()
    loop.stop()
