"""The Serve deployment around `router.gateway.Gateway`, with what operators see: metrics, and the Admin service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import Any

from cluster.admin import ClusterStatus
from cluster.catalog import Known
from cluster.directory import Directory, find
from cluster.http import HttpServer
from cluster.logs import configure
from cluster.metrics import ReplicaMetrics
from cluster.plan import GATEWAY_CPUS, GATEWAY_PLACE, GatewayPlan, node_address, serve_logging, unpack
from cluster.roster import Member, ProcessInfo
from cluster.telemetry import open_tracer
from cluster.wire import GrpcReplicaChannel
from router.admin import AdminServer
from router.channels import Timing
from router.dispatch import Patience
from router.gateway import Gateway
from router.models import ServedModel
from router.port import ReplicaView
from router.rebalance import ExpertsView
from router.server import GatewayConfig, address
from router.validate import validate
from understudy.errors import ConfigError, DeadlineExceeded, Overloaded, Unavailable, UnderstudyError
from understudy.v1 import inference_pb2 as pb
from workers.engine import EngineInfo

log = logging.getLogger(__name__)

_ANNOUNCE_S = 0.5
_WATCH_S = 0.5
_PROOF_S = 30.0
_ADMIN_HOST = "127.0.0.1"


class GatewayApp:
    """A gateway and its surroundings on one event loop; a plain class. `start`, then `stop`.

    Every model's text comes with the plan; what its engines are is learned from the router. Of several gateways on a
    node the first to get the admin port serves operators and exports the replicas' figures; each takes the first free
    port from the metrics port on.
    """

    def __init__(self, plan: GatewayPlan, directory: Directory, *, holder: str, node: str) -> None:
        config = plan.config
        self._plan = plan
        self._directory = directory
        self._holder = holder
        self._node = node
        self._tracer = open_tracer(config.otlp_endpoint, "gateway", node, holder)
        self._gateway = Gateway(
            GatewayConfig(
                host=config.host,
                port=config.port,
                share_port=config.gateways > 1,
                max_message_bytes=config.max_message_bytes,
                max_streams=config.max_streams,
                tls_cert=config.tls_cert,
                tls_key=config.tls_key,
                tls_client_ca=config.tls_client_ca,
                tokens=config.tokens,
                watch_s=_WATCH_S,
            ),
            directory,
            self._connect,
            timing=Timing(heartbeat_timeout=config.heartbeat_timeout),
            patience=Patience(
                first=max(Patience.first, config.cold_start_seconds),
                again=max(Patience.again, config.cold_start_seconds),
            ),
            name=holder,
            tracer=self._tracer,
        )
        self._catalog = plan.catalog
        self._versions: dict[tuple[str, str], int] = {}  # model and fingerprint -> generation of its texts
        self._status = ClusterStatus(directory, self._catalog, plan.started)
        self._replica_metrics = ReplicaMetrics()
        self._admin: AdminServer | None = None
        self._http: HttpServer | None = None
        self._tending: asyncio.Task[None] | None = None
        self._failure = ""
        self._failed_kind = ""
        self._proven = False

    async def start(self) -> int:
        """Listens; the port. Raises ConfigError."""
        port = await self._gateway.start()
        await self._tend_once()
        self._tending = asyncio.create_task(self._tend(), name="tend")
        return port

    async def stop(self, grace_s: float) -> None:
        """Lets streams end for up to `grace_s` seconds, ends the rest, leaves the roster."""
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.gather(self._tending, return_exceptions=True)
        await self._gateway.stop(grace_s)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        if self._admin is not None:
            await self._admin.stop()
        if self._http is not None:
            await asyncio.to_thread(self._http.close)
        with contextlib.suppress(ConnectionError):
            await self._directory.leave(self._holder, None)

    def check(self) -> None:
        """Raises RuntimeError where this gateway should be replaced."""
        if self._tending is not None and self._tending.done():
            raise RuntimeError("the gateway's background work has ended")

    async def _connect(self, _replica: str, to: str) -> GrpcReplicaChannel:
        return GrpcReplicaChannel(to, gateway=self._holder, secret=self._plan.secret)

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(_ANNOUNCE_S)
            await self._tend_once()

    async def _tend_once(self) -> None:
        """Learns models, announces this gateway, takes the operators' ports where they are free."""
        try:
            views, known = await self._directory.replicas(), await self._directory.exchange(self._catalog)
            await self._learn(views, known)
            experts = await self._directory.expert_views()
            self._gateway.told = last_words(await self._directory.members(), experts)
            await self._prove()
            await self._directory.announce(self._member(), None, self._node)
            figures = await self._directory.figures() if self._admin is not None else None
        except ConnectionError as error:
            log.warning("the router does not answer: %s", error)
            return
        if self._http is None:
            self._serve_http()
        if self._admin is None:
            await self._serve_admin()
        else:
            shown = self._replica_metrics
            shown.views, shown.figures, shown.known, shown.experts = views, figures, known, experts

    async def _learn(self, views: list[ReplicaView], known: Known) -> None:
        """Which models there are, and the versions that their replicas have."""
        self._catalog = known.catalog
        self._status.known = known
        bounds, gateway = known.catalog.bounds(), self._gateway
        gateway.models.expect(bounds.keys())
        gateway.can_start = any(b.least == 0 for b in bounds.values())
        there: dict[str, set[str]] = {name: set() for name in bounds}
        for info in [v.info for v in views if v.info.model in bounds]:
            name, version = info.model, info.model_fingerprint
            there[name].add(version)
            generation = known.versions.get(name, {}).get(version, -1)  # replicas of one version differ in sizes only
            if generation > self._versions.get((name, version), -1):
                await self._take_version(info, generation)
        for name, versions in there.items():
            if versions:  # else nobody is there, or the router has just begun anew
                gateway.models.keep(name, versions)
        self._versions = {v: g for v, g in self._versions.items() if gateway.models.has(*v)}

    async def _take_version(self, info: EngineInfo, generation: int) -> None:
        name, version = info.model, info.model_fingerprint
        texts = await self._directory.texts(name, version)
        if texts is None:  # the router was just started again
            return
        try:
            model = await asyncio.to_thread(ServedModel.from_files, info, unpack(texts.files))
        except UnderstudyError as error:
            if not self._gateway.models.missing(name):
                log.error("model %s: %s: its older version stays", name, error)
            else:
                self._fail(f"model {name}: {error}", error.kind)
        else:
            self._gateway.put_model(model, generation)
            self._versions[name, version] = generation

    def _fail(self, said: str, kind: str = "") -> None:
        self._failure, self._failed_kind = said, kind
        log.error("%s", said)

    async def _prove(self) -> None:
        """Once: a token of every model, from the request's message to the engine and back. Models that may be without
        a replica are not waited for."""
        if self._proven:
            return
        cold = {name for name, b in self._catalog.bounds().items() if b.least == 0}
        names = {m.name for m in self._gateway.models.all()}
        linked = {link.info.model for link in self._gateway.pool.alive()}
        if not self._catalog.models or self._catalog.models.keys() - cold - (names & linked):
            return
        try:
            for name in sorted(names & linked):
                await self._one_token(name)
        except (Unavailable, Overloaded, DeadlineExceeded) as error:  # a gateway that joins a busy service waits, too
            log.info("no token yet: %s", error)
            return
        except UnderstudyError as error:
            self._fail(f"a first token cannot be had: {error}")
            return
        self._proven = True

    async def _one_token(self, name: str) -> None:
        model, dispatcher = self._gateway.models.find(name), self._gateway.dispatcher
        request = pb.GenerateRequest(request_id="proof", model=name, token_ids=pb.TokenIds(ids=[0]))
        request.stopping.max_tokens = 1
        stream = dispatcher.open(validate(request, model, salt=""), dispatcher.clock.now() + _PROOF_S)
        try:
            while (await stream.next()).finish is None:
                pass
        finally:
            stream.close()

    def _member(self) -> Member:
        config, error = self._plan.config, self._failure
        return Member(
            self._holder,
            "gateway",
            "failed" if error else "ready" if self._proven else "starting",
            (ProcessInfo("gateway", os.getpid(), self._node),),
            error_kind=self._failed_kind,
            error=error,
            address=address(config.host, self._gateway.port),
        )

    def _serve_http(self) -> None:
        first = self._plan.config.metrics_port
        for port in range(first, min(first + max(4, self._plan.config.gateways), 1 << 16)):
            with contextlib.suppress(OSError):
                host, registry = self._plan.config.metrics_host, self._gateway.metrics.registry
                self._http = HttpServer(host, port, registry, self._gateway.health)
                log.info("metrics and probes on port %d", port)
                return

    async def _serve_admin(self) -> None:
        config = GatewayConfig(host=_ADMIN_HOST, port=self._plan.config.admin_port)
        server = AdminServer(config, self._status)
        try:
            await server.start()
        except ConfigError:
            return  # another gateway on this node has it
        self._admin = server
        self._gateway.metrics.registry.register(self._replica_metrics)


