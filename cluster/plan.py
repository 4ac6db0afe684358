"""What each deployment is given: plain data that crosses the cluster, made once from the configuration."""

from __future__ import annotations

import os
import secrets
import time
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.autoscale import Goal
from cluster.catalog import Catalog
from cluster.config import ModelConfig, ServiceConfig, is_loopback
from cluster.local import NAMESPACE
from cluster.written import Bounds
from router.chat.templates import MORE_TEMPLATES, TEMPLATE_FILE
from router.models import TEXT_FILES
from understudy.errors import CheckpointError, ConfigError
from workers.cache.orders import StoreConfig
from workers.engine import EngineConfig

# They wait more than they compute. Any share of a CPU would keep a rank that wants it whole from its place.
SUPERVISOR_CPUS = 0.0
GATEWAY_CPUS = 0.0
# Resources of Ray nodes that have a role, and what each process takes of them where places are by role. A node with
# one REPLICA_PLACE holds one replica's supervisor, with its leader beside it, so that both leave together.
GATEWAY_PLACE = {"understudy_gateway": 1.0}
REPLICA_PLACE = {"understudy_replica": 1.0}
REPLICA_NAME = "replica-"  # begins the names of their deployments
LAST_S = 3600.0  # for streams that nobody else can go on with
REPLICA_GRACE_S = LAST_S + 15.0  # what Serve gives a replica to end; nobody may drain for longer than LAST_S
RANK_PLACE = {"understudy_shard": 1.0}
EXPERT_HOST_PLACE = {"understudy_expert_host": 1.0}
LEASE_S = 10.0
LEAST_SECRET = 16  # bytes
ONE = Goal(1, 1)


@dataclass(frozen=True)
class ReplicaPlan:
    """One model's replicas. `secret` is what both ends of a wire know; `loopback` keeps wires on this machine.

    `files` are the checkpoint's text files by name, compressed: gateways' nodes need not have them. Of two plans of a
    model the one with the larger `generation` is the newer; `upgrade` says that there was one before.
    """

    model: str
    engine: EngineConfig
    replicas: Bounds
    secret: str = field(repr=False)
    leader_cpus: float
    leader_gpus: float
    drain_s: float
    heartbeat_timeout: float
    step_timeout: float
    loopback: bool
    fake: bool
    logs: str | None = None
    namespace: str = NAMESPACE
    expert_hosts: int = 0
    host_threads: int | None = None  # of each of them
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    goal: Goal = ONE
    surge_percent: int = 0
    generation: int = 0
    upgrade: bool = False
    fake_rows: float | None = None
    by_role: bool = False
    otlp_endpoint: str | None = None


@dataclass(frozen=True)
class GatewayPlan:
    """What gateways need. `models` are those that they begin with; which they are later is learned from the router.
    Certificates and tokens are read from paths on each gateway's node."""

    config: ServiceConfig
    models: dict[str, Bounds]
    secret: str = field(repr=False)
    logs: str | None = None
    started: float = field(default_factory=time.time)  # of the clock on the wall
    generation: int = field(default_factory=time.time_ns)  # of `models`
    namespace: str = NAMESPACE

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.generation, {name: (b.least, b.most) for name, b in self.models.items()})


@dataclass(frozen=True)
class Plan:
    """The whole application."""

    gateway: GatewayPlan
    replicas: tuple[ReplicaPlan, ...]


def make_plan(config: ServiceConfig, cpus: int, logs: Path | None = None) -> Plan:
    """`cpus` are those of a machine that the replicas share; `logs` is where Serve's replicas write, None Ray's place.

    Raises CheckpointError where text files are missing.
    """
    secret = secrets.token_hex(32) if config.wire_key is None else read_secret(config.wire_key, "wire_key").hex()
    number = sum(m.replicas.most * m.tensor_parallel for m in config.models)
    local = config.ray_address is None
    place = str(logs) if local and logs is not None else None
    replicas = tuple(_replica_plan(config, model, secret, cpus, number, place) for model in config.models)
    models = {m.name: m.replicas for m in config.models}
    return Plan(GatewayPlan(config, models, secret, place), replicas)


def renew(plan: Plan, config: ServiceConfig, cpus: int) -> Plan:
    """The plan of a service that runs by `plan` and is given other models: only those of `config` are taken. Models
    that did not change keep their plan.

    Raises CheckpointError where text files are missing.
    """
    config = config.model_copy(update={k: getattr(plan.gateway.config, k) for k in _KEPT})
    fresh = make_plan(config, cpus)
    before = {r.model: r for r in plan.replicas}
    old = {m.name: m for m in plan.gateway.config.models}
    replicas = []
    for model, its in zip(config.models, fresh.replicas, strict=True):
        known = before.get(model.name)
        its = replace(its, secret=plan.gateway.secret, logs=plan.gateway.logs, upgrade=known is not None)
        same = known is not None and _same(known, old[model.name]) == _same(its, model)
        replicas.append(known if known is not None and same else its)
    gateway = replace(plan.gateway, config=config, models=fresh.gateway.models, generation=time.time_ns())
    return Plan(gateway, tuple(replicas))


