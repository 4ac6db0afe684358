"""The Serve deployment that supervises one replica. Serve keeps its life cycle and sees none of its requests."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import time
from functools import partial
from typing import Any

import msgspec

from cluster.catalog import Texts
from cluster.directory import find
from cluster.expert_actors import call_actor, open_hosts, open_ranks
from cluster.expert_hosts import ExpertHosts
from cluster.group import RankGroup, Ranks
from cluster.logs import configure
from cluster.places import RankPlace, beside_me
from cluster.plan import (
    LAST_S,
    LEASE_S,
    REPLICA_GRACE_S,
    REPLICA_NAME,
    REPLICA_PLACE,
    SUPERVISOR_CPUS,
    ReplicaPlan,
    node_address,
    serve_logging,
)
from cluster.roster import Claim
from cluster.supervisor import Supervisor
from cluster.telemetry import open_tracer
from cluster.wire import LeaderServer
from understudy.errors import FROM_KIND, InternalError
from workers.actors import LeaderReport, Progress, RankReport, build_real_engine, leader_actor, rank_actor
from workers.engine import Engine, EngineConfig
from workers.engine.loop import EngineLoop
from workers.experts.placement import HoldOrder, HostReport, HostsView
from workers.parallel.meeting import Meeting

log = logging.getLogger(__name__)

_LEND_S = 2.0
_UPGRADE_TRIES = 3


def build_fake_engine(config: EngineConfig, progress: Progress, rows: float | None = None) -> Engine:
    """An engine that computes nothing, with the vocabulary of the checkpoint's tokenizer. It takes time for so many
    `rows` a second, or none."""
    from pathlib import Path

    from tokenizers import Tokenizer

    from workers.engine.fake import FakeEngine

    def step_s(n: int) -> float:
        return n / rows if rows is not None else 0.0

    progress(1, 1)
    vocabulary = Tokenizer.from_file(str(Path(config.model_dir) / "tokenizer.json")).get_vocab_size()
    return FakeEngine(
        vocab_size=vocabulary,
        max_context=config.max_context or 4096,
        max_running=config.max_running or 64,
        model=config.name,
        step_s=step_s,
    )


def make_wire(
    loop: EngineLoop, *, claim: Claim, secret: str, host: str, otlp_endpoint: str | None = None
) -> LeaderServer:
    """The leader's end of the wires. `host` empty is the address of the node that this runs on."""
    host = host or node_address(False)
    tracer = open_tracer(otlp_endpoint, "replica", host, claim.replica)
    return LeaderServer(
        loop, replica=claim.replica, epoch=claim.epoch, secret=secret, host=host, lease_s=LEASE_S, tracer=tracer
    )


class RayLeader:
    """A leader actor as the supervisor sees it: Ray's errors about a dead actor become ConnectionError."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def meet(self, size: int, one_machine: bool, address: str) -> Meeting:
        meeting: Meeting = await self._call(self._handle.meet, size, one_machine, address)
        return meeting

    async def start(self, meeting: Meeting | None = None) -> LeaderReport:
        report: LeaderReport = await self._call(self._handle.start, meeting)
        return report

    async def report(self, wanted: int | None = None) -> LeaderReport:
        report: LeaderReport = await self._call(self._handle.report, wanted)
        return report

    async def drain(self, seconds: float) -> bool:
        return bool(await self._call(self._handle.drain, seconds))

    async def stop(self) -> None:
        await self._call(self._handle.stop)

    def awaited(self) -> str:
        return ""

    async def place_experts(self, view: HostsView) -> None:
        await self._call(self._handle.place_experts, msgspec.msgpack.encode(view))

    async def experts(self, order: HoldOrder | None = None) -> HostReport | None:
        report: HostReport | None = await self._call(self._handle.experts, order)
        return report

    def kill(self) -> None:
        import ray

        ray.kill(self._handle, no_restart=True)

    async def _call(self, method: Any, *args: object) -> Any:
        return await call_actor(method, *args)


class RayRank:
    """Another rank's actor as its group sees it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def start(self, meeting: Meeting) -> RankReport:
        report: RankReport = await call_actor(self._handle.start, meeting)
        return report

    async def report(self) -> RankReport:
        report: RankReport = await call_actor(self._handle.report)
        return report

    async def place_experts(self, view: HostsView) -> None:
        await call_actor(self._handle.place_experts, msgspec.msgpack.encode(view))

    async def experts(self, order: HoldOrder | None = None) -> HostReport | None:
        report: HostReport | None = await call_actor(self._handle.experts, order)
        return report

    def kill(self) -> None:
        import ray

        ray.kill(self._handle, no_restart=True)


