"""Wires: connecting, heartbeats, epochs, with a clock that moves only when told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from router_stage import VOCAB, left

from router.channels import Attempt, ChannelPool, Link, Timing
from router.clock import sleep
from router.fakes import ManualClock, settle
from router.port import Assignment
from router.wire import Beat, Cancel, Down, Hello, Ping, Up
from workers.engine import EngineStats, FinishReason, Request, SequenceOutput, StepOutput
from workers.engine.fake import FakeEngine

INFO = FakeEngine(vocab_size=VOCAB).info
HELLO = Hello("a", 1, INFO)
TO = Assignment("a", "at", 1, 1)


class Wire:
    """A channel whose far end is the test."""

    def __init__(self, hello: Up | None = HELLO) -> None:
        self.sent: list[Down] = []
        self.up: asyncio.Queue[Up | Exception | None] = asyncio.Queue()
        self.closed = 0
        self.broken = False
        if hello is not None:
            self.up.put_nowait(hello)

    async def send(self, message: Down) -> None:
        if self.broken:
            raise ConnectionError("broken")
        self.sent.append(message)

    async def messages(self) -> AsyncIterator[Up]:
        while (message := await self.up.get()) is not None:
            if isinstance(message, Exception):
                raise message
            yield message

    async def close(self) -> None:
        self.closed += 1


class Pool:
    """A pool, its clock, and every wire that it opened."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.wires: list[Wire] = []
        self.next: Wire | Exception | None = None
        self.pool = ChannelPool(self._connect, "g", self.clock, Timing(0.5, 2.0, 5.0))

    async def _connect(self, _replica: str, _address: str) -> Wire:
        made, self.next = self.next or Wire(), None
        if isinstance(made, Exception):
            raise made
        self.wires.append(made)
        return made

    async def link(self, to: Assignment = TO) -> Link:
        return await self.pool.get(to)


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    before = asyncio.all_tasks()
    made = Pool()
    yield made
    await made.pool.close()
    await made.pool.close()
    assert all(w.closed for w in made.wires)
    assert not left(before)


def attempt(id: str = "x", limit: int = 100) -> tuple[Attempt, list[str]]:
    woken: list[str] = []
    return Attempt(id, lambda: woken.append(id), limit), woken


def step(*outputs: SequenceOutput) -> StepOutput:
    return StepOutput(1, list(outputs))


REQUEST = Request("x", [1], 5)


async def test_one_wire_for_all_who_ask_at_once(pool: Pool) -> None:
    links = await asyncio.gather(*(pool.link() for _ in range(5)))
    assert len(set(links)) == len(pool.wires) == 1
    assert isinstance(pool.wires[0].sent[0], Ping)


async def test_tokens_reach_their_attempt_and_nobody_else(pool: Pool) -> None:
    link = await pool.link()
    mine, woken = attempt()
    link.open(REQUEST, mine)
    wire = pool.wires[0]
    wire.up.put_nowait(step(SequenceOutput("older", [9]), SequenceOutput("x", [1]), SequenceOutput("other", [2])))
    wire.up.put_nowait(step(SequenceOutput("x", [3], finish=FinishReason.LENGTH)))
    await settle()
    assert [o.token_ids for o in mine.take()] == [[1], [3]]
    assert mine.take() == []
    assert woken == ["x", "x"]
    assert link.attempts == 0
    link.close_attempt(mine)
    await settle()
    assert not [m for m in wire.sent if isinstance(m, Cancel)]


async def test_closing_an_attempt_cancels_it_once(pool: Pool) -> None:
    link = await pool.link()
    mine, _ = attempt()
    link.open(REQUEST, mine)
    link.close_attempt(mine)
    link.close_attempt(mine)
    await settle()
    assert [m for m in pool.wires[0].sent if not isinstance(m, Ping)] == [REQUEST, Cancel("x")]


async def test_more_than_may_wait_parks(pool: Pool) -> None:
    link = await pool.link()
    mine, _ = attempt(limit=3)
    link.open(REQUEST, mine)
    for tokens in ([1, 2], [3, 4], [5]):
        pool.wires[0].up.put_nowait(step(SequenceOutput("x", tokens)))
    await settle()
    assert mine.parked
    assert [o.token_ids for o in mine.take()] == [[1, 2], [3, 4]]
    assert pool.wires[0].sent[-1] == Cancel("x")