def last_words(members: list[Member], experts: list[ExpertsView]) -> dict[str, dict[str, str]]:
    """By model, what replicas that are gone have said in the roster, and which expert hosts are not there."""
    told: dict[str, dict[str, str]] = {}
    for member in members:
        if member.role == "replica" and member.stage == "failed" and member.error:
            name = member.claim.replica if member.claim is not None else member.model
            told.setdefault(member.model, {})[name] = member.error
    for view in experts:
        for host in view.hosts:
            if host.state not in ("ready", "leaving"):
                told.setdefault(view.model, {})[f"{view.replica}, expert host {host.name}"] = host.state
    return told


class GatewayDeployment:
    """`GatewayApp` as Serve sees it. `_replicas` are handles that tie the replicas to the application."""

    async def __init__(self, plan: GatewayPlan, *_replicas: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        from ray import serve

        configure()
        self._plan = plan
        self._app = GatewayApp(
            plan,
            find(plan.namespace),
            holder=serve.get_replica_context().replica_id.unique_id,
            node=node_address(plan.config.ray_address is None),
        )
        await self._app.start()

    async def check_health(self) -> None:
        """Asked by Serve every second."""
        self._app.check()

    async def __del__(self) -> None:  # Serve awaits it before it ends the process
        if hasattr(self, "_app"):
            await self._app.stop(self._plan.config.drain_seconds)


def deployment(plan: GatewayPlan, replicas: list[Any]) -> Any:
    """`GatewayDeployment`, bound to the replicas."""
    from ray import serve

    made: Any = serve.deployment(
        GatewayDeployment,
        name="gateway",
        num_replicas=plan.config.gateways,
        ray_actor_options={"num_cpus": GATEWAY_CPUS, "resources": GATEWAY_PLACE if plan.config.place_by_role else {}},
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=plan.config.drain_seconds + 10.0,
        graceful_shutdown_wait_loop_s=0.05,
        logging_config=serve_logging(plan.logs),
    )
    return made.bind(plan, *replicas)
