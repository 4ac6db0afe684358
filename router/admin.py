"""The operators' service, on a port of its own."""

from __future__ import annotations

from typing import Any, Protocol

import grpc
from grpc_reflection.v1alpha import reflection

from router.interceptors import CallInterceptor, Tokens
from router.metrics import Metrics
from router.port import ReplicaView, RouterFigures, State
from router.rebalance import ExpertsView
from router.server import GatewayConfig, bind, probe_port, server_options
from understudy.errors import ConfigError, InvalidRequest, Unavailable
from understudy.v1 import admin_pb2 as pb
from understudy.v1 import admin_pb2_grpc

SERVICE = "understudy.v1.Admin"

_STATES = {
    State.READY: pb.REPLICA_STATE_READY,
    State.STALLED: pb.REPLICA_STATE_STALLED,
    State.DRAINING: pb.REPLICA_STATE_DRAINING,
    State.LOST: pb.REPLICA_STATE_LOST,
}


class StatusSource(Protocol):
    """Knows what stands where."""

    async def status(self) -> pb.GetStatusResponse:
        """A snapshot. Raises ConnectionError or an UnderstudyError when it cannot be taken."""

    async def scale_experts(self, model: str, hosts: int) -> str:
        """How many expert hosts each replica of a model should have; the model's name, where `model` is empty. Raises
        ConnectionError, ModelNotFound or ConfigError."""


def replica_message(view: ReplicaView) -> pb.Replica:
    """A replica as the router sees it, in the Admin API's words."""
    stats, info = view.stats, view.info
    return pb.Replica(
        id=view.replica,
        model=info.model,
        state=_STATES[view.state],
        node=view.node,
        epoch=view.epoch,
        running=stats.running,
        waiting=stats.waiting,
        generated_tokens=stats.generated_tokens,
        drafted_tokens=stats.drafted_tokens,
        accepted_tokens=stats.accepted_tokens,
        cache=pb.CacheStatus(
            blocks_total=info.blocks,
            blocks_in_use=stats.blocks_in_use,
            blocks_cached=stats.blocks_cached,
            block_tokens=info.block_tokens,
            bytes_total=info.cache_bytes,
            hit_tokens=stats.hit_tokens,
            queried_tokens=stats.queried_tokens,
            preemptions=stats.preemptions,
            host_hit_tokens=stats.host_hit_tokens,
            store_hit_tokens=stats.store_hit_tokens,
            host_loaded_bytes=stats.host_loaded_bytes,
            host_load_seconds=stats.host_load_seconds,
            store_loaded_bytes=stats.store_loaded_bytes,
            store_load_seconds=stats.store_load_seconds,
            store_loads_given_up=stats.store_loads_given_up,
            store_writes_dropped=stats.store_writes_dropped,
        ),
        prefill_rate=stats.prefill_rows / stats.prefill_seconds if stats.prefill_seconds else 0.0,
        cause=view.cause or (f"silent for {view.silent_s:.1f} s" if view.state is State.LOST else ""),
    )


def experts_message(view: ExpertsView) -> pb.ExpertPlacement:
    """A replica's experts, in the Admin API's words."""
    return pb.ExpertPlacement(
        model=view.model,
        replica=view.replica,
        version=view.version,
        target_version=view.target,
        balance=view.balance,
        age_s=view.age_s,
        experts=view.experts,
        copies=view.copies,
        hosts=[
            pb.ExpertHost(
                name=h.name, life=h.life, state=h.state, node=h.node, pid=h.pid, held=h.held, capacity=h.capacity,
                rows=h.rows,
            )
            for h in view.hosts
        ],
        hosts_wanted=view.wanted,
        problem=view.problem,
    )  # fmt: skip


def router_message(figures: RouterFigures) -> pb.RouterStatus:
    """What the router has done, in the Admin API's words."""
    index = figures.index
    return pb.RouterStatus(
        decisions=figures.decisions,
        refused=figures.refused,
        reused_tokens=figures.reused_tokens,
        leases=figures.leases,
        index=pb.PrefixIndexStatus(
            blocks=index.blocks,
            stored_blocks=index.stored,
            expected_blocks=index.expected,
            holder_sets=index.sets,
            bytes=index.nbytes,
            changes=index.taken,
            gaps=index.gaps,
            snapshots=index.snapshots,
            refused_blocks=index.refused,
        ),
    )


class AdminService:
    """The methods of `understudy.v1.Admin`."""

    def __init__(self, source: StatusSource) -> None:
        self._source = source

    async def GetStatus(self, _request: pb.GetStatusRequest, _context: Any) -> pb.GetStatusResponse:
        """A snapshot of models, replicas, processes and caches."""
        try:
            return await self._source.status()
        except ConnectionError as error:
            raise Unavailable(f"{error}; try again shortly") from error

    async def ScaleExperts(self, request: pb.ScaleExpertsRequest, _context: Any) -> pb.ScaleExpertsResponse:
        """How many expert hosts each replica of a model has from now on."""
        try:
            model = await self._source.scale_experts(request.model, request.hosts)
        except ConfigError as error:
            raise InvalidRequest(error.message, field="hosts") from error
        except ConnectionError as error:
            raise Unavailable(f"{error}; try again shortly") from error
        return pb.ScaleExpertsResponse(model=model, hosts=request.hosts)


class AdminServer:
    """Serves `AdminService`, with reflection. `start`, then `stop`."""

    def __init__(self, config: GatewayConfig, source: StatusSource) -> None:
        self._config = config
        self._source = source
        self._server: Any = None
        self.port = 0

    async def start(self) -> int:
        """Listens; the port. Raises ConfigError."""
        probe_port(self._config.host, self._config.port)  # before a server is made: some ask often
        tokens = Tokens.read(self._config.tokens) if self._config.tokens is not None else None
        interceptor = CallInterceptor(Metrics(), tokens, self._config.max_message_bytes)
        server: Any = grpc.aio.server(interceptors=[interceptor], options=server_options(self._config))
        admin_pb2_grpc.add_AdminServicer_to_server(AdminService(self._source), server)  # type: ignore[no-untyped-call]
        reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), server)
        self.port = bind(server, self._config)
        await server.start()
        self._server = server
        return self.port

    async def stop(self, grace_s: float = 0.0) -> None:
        """Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(grace_s)
