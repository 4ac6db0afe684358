"""The Serve deployment around `router.gateway.Gateway`, with what operators see: metrics, and the Admin service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import Any

from prometheus_client import start_http_server

from cluster.admin import ClusterStatus
from cluster.directory import Directory, find
from cluster.logs import configure
from cluster.metrics import ReplicaMetrics
from cluster.plan import GATEWAY_CPUS, GatewayPlan, node_address, serve_logging, unpack
from cluster.roster import Member, ProcessInfo
from cluster.telemetry import open_tracer
from cluster.wire import GrpcReplicaChannel
from router.admin import AdminServer
from router.channels import Timing
from router.gateway import Gateway
from router.models import ServedModel
from router.server import GatewayConfig, address
from router.state import ReplicaView
from router.validate import validate
from understudy.errors import ConfigError, DeadlineExceeded, Overloaded, Unavailable, UnderstudyError
from understudy.v1 import inference_pb2 as pb

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
            name=holder,
            tracer=self._tracer,
        )
        self._status = ClusterStatus(directory, plan.wanted, plan.started)
        self._replica_metrics = ReplicaMetrics()
        self._admin: AdminServer | None = None
        self._metrics_server: Any = None
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
        if self._metrics_server is not None:
            self._metrics_server.shutdown()
            self._metrics_server.server_close()
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
            views = await self._directory.replicas()
            self._learn(views)
            await self._prove()
            await self._directory.announce(self._member(), None, self._node)
            figures = await self._directory.figures() if self._admin is not None else None
        except ConnectionError as error:
            log.warning("the router does not answer: %s", error)
            return
        if self._metrics_server is None:
            self._serve_metrics()
        if self._admin is None:
            await self._serve_admin()
        else:
            self._replica_metrics.views, self._replica_metrics.figures = views, figures
            with contextlib.suppress(ConnectionError):
                self._replica_metrics.experts = await self._directory.expert_views()

    def _learn(self, views: list[ReplicaView]) -> None:
        known = {m.name: m.info for m in self._gateway.models.all()}
        for view in views:
            name = view.info.model
            if name not in self._plan.files or self._failure or known.get(name) == view.info:
                continue
            if name in known and known[name].model_fingerprint == view.info.model_fingerprint:
                continue  # replicas of one model differ in sizes only
            try:
                self._gateway.put_model(ServedModel.from_files(view.info, unpack(self._plan.files[name])))
            except UnderstudyError as error:
                self._failure, self._failed_kind = f"model {name}: {error}", error.kind
                log.error("%s", self._failure)

    async def _prove(self) -> None:
        """Once: a token of every model, from the request's message to the engine and back."""
        names = {m.name for m in self._gateway.models.all()}
        linked = {link.info.model for link in self._gateway.pool.alive()}
        if self._proven or (names & linked) != set(self._plan.wanted):
            return
        try:
            for name in sorted(names):
                await self._one_token(name)
        except (Unavailable, Overloaded, DeadlineExceeded) as error:  # a gateway that joins a busy service waits, too
            log.info("no token yet: %s", error)
            return
        except UnderstudyError as error:
            self._failure = f"a first token cannot be had: {error}"
            log.error("%s", self._failure)
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

    def _serve_metrics(self) -> None:
        first = self._plan.config.metrics_port
        for port in range(first, min(first + max(4, self._plan.config.gateways), 1 << 16)):
            with contextlib.suppress(OSError):
                self._metrics_server, _ = start_http_server(port, _ADMIN_HOST, self._gateway.metrics.registry)
                log.info("metrics on port %d", port)
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
        ray_actor_options={"num_cpus": GATEWAY_CPUS},
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=plan.config.drain_seconds + 10.0,
        graceful_shutdown_wait_loop_s=0.05,
        logging_config=serve_logging(plan.logs),
    )
    return made.bind(plan, *replicas)
