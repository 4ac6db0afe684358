"""The composition root: from a plan to a running Serve application, and back."""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from cluster import gateway, replica
from cluster.directory import Directory, create
from cluster.plan import Plan, ReplicaPlan, serve_logging
from router.actor import remove
from router.admission import Limits
from understudy.errors import InternalError

APPLICATION = "understudy"  # the gateways' one
_SETTLED = ("RUNNING", "DEPLOY_FAILED", "UNHEALTHY")
log = logging.getLogger(__name__)


def application_of(model: str) -> str:
    """The Serve application of a model's replicas: one for each, so that a new checkpoint of one leaves gateways and
    other models alone."""
    return f"{APPLICATION}-{re.sub(r'[^A-Za-z0-9.-]', '-', model)}-{zlib.crc32(model.encode()):08x}"


def build(plan: Plan) -> Any:
    """Everything as one Serve application: gateways, and the replicas of every model."""
    return gateway.deployment(plan.gateway, [replica.deployment(p) for p in plan.replicas])


def start_serve(plan: Plan) -> Directory:
    """Starts Serve without its proxies, and the router actor."""
    from ray import serve

    serve.start(proxy_location="Disabled", logging_config=serve_logging(plan.gateway.logs))
    return start_router(plan)


def start_router(plan: Plan) -> Directory:
    """The router actor, started where there is none."""
    config = plan.gateway.config
    limits = Limits(config.max_queue, config.max_queued_tokens, config.max_service_queue)
    return create(plan.gateway.namespace, config.heartbeat_timeout, limits)


def deploy(plan: Plan) -> None:
    """Hands gateways and models to Serve and does not wait for them: no thread may ask Ray anything once Ray is shut
    down."""
    _run(
        [
            (APPLICATION, gateway.deployment(plan.gateway, [])),
            *((_name(p), replica.deployment(p)) for p in plan.replicas),
        ]
    )


def redeploy(plans: Sequence[ReplicaPlan], gone: Iterable[str] = ()) -> None:
    """Rolls models from the replicas that they have to those of a new plan, starts new ones, drains those that are
    `gone`. Does not wait."""
    from ray import serve

    if plans:
        _run([(_name(p), replica.deployment(p, _present(p))) for p in plans])
    for model in gone:
        serve.delete(application_of(model), _blocking=False)


def settled(models: Iterable[str]) -> dict[str, bool]:
    """Of these models those for which Serve has done what it was told, and whether that went well."""
    from ray import serve

    applications = serve.status().applications
    states = {m: applications.get(application_of(m)) for m in models}
    return {m: s.status == "RUNNING" for m, s in states.items() if s is not None and s.status in _SETTLED}


def _name(plan: ReplicaPlan) -> str:
    return application_of(plan.model)


def _run(applications: list[tuple[str, Any]]) -> None:
    from ray import serve

    serve.run_many(
        [serve.RunTarget(made, name=name, route_prefix=None) for name, made in applications],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def _present(plan: ReplicaPlan) -> int | None:
    """How many replicas of a model there are: what an autoscaled one begins with when it is given a new plan."""
    from ray import serve

    status = serve.status().applications.get(_name(plan))
    if status is None or plan.replicas.fixed:
        return None
    states = [d.replica_states for d in status.deployments.values()]
    present = sum(count for s in states for state, count in s.items() if state in ("STARTING", "UPDATING", "RUNNING"))
    return min(max(present, plan.replicas.least), plan.replicas.most)


def check(plan: Plan) -> None:
    """Raises InternalError when Serve has given up on a part."""
    from ray import serve

    applications = serve.status().applications
    for name in (APPLICATION, *map(_name, plan.replicas)):
        status = applications.get(name)
        if status is not None and status.status == "DEPLOY_FAILED":
            raise InternalError(f"Serve could not start {name}: {status.message}")


def take_down(plan: Plan) -> None:
    """Drains gateways and replicas, then removes the router, and Serve where nobody else uses it. Quick where there is
    nothing."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException as ServeException

    names = (APPLICATION, *map(_name, plan.replicas))
    try:
        for name in names:  # all at the same time
            serve.delete(name, _blocking=False)
        for name in names:
            serve.delete(name)
        if plan.gateway.config.ray_address is not None and not serve.status().applications:
            serve.shutdown()  # type: ignore[no-untyped-call]
    except (ServeException, RayError) as error:  # it is gone already, or not yet there
        log.warning("Serve could not delete the application: %s", error)
    finally:  # also where somebody does not want to wait any longer
        remove(plan.gateway.namespace)
