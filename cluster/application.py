"""The application as Serve's own configuration names it: `import_path: cluster.application:build`.

Where nobody runs `understudy serve`, as under KubeRay, Serve calls `build` itself with the `args` of that text, on any
node of the cluster, and again after each change of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cluster import app
from cluster.config import ServiceConfig, load
from cluster.plan import Plan, machine_cpus, make_plan
from understudy.errors import ConfigError


def read(args: Mapping[str, Any], environ: Mapping[str, str]) -> ServiceConfig:
    """The configuration of a running cluster: `args` are the keys of a configuration file; `UNDERSTUDY_*` in the
    environment of the node wins over them. Without a Redis there is no prefix store.

    Raises ConfigError, CheckpointError.
    """
    config = load(environ=environ, tree=args)
    if config.ray_address is not None:
        raise ConfigError(f"ray_address = {config.ray_address!r}: is the cluster that this runs in; leave it out")
    if config.wire_key is None:  # a secret that `build` draws would part those of before a change from those after it
        raise ConfigError("wire_key: is not given; name a file with a secret, as of `openssl rand -hex 32`")
    return config.model_copy(update={"ray_address": "auto", "redis_url": config.redis_url or "none"})


def plan(args: Mapping[str, Any], environ: Mapping[str, str]) -> Plan:
    """What `read` says, as what each deployment is given. Raises as `read` does, and where files are missing."""
    from cluster.serve import check_files

    config = read(args, environ)
    check_files(config)
    return make_plan(config, machine_cpus())


def build(args: dict[str, Any]) -> Any:
    """The Serve application; the router actor is started beside it."""
    made = plan(args, os.environ)
    app.start_router(made)
    return app.build(made)