class Replica:
    """Starts a leader when constructed, beats for it, drains it when Serve takes it away."""

    async def __init__(self, plan: ReplicaPlan) -> None:  # type: ignore[misc]  # Serve awaits it
        from ray import serve

        configure()
        self._plan, self._directory = plan, find(plan.namespace)
        self._ranks: RankGroup | None = None
        self._experts: ExpertHosts | None = None
        if plan.expert_hosts:
            self._experts = open_hosts(plan, self._directory)
        elif plan.engine.expert_parallel:
            self._experts = open_ranks(plan, self._directory, lambda: self._ranks)
        self._supervisor = Supervisor(
            model=plan.model,
            holder=serve.get_replica_context().replica_id.unique_id,
            node=node_address(plan.loopback),
            start_leader=self._start_leader,
            router=self._directory,
            patience_s=plan.heartbeat_timeout,
            silence_s=max(10.0, 5 * plan.heartbeat_timeout),
            companion=self._experts,
        )
        try:
            await self._supervisor.start()
            self._refuse_an_upgrade_that_failed()
        except BaseException:
            await self._supervisor.abandon()
            raise
        self._running = asyncio.create_task(self._supervisor.run(), name="supervise")
        self._lending = asyncio.create_task(self._lend_texts(), name="lend texts")

    def _refuse_an_upgrade_that_failed(self) -> None:
        """Else Serve would go on and replace what works. Raises UnderstudyError."""
        report = self._supervisor.report
        if self._plan.upgrade and report is not None and report.stage == "failed":
            raise FROM_KIND.get(report.error_kind, InternalError)(report.error)

    async def _lend_texts(self) -> None:
        """Gateways get tokenizer and template from the router, which may lose them."""
        plan, texts = self._plan, Texts(self._plan.generation, self._plan.files)
        while True:
            info = self._supervisor.report.info if self._supervisor.report is not None else None
            try:
                if info is not None:
                    await self._directory.lend_texts(plan.model, info.model_fingerprint, texts)
            except ConnectionError as error:
                log.info("the router did not take the text files: %s", error)
            await asyncio.sleep(_LEND_S)

    def _start_leader(self, claim: Claim) -> RayLeader | RankGroup:
        engine = self._plan.engine
        if self._experts is not None and self._plan.expert_hosts:
            engine = msgspec.structs.replace(engine, experts=self._experts.plan)
        here = beside_me() if self._plan.by_role else {}
        leader = self._group(engine, claim) if engine.tensor_parallel > 1 else self._leader(engine, claim, **here)
        if self._experts is not None:
            self._experts.attach(leader, self._supervisor.experts)
        return leader

    def _leader(self, engine: EngineConfig, claim: Claim, **options: Any) -> RayLeader:
        plan = self._plan
        actor = leader_actor(num_cpus=plan.leader_cpus, num_gpus=plan.leader_gpus, **options)
        build = partial(build_fake_engine, rows=plan.fake_rows) if plan.fake else build_real_engine
        host = "127.0.0.1" if plan.loopback else ""
        wire = partial(make_wire, claim=claim, secret=plan.secret, host=host, otlp_endpoint=plan.otlp_endpoint)
        made = actor.remote(engine, build, wire, step_timeout_s=plan.step_timeout, ordered=time.time())
        return RayLeader(made)

    def _group(self, engine: EngineConfig, claim: Claim) -> RankGroup:
        plan, place = self._plan, RankPlace(self._plan)

        async def ranks() -> Ranks:
            await place.reserve()
            first = self._leader(engine, claim, **place.options(0))
            others = []
            for rank in range(1, engine.tensor_parallel):
                actor = rank_actor(num_cpus=plan.leader_cpus, num_gpus=plan.leader_gpus, **place.options(rank))
                others.append(RayRank(actor.remote(engine, rank)))
            return Ranks(first, others, place.nodes, place.one_machine, place.address)

        self._ranks = RankGroup(ranks, place.clear)
        return self._ranks

    async def check_health(self) -> None:
        """Asked by Serve every second."""
        self._supervisor.check()
        if self._running.done() and not self._running.cancelled():
            self._running.result()

    async def __del__(self) -> None:  # Serve awaits it before it ends the process
        running = getattr(self, "_running", None)
        if running is None:
            return
        running.cancel()
        self._lending.cancel()
        ended = await self._supervisor.leave(self._plan.drain_s, LAST_S)
        log.info("drained%s", "" if ended else "; streams were left, and go on elsewhere")


def deployment(plan: ReplicaPlan, present: int | None = None) -> Any:
    """`Replica` for one model, bound. `present` are the replicas that an autoscaled model has already."""
    from ray import serve

    more = _number(plan, present)
    if plan.upgrade:  # Serve goes no further after so many in a row
        more["max_constructor_retry_count"] = _UPGRADE_TRIES
    made: Any = serve.deployment(
        Replica,
        name=REPLICA_NAME + re.sub(r"[^\w.-]", "-", plan.model),  # becomes part of file names
        ray_actor_options={"num_cpus": SUPERVISOR_CPUS, "resources": REPLICA_PLACE if plan.by_role else {}},
        health_check_period_s=0.5,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=REPLICA_GRACE_S,
        graceful_shutdown_wait_loop_s=0.05,
        logging_config=serve_logging(plan.logs),
        max_surge_percent=plan.surge_percent,
        **more,
    )
    return made.bind(plan)


def _number(plan: ReplicaPlan, present: int | None) -> dict[str, Any]:
    """How many replicas Serve keeps: a number, or what our policy says. Serve's own delays are none: ours hold."""
    if plan.replicas.fixed:
        return {"num_replicas": plan.replicas.least}
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    kwargs = {"model": plan.model, "namespace": plan.namespace, "goal": dataclasses.asdict(plan.goal)}
    scaling = AutoscalingConfig(
        min_replicas=plan.replicas.least,
        max_replicas=plan.replicas.most,
        initial_replicas=plan.replicas.first if present is None else present,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function="cluster.policy:ReplicaPolicy", policy_kwargs=kwargs),  # type: ignore[no-untyped-call]
    )
    return {"autoscaling_config": scaling}
