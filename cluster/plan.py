"""What each deployment is given: plain data that crosses the cluster, made once from the configuration."""

from __future__ import annotations

import os
import secrets
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config import ModelConfig, ServiceConfig, is_loopback
from cluster.local import NAMESPACE
from router.chat.templates import MORE_TEMPLATES, TEMPLATE_FILE
from router.models import TEXT_FILES
from understudy.errors import CheckpointError, ConfigError
from workers.cache.orders import StoreConfig
from workers.engine import EngineConfig

# They wait more than they compute. Any share of a CPU would keep a rank that wants it whole from its place.
SUPERVISOR_CPUS = 0.0
GATEWAY_CPUS = 0.0
LEASE_S = 10.0
LEAST_SECRET = 16  # bytes


@dataclass(frozen=True)
class ReplicaPlan:
    """One model's replicas. `secret` is what both ends of a wire know; `loopback` keeps wires on this machine."""

    model: str
    engine: EngineConfig
    replicas: int
    secret: str = field(repr=False)
    leader_cpus: float
    leader_gpus: float
    drain_s: float
    heartbeat_timeout: float
    loopback: bool
    fake: bool
    logs: str | None = None
    namespace: str = NAMESPACE
    expert_hosts: int = 0
    host_threads: int | None = None  # of each of them
    otlp_endpoint: str | None = None


@dataclass(frozen=True)
class GatewayPlan:
    """What gateways need. `files` are the checkpoints' text files by model and name, compressed, for a gateway's node
    need not have them; certificates and tokens are read from paths on each gateway's node."""

    config: ServiceConfig
    files: dict[str, dict[str, bytes]]
    wanted: dict[str, int]
    secret: str = field(repr=False)
    logs: str | None = None
    started: float = field(default_factory=time.time)  # of the clock on the wall
    namespace: str = NAMESPACE


@dataclass(frozen=True)
class Plan:
    """The whole application."""

    gateway: GatewayPlan
    replicas: tuple[ReplicaPlan, ...]


def make_plan(config: ServiceConfig, cpus: int, logs: Path | None = None) -> Plan:
    """`cpus` are those of a machine that the replicas share; `logs` is where Serve's replicas write, None Ray's place.

    Raises CheckpointError where text files are missing.
    """
    secret = secrets.token_hex(32)
    number = sum(m.replicas * m.tensor_parallel for m in config.models)
    local = config.ray_address is None
    place = str(logs) if local and logs is not None else None
    replicas = tuple(_replica_plan(config, model, secret, cpus, number, place) for model in config.models)
    files = {m.name: read_text_files(m.path) for m in config.models}
    wanted = {m.name: m.replicas for m in config.models}
    return Plan(GatewayPlan(config, files, wanted, secret, place), replicas)


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


def read_secret(path: Path) -> bytes:
    """The secret in a file, without white space around it. Raises ConfigError."""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"store_key: {path} cannot be read: {error.strerror}") from error
    if len(secret) < LEAST_SECRET:
        raise ConfigError(
            f"store_key: {path} holds {len(secret)} bytes; write {LEAST_SECRET} or more, as of `openssl rand -hex 32`"
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
        loopback=local,
        fake=config.engine == "fake",
        logs=logs,
        otlp_endpoint=config.otlp_endpoint,
        expert_hosts=0 if config.engine == "fake" else model.expert_hosts,
        # On one machine hosts share the CPUs of their replica: they compute while it waits.
        host_threads=max(1, threads // max(1, model.expert_hosts)) if local and threads is not None else model.threads,
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
