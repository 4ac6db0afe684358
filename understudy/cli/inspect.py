"""`understudy models` and `understudy status`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from understudy.cli import common
from understudy.cli.common import Address, Admin, Connection, Json, Timeout, TlsCa, TlsCert, TlsKey, Token, UseTls
from understudy.cli.experts import show

if TYPE_CHECKING:
    from understudy.v1 import admin_pb2


def models(
    json: Json = False,
    address: Address = common.ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Timeout = 10.0,
) -> None:
    """List the models that a service answers for."""
    with Connection(address, token, tls, tls_ca, tls_cert, tls_key, timeout).open() as client:
        found = client.models()
    if json:
        typer.echo(common.as_json({"models": found}))
        return
    rows = [
        (m.name, m.architecture, m.dtype, f"{m.max_context:,}", f"{m.vocab_size:,}", m.model_fingerprint[:12])
        for m in found
    ]
    common.table("", ("model", "architecture", "dtype", "context", "vocabulary", "fingerprint"), rows)


def status(
    admin: Admin = common.ADMIN,
    json: Json = False,
    token: Token = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Timeout = 10.0,
) -> None:
    """Show models, replicas, processes, caches and expert hosts of a running service."""
    with Connection(admin, token, tls, tls_ca, tls_cert, tls_key, timeout).open() as client:
        found = client.status()
    if json:
        typer.echo(common.as_json(found))
        return
    typer.echo(f"understudy {found.version}, up for {found.uptime_s:,.0f} s")
    common.table(
        "models",
        ("model", "ready", "wanted", "between", "because", "fingerprint", "numerics"),
        [_model(m) for m in found.models],
    )
    common.table(
        "replicas",
        ("id", "model", "state", "node", "epoch", "running", "waiting", "tokens made", "cache", "hits", "drafts"),
        [_replica(replica) for replica in found.replicas],
    )
    _store(list(found.replicas))
    _router(found.router)
    for placement in found.experts:
        show(placement)
    common.table(
        "processes",
        ("role", "pid", "node", "replica", "rank"),
        [(p.role, str(p.pid), p.node, p.replica, str(p.rank) if p.role == "shard" else "") for p in found.processes],
    )


def _model(model: admin_pb2.ModelStatus) -> tuple[str, ...]:
    least, most, scaling = model.replicas_least, model.replicas_most, model.scaling
    because = f"{scaling.detail or scaling.reason.replace('_', ' ')}, {scaling.age_s:,.0f} s ago"
    return (
        model.name,
        str(model.replicas_ready),
        str(model.replicas_wanted),
        f"{least} and {most}" if least != most else "-",
        because if model.HasField("scaling") else "-",
        model.model_fingerprint[:12] + (f" and {model.versions - 1} more" if model.versions > 1 else ""),
        model.numerics_id,
    )


def _replica(replica: admin_pb2.Replica) -> tuple[str, ...]:
    from understudy.v1 import admin_pb2

    state = admin_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_").lower()
    cache = replica.cache
    used = f"{cache.blocks_in_use:,} + {cache.blocks_cached:,} of {cache.blocks_total:,}"
    tiers = [cache.hit_tokens, cache.host_hit_tokens, cache.store_hit_tokens]
    shares = [f"{hit / cache.queried_tokens:.0%}" for hit in tiers if cache.queried_tokens]
    hits = " + ".join(shares if any(tiers[1:]) else shares[:1]) or "-"
    return (
        replica.id,
        replica.model,
        f"{state}: {replica.cause}" if replica.cause else state,
        replica.node,
        str(replica.epoch),
        str(replica.running),
        str(replica.waiting),
        f"{replica.generated_tokens:,}",
        used,
        hits,
        f"{replica.accepted_tokens / replica.drafted_tokens:.0%}" if replica.drafted_tokens else "-",
    )


def _store(replicas: list[admin_pb2.Replica]) -> None:
    """What was loaded from behind the devices; nothing where no replica ever did or wrote."""
    rows = []
    for replica in replicas:
        c = replica.cache
        if any((c.host_loaded_bytes, c.store_loaded_bytes, c.store_loads_given_up, c.store_writes_dropped)):
            loaded = [(c.host_loaded_bytes, c.host_load_seconds), (c.store_loaded_bytes, c.store_load_seconds)]
            shown = [f"{size / 1e6:,.1f} MB in {seconds:,.2f} s" if size else "-" for size, seconds in loaded]
            rows.append((replica.id, *shown, f"{c.store_loads_given_up:,}", f"{c.store_writes_dropped:,}"))
    if rows:
        common.table("prefix store", ("replica", "from the host", "from Redis", "given up", "writes dropped"), rows)


def _router(router: admin_pb2.RouterStatus) -> None:
    """Why requests went where, and what the router knows of prefixes."""
    index, decisions = router.index, router.decisions
    made = ", ".join(f"{name.replace('_', ' ')} {decisions[name]:,}" for name in sorted(decisions) if decisions[name])
    reused = ", ".join(f"{tier} {router.reused_tokens[tier]:,}" for tier in ("device", "host", "store"))
    known = f"{index.blocks:,} blocks ({index.stored_blocks:,} of the store, {index.expected_blocks:,} expected)"
    common.table(
        "router",
        ("decisions", "refused", "tokens reused", "index", "size", "changes", "gaps", "snapshots"),
        [
            (
                made or "-",
                f"{router.refused:,}",
                reused,
                known,
                f"{index.bytes / 1e6:,.1f} MB",
                f"{index.changes:,}",
                f"{index.gaps:,}",
                f"{index.snapshots:,}",
            )
        ],
    )