# Keys of the service that gateways, Ray and Redis were started with.
_KEPT = tuple(k for k in ServiceConfig.model_fields if k != "models")


def late_keys(before: ServiceConfig, after: ServiceConfig) -> list[str]:
    """What has changed of a configuration that a running service cannot take."""
    return [k for k in _KEPT if k != "notes" and getattr(before, k) != getattr(after, k)]


def _same(plan: ReplicaPlan, model: ModelConfig) -> tuple[object, ...]:
    """What tells two plans of a model apart: a link that leads elsewhere, or another text file, does so, too."""
    return model, plan.engine.model_dir, plan.files


def read_text_files(path: Path) -> dict[str, bytes]:
    """Tokenizer, template and defaults of a checkpoint, compressed. Raises CheckpointError."""
    found: dict[str, bytes] = {}
    more = sorted(f"{MORE_TEMPLATES}/{p.name}" for p in (path / MORE_TEMPLATES).glob("*.jinja"))
    for name in (*TEXT_FILES, TEMPLATE_FILE, *more):
        try:
            found[name] = zlib.compress((path / name).read_bytes(), 1)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}") from error
    if "tokenizer.json" not in found:
        raise CheckpointError(
            f"{path / 'tokenizer.json'}: no such file; "
            "write it with AutoTokenizer.from_pretrained(...).save_pretrained(DIR)"
        )
    return found


def read_secret(path: Path, key: str = "store_key") -> bytes:
    """The secret in a file, without white space around it. Raises ConfigError that names the key."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error.strerror}") from error
    if len(secret) < LEAST_SECRET:
        raise ConfigError(
            f"{key}: {path} holds {len(secret)} bytes; write {LEAST_SECRET} or more, as of `openssl rand -hex 32`"
        )
    return secret


def unpack(files: dict[str, bytes]) -> dict[str, bytes]:
    """`read_text_files`, read."""
    return {name: zlib.decompress(data) for name, data in files.items()}


def _replica_plan(
    config: ServiceConfig, model: ModelConfig, secret: str, cpus: int, number: int, logs: str | None
) -> ReplicaPlan:
    local = config.ray_address is None
    threads = model.threads or (max(1, cpus // number) if local else None)
    auto = "none" if model.draft_model is None else "draft"
    speculate = auto if model.speculate == "auto" else model.speculate
    engine = EngineConfig(
        model_dir=str(model.path.resolve()),
        name=model.name,
        dtype=model.dtype,
        device=model.device,
        max_context=model.max_context,
        cache_bytes=model.cache_bytes,
        chunk_tokens=model.chunk_tokens,
        max_running=model.max_running,
        threads=threads,
        speculate=speculate,
        draft_model_dir=str(model.draft_model) if speculate == "draft" else None,
        draft_tokens=model.draft_tokens,
        tensor_parallel=1 if config.engine == "fake" else model.tensor_parallel,
        expert_parallel=model.expert_parallel,
        tensor_parallel_invariant=model.tensor_parallel_invariant,
        store=StoreConfig(
            host_bytes=model.host_cache_bytes,
            url=None if config.redis_url in (None, "none") else config.redis_url,
            secret=None if config.store_key is None else read_secret(config.store_key),
        ),
    )
    # On one machine Ray's count of CPUs decides nothing: threads do. In a cluster it keeps replicas apart.
    leader_cpus = 0.01 if local else float(threads or 1)
    return ReplicaPlan(
        model=model.name,
        engine=engine,
        replicas=model.replicas,
        secret=secret,
        leader_cpus=leader_cpus,
        leader_gpus=1.0 if model.device.startswith("cuda") else 0.0,
        drain_s=config.drain_seconds,
        heartbeat_timeout=config.heartbeat_timeout,
        step_timeout=config.step_timeout,
        loopback=local,
        fake=config.engine == "fake",
        logs=logs,
        otlp_endpoint=config.otlp_endpoint,
        expert_hosts=0 if config.engine == "fake" else model.expert_hosts,
        by_role=config.place_by_role,
        # On one machine hosts share the CPUs of their replica: they compute while it waits.
        host_threads=max(1, threads // max(1, model.expert_hosts)) if local and threads is not None else model.threads,
        files=read_text_files(model.path),
        goal=Goal(*model.replicas, model.target_first_token, model.idle_seconds, model.scale_down_seconds),
        surge_percent=model.surge_percent,
        generation=time.time_ns(),
        fake_rows=config.fake_rows,
    )


def serve_logging(logs: str | None) -> dict[str, object]:
    """What Serve writes of a deployment, and where."""
    return {"enable_access_log": False} | ({"logs_dir": logs} if logs is not None else {})


def node_address(loopback: bool) -> str:
    """How the node that this runs on is called."""
    import ray

    return "127.0.0.1" if loopback else str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def machine_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reachable_host(config: ServiceConfig) -> str:
    """Where this machine reaches its own gateway."""
    if is_loopback(config.host):
        return config.host
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
