"""A replica's life under its supervisor, and the leader's own, without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from cluster.roster import Claim, Member, ProcessInfo, Roster
from cluster.supervisor import Supervisor
from cluster.wire import GrpcReplicaChannel, LeaderServer
from router.wire import Hello
from understudy.errors import CheckpointError, InternalError, Unavailable
from workers.actors import Leader, LeaderReport, Progress
from workers.engine import Engine, EngineConfig, Request
from workers.engine.fake import FakeEngine
from workers.engine.loop import EngineLoop

CONFIG = EngineConfig(model_dir="nowhere", name="m")


def wire(loop: EngineLoop) -> LeaderServer:
    return LeaderServer(loop, replica="m-0", epoch=1, secret="s")


def leader(build: Callable[[EngineConfig, Progress], Engine] = lambda _c, _p: FakeEngine()) -> Leader:
    return Leader(CONFIG, build, wire, own_process=False)


class Port:
    """A leader in this process as the supervisor sees one in another."""

    def __init__(self, inner: Leader) -> None:
        self.inner = inner
        self.dead = False
        self.silent = asyncio.Event()
        self.kills = 0

    async def _alive(self) -> None:
        if self.dead:
            raise ConnectionError("the process is dead")
        if self.silent.is_set():
            await asyncio.Event().wait()

    async def start(self) -> LeaderReport:
        await self._alive()
        report = await self.inner.start()
        await self._alive()
        return report

    async def report(self, wanted: int | None = None) -> LeaderReport:
        await self._alive()
        return await self.inner.report(wanted)

    async def drain(self, seconds: float) -> bool:
        await self._alive()
        return await self.inner.drain(seconds)

    async def stop(self) -> None:
        await self._alive()
        await self.inner.stop()

    def awaited(self) -> str:
        return "rank 1"

    def kill(self) -> None:
        self.kills += 1


class Link:
    """A roster in this process, and every stage that was announced to it."""

    def __init__(self) -> None:
        self.roster = Roster(lambda: 0.0)
        self.stages: list[str] = []
        self.latest: Member | None = None
        self.reachable = True
        self.stalls: list[str] = []
        self.others = True  # that could go on with its streams

    def _check(self) -> None:
        if not self.reachable:
            raise ConnectionError("the router is gone")

    async def claim(self, model: str, holder: str, processes: tuple[ProcessInfo, ...]) -> Claim:
        self._check()
        return self.roster.claim(model, holder, processes)

    async def announce(self, member: Member, report: LeaderReport | None, node: str) -> int:
        self._check()
        self.latest = member
        if self.stages[-1:] != [member.stage]:
            self.stages.append(member.stage)
        return 0 if self.roster.announce(member) else -1

    async def leave(self, holder: str, claim: Claim | None) -> None:
        self._check()
        self.roster.leave(holder)

    async def stall(self, replica: str, epoch: int, trouble: str) -> None:
        self._check()
        self.stalls.append(f"{replica} {epoch}: {trouble}")

    async def alone(self, replica: str, epoch: int) -> bool:
        self._check()
        return not self.others


def supervise(port: Port, link: Link, silence_s: float = 5.0) -> Supervisor:
    return Supervisor(
        model="m", holder="h", node="n", start_leader=lambda _: port, router=link, beat_s=0.01, patience_s=0.01,
        silence_s=silence_s,
    )  # fmt: skip


async def until(predicate: Callable[[], object]) -> None:
    while not predicate():  # noqa: ASYNC110  # what is waited for has no event
        await asyncio.sleep(0.005)


async def test_a_leader_reports_while_it_loads_and_serves_when_ready() -> None:
    gate = asyncio.Event()
    here = asyncio.get_running_loop()

    def build(_config: EngineConfig, progress: Progress) -> Engine:
        progress(3, 4)
        asyncio.run_coroutine_threadsafe(gate.wait(), here).result()
        return FakeEngine(model="m")

    one = leader(build)
    starting = asyncio.create_task(one.start())
    await until(lambda: one.report_now().done)
    loading = await one.report()
    assert (loading.stage, loading.done, loading.address, loading.info) == ("loading", 0.75, "", None)
    gate.set()
    ready = await starting
    assert ready.stage == "ready"
    assert ready.info is not None
    assert ready.info.model == "m"
    assert ready.stats.generated_tokens == 2, "it has warmed up"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ready), type=LeaderReport) == ready, "it crosses the cluster"
    channel = GrpcReplicaChannel(ready.address, gateway="g", secret="s")
    assert isinstance(await anext(channel.messages()), Hello)
    assert one.report_now().gateways == 1
    await channel.close()
    await one.stop()
    await one.stop()


async def test_a_leader_that_cannot_build_says_why_in_words() -> None:
    def fail(_config: EngineConfig, _progress: Progress) -> Engine:
        raise CheckpointError("model.safetensors: is cut off")

    def break_(_config: EngineConfig, _progress: Progress) -> Engine:
        raise ZeroDivisionError("oops")

    report = await leader(fail).start()
    assert (report.stage, report.error_kind, report.error) == ("failed", "CHECKPOINT", "model.safetensors: is cut off")
    report = await leader(break_).start()
    assert (report.stage, report.error_kind, report.error) == ("failed", "INTERNAL", "ZeroDivisionError: oops")


async def test_an_engine_that_fails_later_is_reported() -> None:
    engine = FakeEngine()
    one = leader(lambda _c, _p: engine)
    await one.start()
    engine.fail_next_step(RuntimeError("memory is gone"))
    loop = one._loop
    assert loop is not None
    loop.attach(lambda _: None).submit(Request("a", [1], 1))
    await until(lambda: one.report_now().stage == "failed")
    assert one.report_now().error == "RuntimeError: memory is gone"
    await one.stop()


async def test_the_stages_of_a_life() -> None:
    port, link = Port(leader()), Link()
    supervisor = supervise(port, link)
    await supervisor.start()
    assert supervisor.claim == Claim("m-0", 1)
    supervisor.check()
    running = asyncio.create_task(supervisor.run())
    await until(lambda: link.stages[-1:] == ["ready"])
    assert link.latest is not None
    assert [p.role for p in link.latest.processes] == ["replica", "shard"]
    running.cancel()
    assert await supervisor.leave(5.0)
    assert port.kills == 1
    assert link.roster.members() == []


async def test_leaving_waits_for_streams_and_says_that_it_drains() -> None:
    engine = FakeEngine(step_s=0.01, max_context=10**6)
    port, link = Port(leader(lambda _c, _p: engine)), Link()
    supervisor = supervise(port, link)
    await supervisor.start()
    loop = port.inner._loop
    assert loop is not None
    session = loop.attach(lambda _: None)
    session.submit(Request("a", [1], 900_000))
    leaving = asyncio.create_task(supervisor.leave(60.0))
    await until(lambda: link.stages[-1:] == ["draining"])
    assert not leaving.done()
    session.cancel("a")
    assert await leaving


async def test_a_leader_that_fails_while_it_drains_is_killed_and_its_place_is_free() -> None:
    port, link = Port(leader()), Link()
    supervisor = supervise(port, link)
    await supervisor.start()

    async def fail(_seconds: float) -> bool:
        raise RuntimeError("a fault of the leader's")

    port.drain = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a fault of the leader's"):
        await supervisor.leave(5.0)
    assert port.kills == 1
    assert link.roster.members() == []
    await port.inner.stop()


async def last_of_its_kind(step_s: float) -> tuple[Supervisor, Link, FakeEngine, EngineLoop]:
    engine = FakeEngine(step_s=step_s, max_context=10**6)
    port, link = Port(leader(lambda _c, _p: engine)), Link()
    link.others = False
    supervisor = supervise(port, link)
    await supervisor.start()
    loop = port.inner._loop
    assert loop is not None
    return supervisor, link, engine, loop


async def test_the_last_of_its_kind_waits_until_its_streams_have_ended() -> None:
    supervisor, _, engine, loop = await last_of_its_kind(0.001)
    made: list[int] = []
    loop.attach(lambda step: made.extend(t for o in step.outputs for t in o.token_ids)).submit(Request("a", [1], 300))
    assert await supervisor.leave(0.0, last_s=3600.0)
    assert len(made) == 300
    engine.check_idle()


@pytest.mark.parametrize("last_s", [0.05, 3600.0])
async def test_the_last_of_its_kind_waits_no_longer_than_it_may_or_has_to(
    last_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.supervisor._LOOK_S", 0.01)
    supervisor, link, engine, loop = await last_of_its_kind(0.01)
    loop.attach(lambda _: None).submit(Request("a", [1], 900_000))
    leaving = asyncio.create_task(supervisor.leave(0.0, last_s))
    if last_s > 1:
        await until(lambda: link.stages[-1:] == ["draining"])
        assert not leaving.done()
        link.others = True
    assert not await leaving
    engine.check_idle()


async def test_a_leader_that_says_nothing_while_it_drains_is_killed() -> None:
    port, link = Port(leader()), Link()
    supervisor = supervise(port, link, silence_s=0.05)
    await supervisor.start()
    inner = port.inner

    async def never(_seconds: float | None = None) -> bool:
        await asyncio.Event().wait()
        return True

    port.drain, port.report = never, never  # type: ignore[method-assign,assignment]
    assert await supervisor.leave(5.0), "whatever it carried has gone on elsewhere"
    assert port.kills == 1
    await inner.stop()


async def test_leaving_does_not_wait_for_ever() -> None:
    engine = FakeEngine(step_s=0.01, max_context=10**6)
    port, link = Port(leader(lambda _c, _p: engine)), Link()
    supervisor = supervise(port, link)
    await supervisor.start()
    loop = port.inner._loop
    assert loop is not None
    loop.attach(lambda _: None).submit(Request("a", [1], 900_000))
    assert not await supervisor.leave(0.02)
    assert engine.closed
    engine.check_idle()


@pytest.mark.parametrize(("kind", "permanent"), [(CheckpointError, True), (InternalError, False)])
async def test_only_what_another_try_may_mend_is_tried_again(kind: type[Exception], permanent: bool) -> None:
    def fail(_config: EngineConfig, _progress: Progress) -> Engine:
        raise kind("no")

    port, link = Port(leader(fail)), Link()
    supervisor = supervise(port, link)
    if permanent:
        await supervisor.start()
        supervisor.check()
    else:
        with pytest.raises(kind, match="no"):
            await supervisor.start()
        await supervisor.abandon()
        assert port.kills == 1
        assert link.roster.claim("m", "next", ()) == Claim("m-0", 2), "its place is free again"
    assert link.latest is not None
    assert (link.latest.stage, link.latest.error) == ("failed", "no")


async def test_a_leader_too_busy_to_answer_while_it_loads_is_waited_for() -> None:
    port, link = Port(leader()), Link()
    supervisor = supervise(port, link, silence_s=0.02)
    busy, begin = port.start, asyncio.Event()

    async def start() -> LeaderReport:
        await begin.wait()
        port.silent.clear()
        return await busy()

    port.start = start  # type: ignore[method-assign]
    port.silent.set()
    starting = asyncio.create_task(supervisor.start())
    await asyncio.sleep(0.1)
    assert link.stages == ["starting"], "it goes on announcing"
    begin.set()
    await starting
    supervisor.check()
    await supervisor.leave(0.0)


async def test_a_router_that_is_late_is_waited_for_and_one_that_is_gone_is_not() -> None:
    port, link = Port(leader()), Link()
    link.reachable = False
    supervisor = supervise(port, link)
    starting = asyncio.create_task(supervisor.start())
    await asyncio.sleep(0.05)
    link.reachable = True
    await starting
    await supervisor.leave(0.0)
    link.reachable = False
    with pytest.raises(ConnectionError, match=r"no place for 0\.02 s"):
        await supervise(port, link, silence_s=0.02).start()


async def test_a_leader_that_dies_while_starting() -> None:
    port, link = Port(leader()), Link()
    port.dead = True
    with pytest.raises(Unavailable, match="ended while it was starting: the process is dead"):
        await supervise(port, link).start()
    assert link.stages[-1] == "failed"


async def test_a_leader_that_dies_fails_the_health_check_once_and_for_all() -> None:
    port, link = Port(leader()), Link()
    supervisor = supervise(port, link)
    await supervisor.start()
    port.dead = True
    await supervisor.run()
    with pytest.raises(Unavailable, match="the process is dead"):
        supervisor.check()
    assert port.kills == 1
    assert link.stages[-1] == "failed"
    assert link.latest is not None
    assert [p.role for p in link.latest.processes] == ["replica"]
    await supervisor.leave(0.0)
    assert link.roster.members() == []
    await port.inner.stop()


async def test_a_leader_that_hangs_is_dead() -> None:
    port, link = Port(leader()), Link()
    supervisor = supervise(port, link, silence_s=0.05)
    await supervisor.start()
    port.silent.set()
    await supervisor.run()
    with pytest.raises(Unavailable, match=r"no answer from rank 1 for 0\.05 s"):
        supervisor.check()
    assert link.stalls[0] == "m-0 1: no answer from rank 1 for 0.01 s or longer"
    await port.inner.stop()


async def test_a_router_that_is_gone_for_a_while_is_told_again() -> None:
    port, link = Port(leader()), Link()
    supervisor = supervise(port, link)
    await supervisor.start()
    running = asyncio.create_task(supervisor.run())
    link.reachable = False
    await asyncio.sleep(0.05)
    link.roster = Roster(lambda: 0.0)  # it has begun anew and knows nobody
    link.reachable = True
    await until(link.roster.members)
    supervisor.check()
    running.cancel()
    await supervisor.leave(1.0)


async def test_a_replica_whose_place_has_a_newer_life_gives_way() -> None:
    port, link = Port(leader()), Link()
    supervisor = supervise(port, link)
    await supervisor.start()
    link.roster.leave("h")
    link.roster.claim("m", "other", ())
    await supervisor.run()
    with pytest.raises(Unavailable, match="another replica holds this place"):
        supervisor.check()
    await port.inner.stop()


async def test_the_real_builder_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    from workers.actors import build_real_engine

    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    report = await Leader(EngineConfig(str(tmp_path)), build_real_engine, wire, own_process=False).start()
    assert (report.stage, report.error_kind) == ("failed", "CHECKPOINT")
    assert "NoSuchModel" in report.error


async def test_a_stopped_leader_logs_what_its_engine_still_holds(caplog: pytest.LogCaptureFixture) -> None:
    class Holding(FakeEngine):
        def check_idle(self) -> None:
            raise RuntimeError("not idle: 3 blocks are held")

    made = leader(lambda _c, _p: Holding())
    assert (await made.start()).stage == "ready"
    await made.stop()
    await made.stop()
    assert caplog.messages.count("the engine did not end well: not idle: 3 blocks are held") == 1
    report = await made.report()
    assert (report.stage, report.error) == ("failed", "RuntimeError: not idle: 3 blocks are held")


async def test_a_stopped_leader_logs_that_its_engine_hangs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.actors._STOP_S", 0.01)
    go_on, stuck = threading.Event(), threading.Event()

    def hang(_seconds: float) -> None:
        if armed:
            stuck.set()
            go_on.wait(60)

    armed: list[bool] = []
    loops: list[EngineLoop] = []
    made = Leader(
        CONFIG,
        lambda _c, _p: FakeEngine(step_s=1.0, sleep=hang),
        lambda loop: (loops.append(loop), wire(loop))[1],
        own_process=False,
    )
    await made.start()
    armed.append(True)
    loops[0].attach(lambda _: None).submit(Request("a", [1], 1))
    assert await asyncio.to_thread(stuck.wait, 60)
    await made.stop()
    assert "the engine was left behind: its step did not end within 0.01 s" in caplog.messages
    go_on.set()
    assert await asyncio.to_thread(loops[0].stop, 60)
