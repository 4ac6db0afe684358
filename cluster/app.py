"""The composition root: from a plan to a running Serve application, and back."""

from __future__ import annotations

import logging
from typing import Any

from cluster import gateway, replica
from cluster.directory import Directory, create
from cluster.plan import Plan, serve_logging
from router.actor import remove
from router.admission import Limits
from understudy.errors import InternalError

APPLICATION = "understudy"
log = logging.getLogger(__name__)


def build(plan: Plan) -> Any:
    """The Serve application: gateways, and the replicas of every model."""
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
    """Hands the application to Serve and does not wait for it: no thread may ask Ray anything once Ray is shut down."""
    from ray import serve

    serve.run_many(
        [serve.RunTarget(build(plan), name=APPLICATION, route_prefix=None)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def check() -> None:
    """Raises InternalError when Serve has given the application up."""
    from ray import serve

    status = serve.status().applications.get(APPLICATION)
    if status is not None and status.status == "DEPLOY_FAILED":
        raise InternalError(f"Serve could not start the application: {status.message}")


def take_down(plan: Plan) -> None:
    """Drains gateways and replicas, then removes the router, and Serve where nobody else uses it. Quick where there is
    nothing."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException as ServeException

    try:
        serve.delete(APPLICATION)
        if plan.gateway.config.ray_address is not None and not serve.status().applications:
            serve.shutdown()  # type: ignore[no-untyped-call]
    except (ServeException, RayError) as error:  # it is gone already, or not yet there
        log.warning("Serve could not delete the application: %s", error)
    finally:  # also where somebody does not want to wait any longer
        remove(plan.gateway.namespace)
