"""The loop: sessions, one message per step and session, draining, stopping, failing, waking."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading

import pytest

from understudy.errors import InvalidRequest, Unavailable
from workers.engine import FinishReason, Request, SequenceOutput, StepOutput
from workers.engine.fake import FakeEngine
from workers.engine.loop import EngineLoop, Session

PATIENCE = 30.0  # seconds until a test that hangs fails


class Inbox:
    """A sink that can be waited on."""

    def __init__(self) -> None:
        self._queue: queue.Queue[StepOutput] = queue.Queue()
        self.steps: list[StepOutput] = []

    def __call__(self, output: StepOutput) -> None:
        self._queue.put(output)

    def until_finished(self, *ids: str) -> dict[str, list[SequenceOutput]]:
        left, got = set(ids), {id: [] for id in ids}
        while left:
            step = self._queue.get(timeout=PATIENCE)
            self.steps.append(step)
            for output in step.outputs:
                got.setdefault(output.id, []).append(output)
                if output.finish is not None:
                    left.discard(output.id)
        return got

    def until_lost(self) -> str:
        while not (step := self._queue.get(timeout=PATIENCE)).lost:
            self.steps.append(step)
        return step.lost

    @property
    def empty(self) -> bool:
        return self._queue.empty()


class Gate:
    """A `sleep` that holds every step until it is let through."""

    def __init__(self) -> None:
        self.entered, self._open = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, _seconds: float) -> None:
        self.entered.release()
        assert self._open.acquire(timeout=PATIENCE)

    def wait_inside(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE)

    def let(self, steps: int = 1) -> None:
        self._open.release(steps)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


def test_two_sessions_may_use_the_same_id():
    with EngineLoop(FakeEngine()) as loop:
        inboxes = [Inbox(), Inbox()]
        sessions = [loop.attach(inbox) for inbox in inboxes]
        for i, session in enumerate(sessions):
            session.submit(Request("same", [i], 5))
        first, second = (inbox.until_finished("same")["same"] for inbox in inboxes)
        assert len(tokens(first)) == len(tokens(second)) == 5
        assert tokens(first) != tokens(second)
    assert loop.error is None


def test_one_message_per_step_with_all_tokens_of_a_session():
    gate = Gate()
    with EngineLoop(FakeEngine(step_s=1, sleep=gate)) as loop:
        inbox = Inbox()
        session = loop.attach(inbox)
        session.submit(Request("first", [1], 100))
        gate.wait_inside()
        for i in range(8):  # all of these are there before the next step begins
            session.submit(Request(f"r{i}", [i], 4))
        gate.let(5)
        inbox.until_finished(*(f"r{i}" for i in range(8)))
        assert [len(step.outputs) for step in inbox.steps] == [1, 9, 9, 9, 9]
        assert [step.step for step in inbox.steps] == list(range(inbox.steps[0].step, inbox.steps[0].step + 5))
        gate.let(200)


def test_an_id_in_use_is_refused_and_free_again_when_finished():
    with EngineLoop(FakeEngine()) as loop:
        inbox = Inbox()
        session = loop.attach(inbox)
        session.submit(Request("a", [1], 2000))
        with pytest.raises(InvalidRequest, match="'a' is in use"):
            session.submit(Request("a", [1], 1))
        session.cancel("a")
        assert inbox.until_finished("a")["a"][-1].finish is FinishReason.CANCELLED
        session.submit(Request("a", [1], 1))
        assert inbox.until_finished("a")["a"][-1].finish is FinishReason.LENGTH


def test_cancelling_what_is_unknown_or_over_is_ignored():
    with EngineLoop(FakeEngine()) as loop:
        inbox = Inbox()
        session = loop.attach(inbox)
        session.cancel("nobody")
        session.submit(Request("a", [1], 1))
        inbox.until_finished("a")
        session.cancel("a")
        session.submit(Request("b", [1], 1))
        inbox.until_finished("b")
        assert all(o.id != "a" for step in inbox.steps[1:] for o in step.outputs)


def test_a_closed_session_ends_its_sequences_only_and_hears_nothing_more():
    engine = FakeEngine()
    with EngineLoop(engine) as loop:
        gone, stays = Inbox(), Inbox()
        with loop.attach(gone) as session:
            session.submit(Request("a", [1], 2000))
        other = loop.attach(stays)
        other.submit(Request("b", [1], 3))
        stays.until_finished("b")
        assert loop.drain(None)
        heard = list(gone._queue.queue)
        assert all(o.finish is None for step in heard for o in step.outputs)
        with pytest.raises(Unavailable, match="closed"):
            session.submit(Request("c", [1], 1))
    engine.check_idle()


def test_a_sink_that_fails_closes_its_session(caplog):
    def broken(_output: StepOutput) -> None:
        raise ConnectionError("gone")

    with EngineLoop(FakeEngine()) as loop:
        session, inbox = loop.attach(broken), Inbox()
        session.submit(Request("a", [1], 2000))
        other = loop.attach(inbox)
        other.submit(Request("b", [1], 50))
        inbox.until_finished("b")
        assert loop.drain(None)
        assert session.closed
        assert loop.error is None
    assert "sink failed" in caplog.text


def test_drain_refuses_newcomers_and_lets_the_others_end():
    gate, clock = Gate(), Clock()
    with EngineLoop(FakeEngine(step_s=1, sleep=gate), clock=clock) as loop:
        inbox = Inbox()
        session = loop.attach(inbox)
        session.submit(Request("a", [1], 3))
        gate.wait_inside()
        assert loop.drain(clock.now) is False
        assert loop.draining
        with pytest.raises(Unavailable, match="draining"):
            session.submit(Request("b", [1], 1))
        gate.let(10)
        assert loop.drain(None)
        assert tokens(inbox.until_finished("a")["a"]).__len__() == 3


def test_stop_cancels_what_is_left_and_closes_the_engine():
    engine, inbox = FakeEngine(), Inbox()
    loop = EngineLoop(engine)
    session = loop.attach(inbox)
    for i in range(3):
        session.submit(Request(f"r{i}", [i], 2000))
    assert loop.stop()
    finished = inbox.until_finished("r0", "r1", "r2")
    assert {o[-1].finish for o in finished.values()} == {FinishReason.CANCELLED}
    assert engine.closed
    engine.check_idle()
    assert loop.stop(), "stopping twice is harmless"
    with pytest.raises(Unavailable):
        session.submit(Request("late", [1], 1))
    assert not loop.wedged


def test_an_engine_that_still_holds_something_at_the_end_is_an_error(caplog):
    class Leaking(FakeEngine):
        def check_idle(self) -> None:
            raise RuntimeError("block 7 is held")

    loop = EngineLoop(Leaking())
    assert loop.stop()
    assert str(loop.error) == "block 7 is held"
    assert "block 7 is held" in caplog.text


def test_a_step_that_raises_is_told_to_everybody(caplog):
    engine, inboxes, told = FakeEngine(), [Inbox(), Inbox()], []
    gate = Gate()
    engine = FakeEngine(step_s=1, sleep=gate)
    loop = EngineLoop(engine, on_error=told.append)
    sessions = [loop.attach(inbox) for inbox in inboxes]
    sessions[0].submit(Request("a", [1], 5))
    gate.wait_inside()
    sessions[1].submit(Request("b", [2], 5))
    failure = RuntimeError("the roof fell in")
    engine.fail_next_step(failure)
    gate.let()
    for inbox in inboxes:
        assert inbox.until_lost() == "the engine failed: RuntimeError: the roof fell in"
    loop._thread.join(PATIENCE)
    assert loop.error is failure
    assert told == [failure]
    assert loop.wedged
    assert engine.closed
    with pytest.raises(Unavailable, match="the roof fell in"):
        sessions[0].submit(Request("c", [1], 1))
    assert loop.stop()
    assert "the engine failed" in caplog.text


def test_a_failure_is_told_by_an_engine_that_has_no_figures_any_more(caplog):
    class Broken(FakeEngine):
        def stats(self):
            raise RuntimeError("no figures")

    inbox, told = Inbox(), []
    loop = EngineLoop(Broken(), on_error=told.append)
    with loop.attach(inbox) as session:
        session.submit(Request("a", [1], 5))
        assert inbox.until_lost() == "the engine failed: RuntimeError: no figures"
    assert loop.stop()
    assert [str(error) for error in told] == ["no figures"]
    assert "the engine failed" in caplog.text


def test_a_step_that_hangs_is_seen_by_its_age():
    gate, clock = Gate(), Clock()
    loop = EngineLoop(FakeEngine(step_s=1, sleep=gate), clock=clock, wedged_after_s=5)
    assert loop.last_step_age() == 0
    inbox = Inbox()
    loop.attach(inbox).submit(Request("a", [1], 1))
    gate.wait_inside()
    clock.now += 4
    assert loop.last_step_age() == 4
    assert not loop.wedged
    clock.now += 2
    assert loop.wedged
    assert loop.stop(timeout_s=0.01) is False
    gate.let()
    inbox.until_finished("a")
    assert loop.stop()


def test_statistics_count_what_no_step_has_seen():
    gate = Gate()
    with EngineLoop(FakeEngine(step_s=1, sleep=gate)) as loop:
        inbox = Inbox()
        session = loop.attach(inbox)
        session.submit(Request("a", [1], 1))
        gate.wait_inside()
        session.submit(Request("b", [1], 1))
        session.submit(Request("c", [1], 1))
        assert loop.stats().waiting == 2
        gate.let(10)
        inbox.until_finished("a", "b", "c")
        assert loop.drain(None)
        assert loop.stats().generated_tokens == 3
        assert loop.stats().waiting == loop.stats().running == 0


def test_many_threads_at_once():
    """Submitting and cancelling from many threads: every sequence ends exactly once, and nothing is left."""
    engine = FakeEngine(max_running=16)
    loop = EngineLoop(engine)

    def caller(session: Session, inbox: Inbox, name: str) -> None:
        for i in range(40):
            session.submit(Request(f"{name}{i}", [i], 1 + i % 7))
            if i % 3 == 0:
                session.cancel(f"{name}{i}")
        inbox.until_finished(*(f"{name}{i}" for i in range(40)))

    inboxes = [Inbox() for _ in range(4)]
    threads = [
        threading.Thread(target=caller, args=(loop.attach(inbox), inbox, name))
        for inbox, name in zip(inboxes, "abcd", strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    for inbox in inboxes:
        finished = [o.id for step in inbox.steps for o in step.outputs if o.finish is not None]
        assert len(finished) == len(set(finished)) == 40
    assert loop.stop()
    engine.check_idle()


def test_importing_the_engine_brings_no_torch_ray_or_grpc():
    code = (
        "import sys, workers.engine, workers.engine.loop, workers.engine.fake, workers.engine.scheduler,"
        " workers.engine.build; print([m for m in ('torch', 'ray', 'grpc', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert result.stdout.strip() == "[]"
