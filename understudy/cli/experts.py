"""`understudy experts`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from understudy.cli import common
from understudy.cli.common import Admin, Connection, Json, Timeout, TlsCa, TlsCert, TlsKey, Token, UseTls
from understudy.errors import ModelNotFound, UnderstudyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from understudy.v1 import admin_pb2


def experts(
    add: Annotated[int, typer.Option(metavar="N", min=0, help="Add so many hosts to each replica.")] = 0,
    remove: Annotated[int, typer.Option(metavar="N", min=0, help="Drain and remove so many.")] = 0,
    model: Annotated[str, typer.Option(help="Which model, where the service has several with expert hosts.")] = "",
    admin: Admin = common.ADMIN,
    json: Json = False,
    token: Token = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Timeout = 10.0,
) -> None:
    """Show which hosts, or ranks, have a mixture's experts; add or remove hosts while requests run."""
    with Connection(admin, token, tls, tls_ca, tls_cert, tls_key, timeout).open() as client:
        found = placements(client.status().experts, model)
        if add or remove:
            hosts = found[0].hosts_wanted + add - remove
            if hosts < 1:
                raise UnderstudyError(f"--remove {remove}: there are {found[0].hosts_wanted} hosts and one has to stay")
            client.scale_experts(hosts, model=found[0].model)
            found = placements(client.status().experts, found[0].model)
    if json:
        typer.echo(common.as_json({"experts": found}))
        return
    for placement in found:
        show(placement)


def placements(known: Sequence[admin_pb2.ExpertPlacement], model: str) -> list[admin_pb2.ExpertPlacement]:
    """Those of one model. Raises ModelNotFound."""
    models = list(dict.fromkeys(p.model for p in known))
    if not models:
        raise ModelNotFound(
            "no model has expert hosts; start the service with --expert-hosts N, or with --tensor-parallel N "
            "--expert-parallel, which makes hosts of the ranks"
        )
    if model not in models and (model or len(models) > 1):
        raise ModelNotFound(f"--model {model or '(none)'}: models with expert hosts are {', '.join(models)}")
    return [p for p in known if p.model == (model or models[0])]


def show(placement: admin_pb2.ExpertPlacement) -> None:
    """Prints one replica's."""
    p = placement
    typer.echo(
        f"{p.replica}: placement {p.version}"
        + (f", {p.target_version} is being loaded" if p.target_version != p.version else "")
        + f"; balance {p.balance:.2f}; {p.experts:,} experts, {p.copies:,} in memory; changed {p.age_s:,.0f} s ago; "
        f"{len(p.hosts)} of {p.hosts_wanted} hosts" + (f"; {p.problem}" if p.problem else "")
    )
    common.table(
        "",
        ("host", "state", "node", "pid", "life", "held", "room for", "rows"),
        [
            (h.name, h.state, h.node, str(h.pid or ""), str(h.life), f"{h.held:,}", f"{h.capacity:,}", f"{h.rows:,}")
            for h in p.hosts
        ],
    )