@pytest.mark.parametrize("how", ["ends", "breaks", "sends nonsense", "cannot be sent on", "is silent"])
async def test_a_wire_that_is_lost_tells_its_attempts(pool: Pool, how: str) -> None:
    link = await pool.link()
    mine, woken = attempt()
    link.open(REQUEST, mine)
    await settle()
    wire = pool.wires[0]
    if how == "ends":
        wire.up.put_nowait(None)
    elif how == "breaks":
        wire.up.put_nowait(ConnectionError("reset"))
    elif how == "sends nonsense":
        wire.up.put_nowait(ValueError("not msgpack"))
    elif how == "cannot be sent on":
        wire.broken = True
        await pool.clock.advance(0.6)
    else:
        await pool.clock.advance(2.6)
    await settle()
    assert mine.lost is not None
    assert woken == ["x"]
    assert pool.pool.alive() == []
    with pytest.raises(ConnectionError):
        link.open(REQUEST, attempt()[0])
    await pool.pool.prune()
    assert wire.closed == 1
    assert (await pool.link()) is not link


async def test_beats_keep_a_wire_and_carry_counts(pool: Pool) -> None:
    link = await pool.link()
    for number in range(6):
        pool.wires[0].up.put_nowait(Beat(1, EngineStats(running=number)))
        await pool.clock.advance(1.0)
    assert link.lost is None
    assert link.stats.running == 5
    pool.wires[0].up.put_nowait(Beat(0, EngineStats(running=99)))
    await settle()
    assert link.stats.running == 5
    assert len([m for m in pool.wires[0].sent if isinstance(m, Ping)]) >= 12


async def test_a_new_life_replaces_the_old(pool: Pool) -> None:
    old = await pool.link()
    mine, _ = attempt()
    old.open(REQUEST, mine)
    pool.next = Wire(Hello("a", 2, INFO))
    new = await pool.link(Assignment("a", "at", 2, 1))
    assert (new.epoch, old.lost, mine.lost) == (2, "closed", "closed")
    with pytest.raises(ConnectionError, match="has epoch 2, not 1"):
        await pool.link(TO)
    assert new.lost is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Hello("a", 3, INFO), "replica a of epoch 3 answers, not a of epoch 1"),
        (Hello("b", 1, INFO), "replica b of epoch 1 answers"),
        (Beat(1, EngineStats()), "did not say hello"),
        (ConnectionRefusedError("refused"), "refused"),
    ],
)
async def test_who_does_not_answer_as_expected(pool: Pool, answer: Up | Exception, message: str) -> None:
    pool.next = answer if isinstance(answer, Exception) else Wire(answer)
    with pytest.raises(ConnectionError, match=message):
        await pool.link()
    assert pool.pool.alive() == []
    assert (await pool.link()).lost is None


async def test_who_never_answers(pool: Pool) -> None:
    pool.next = Wire(None)
    asking = asyncio.create_task(pool.link())
    await settle()
    await pool.clock.advance(5.1)
    with pytest.raises(ConnectionError, match="did not answer in time"):
        await asking


async def test_whoever_asks_may_go_away(pool: Pool) -> None:
    pool.next = Wire(None)
    asking = asyncio.create_task(pool.link())
    await settle()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert pool.wires[0].closed == 1
    assert (await pool.link()).lost is None


async def test_a_clock_of_ones_own() -> None:
    clock = ManualClock()
    done: list[int] = []

    async def wait(seconds: float) -> None:
        await sleep(clock, seconds)
        done.append(int(seconds))

    tasks = [asyncio.create_task(wait(s)) for s in (3, 1, 2, 0)]
    await settle()
    assert done == [0]
    await clock.advance(2.0)
    assert done == [0, 1, 2]
    tasks[0].cancel()
    await clock.advance(5.0)
    assert done == [0, 1, 2]
    assert tasks[0].cancelled()
