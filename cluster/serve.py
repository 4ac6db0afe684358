"""`understudy serve`: one run of the service in the foreground, from the first word on the console to the last process.

Ready means that a token has come through a gateway. A failure on the way there is one line and an exit code, never a
retry: somebody is watching.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cluster import app
from cluster.config import ServiceConfig
from cluster.console import Console
from cluster.directory import Directory
from cluster.local import LocalRay, join, local_directory
from cluster.logs import configure
from cluster.plan import Plan, machine_cpus, make_plan, reachable_host
from cluster.redis import Announcer, RedisServer, own_server
from cluster.renewal import Reload, Renewal
from cluster.roster import Member
from cluster.signals import Signals, Stopped
from router.interceptors import Tokens
from router.server import address, probe_port
from understudy.errors import FROM_KIND, ConfigError, InternalError, UnderstudyError

log = logging.getLogger(__name__)

_POLL_S = 0.1
_CHECK_S = 2.0  # asking Serve for its status costs its controller and us some hundredths of a second
_KEPT_RUNS = 10  # directories of logs


def run(config: ServiceConfig, console: Console, reload: Reload | None = None) -> int:
    """Serves until a signal comes; the exit code. Raises UnderstudyError when the service cannot start.

    On SIGHUP `reload` reads the configuration again, and models that have changed in it are replaced. Must run on the
    main thread.
    """
    asked = config
    config = with_free_ports(config)
    check_files(config)
    config, redis = own_server(config, local_directory())
    for note in config.notes:
        console.say(f"warning: {note}")
    logs = new_log_directory()
    plan = make_plan(config, machine_cpus(), logs / "serve")
    signals = Signals(reloads=reload is not None)
    renewal = None if reload is None else Renewal(asked, reload, console, signals)
    with signals, console.quiet(logs / "serve.log", config.verbose):
        configure(logging.DEBUG if config.verbose else logging.INFO)
        if not config.verbose:
            console.say(f"logs: {logs}")
        with suppress(Stopped):
            _serve(plan, redis, logs, console, signals, renewal)
        console.done()
        console.say("understudy: stopped")
    return 0


def _serve(
    plan: Plan, redis: RedisServer | None, logs: Path, console: Console, signals: Signals, renewal: Renewal | None
) -> None:
    with _ray(plan.gateway.config, logs, console, signals), ExitStack() as stack:
        signals.install()  # Ray has set its own meanwhile
        signals.check()
        if redis is not None:
            console.stage("starting Redis")
            stack.callback(redis.stop)
            start_redis(redis)
        console.stage("starting Serve")
        directory = app.start_serve(plan)
        if redis is not None:
            stack.callback(Announcer(directory, redis).stop)
        try:
            _start(plan, directory, console, signals)
            while signals.wait() and renewal is not None:
                plan = renewal.run(plan, directory)
        except Stopped:
            pass
        except UnderstudyError:
            if plan.gateway.config.ray_address is not None:
                app.take_down(plan)
            raise
        console.stage("draining")
        try:
            app.take_down(plan)
        except Stopped:  # a second signal: no more patience
            if plan.gateway.config.ray_address is not None:  # a Ray of our own ends with us
                console.say("warning: what was not yet drained goes on in the cluster; `serve shutdown` there ends it")


def start_redis(redis: RedisServer) -> None:
    """Raises InternalError where it does not start."""
    try:
        redis.start()
    except (OSError, RuntimeError) as error:
        raise InternalError(f"the prefix store: {error}; give --redis-url none to do without") from error


@contextmanager
def _ray(config: ServiceConfig, logs: Path, console: Console, signals: Signals) -> Iterator[None]:
    """A Ray to run on: our own, which ends with the block, or one that was there before."""
    if config.ray_address is not None:
        import ray

        console.stage(f"joining Ray at {config.ray_address}")
        join(config.ray_address, config.verbose)
        try:
            yield
        finally:
            ray.shutdown()
        return
    console.stage("starting Ray")
    local = LocalRay(logs)
    try:
        try:
            local.start(max(4, machine_cpus()), config.verbose)
        except SystemExit:  # how Ray answers SIGTERM until our handlers are back
            raise Stopped from None
        yield
    finally:
        signals.ignore()
        local.stop()


def _start(plan: Plan, directory: Directory, console: Console, signals: Signals) -> None:
    """Deploys and waits until a token can be had. Raises UnderstudyError where that will not come."""
    app.deploy(plan)
    looked = time.monotonic()
    while True:
        signals.check()
        try:
            members = directory.members_now()
        except ConnectionError as error:  # the machine is busy, or the router is being started again
            log.warning("%s", error)
            time.sleep(_POLL_S)
            continue
        raise_failure(members)
        if all_ready(members, plan):
            break
        if time.monotonic() - looked > _CHECK_S:
            app.check(plan)
            looked = time.monotonic()
        console.stage(*progress_of(members))
        time.sleep(_POLL_S)
    config = plan.gateway.config
    if config.tls_cert is None:
        complete_one_token(config, plan)
    console.done()
    console.ready(address(config.host, config.port))
    console.say(example(config))


def raise_failure(members: list[Member]) -> None:
    """Raises the first failure that a member announces, as an error of its kind."""
    for member in members:
        if member.stage == "failed":
            who = member.claim.replica if member.claim is not None else member.model or "the gateway"
            error = FROM_KIND.get(member.error_kind, InternalError)
            raise error(member.error if error is not InternalError else f"{who}: {member.error}")


def all_ready(members: list[Member], plan: Plan) -> bool:
    """Whether every replica and gateway that is wanted is ready."""
    for replicas in plan.replicas:
        mine = [m for m in members if m.role == "replica" and m.model == replicas.model and m.stage == "ready"]
        if len(mine) < replicas.replicas.first:
            return False
    gateways = [m for m in members if m.role == "gateway" and m.stage == "ready"]
    return len(gateways) >= plan.gateway.config.gateways


def progress_of(members: list[Member]) -> tuple[str, float | None]:
    """What the console shows: the stage of the slowest replica, and the share of weights read while they are read."""
    stages = {m.stage for m in members if m.role == "replica"}
    if not stages or "starting" in stages:
        return "starting replicas", None
    if "loading" in stages:
        loading = [m.done if m.stage == "loading" else 1.0 for m in members if m.role == "replica"]
        return "loading weights", sum(loading) / len(loading)
    if "warming" in stages:
        return "warming up", None
    return "waiting for the gateway", None


def complete_one_token(config: ServiceConfig, plan: Plan) -> None:
    """A real completion of one token of each model through the gateway. Raises UnderstudyError."""
    from understudy.client import Client

    with Client(address(reachable_host(config), config.port), token=first_token(config.tokens)) as client:
        for model in plan.gateway.models:
            for _ in client.generate([0], model=model, max_tokens=1, ignore_eos=True, timeout=60.0):
                pass


def first_token(tokens: Path | None) -> str | None:
    """A bearer token that the gateway accepts, where it wants one."""
    if tokens is None:
        return None
    for line in tokens.read_text(encoding="utf-8").splitlines():
        if line.split() and not line.lstrip().startswith("#"):
            return line.split()[0]
    return None


def example(config: ServiceConfig) -> str:
    """A command to type next."""
    where = "" if config.port == 50051 else f" --address {address(reachable_host(config), config.port)}"
    model = "" if len(config.models) == 1 else f" --model {config.models[0].name}"
    security = (" --tls-ca FILE" if config.tls_cert else "") + (" --token TOKEN" if config.tokens else "")
    return f'try: {program()} complete "The capital of France is"{model}{where}{security}'


def program() -> str:
    """The command as it can be typed again: its path where the name alone is not found."""
    typed = sys.argv[0]
    return typed if Path(typed).name == "understudy" and shutil.which("understudy") is None else "understudy"


def with_free_ports(config: ServiceConfig) -> ServiceConfig:
    """Ports of 0 become free ones. Raises ConfigError where one is taken."""
    chosen: dict[str, int] = {}
    for key in ("port", "admin_port", "metrics_port"):
        host, port = config.host if key == "port" else "127.0.0.1", getattr(config, key)
        if port:
            try:
                probe_port(host, port)
            except UnderstudyError as error:
                raise type(error)(f"--{key.replace('_', '-')}{error.message.removeprefix('port')}") from error
        else:
            chosen[key] = free_port(host)
    return config.model_copy(update=chosen)


def free_port(host: str) -> int:
    """A port that nobody listens on. Raises ConfigError where `host` is no address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"--host = {host!r}: cannot listen there: {error}; give an address of this machine"
        ) from error


def check_files(config: ServiceConfig) -> None:
    """What can be known of files before anything is started. Raises CheckpointError, ConfigError."""
    from workers.model.config import read_spec

    for model in config.models:
        read_spec(model.path)
    if config.tokens is not None:
        Tokens.read(config.tokens)


def new_log_directory() -> Path:
    """A directory for this run's logs; of older runs the latest few are kept. Raises ConfigError."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "understudy" / "logs"
    directory = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"logs cannot be written to {root}: {error.strerror}; set XDG_CACHE_HOME to a directory that can be written"
        ) from error
    for old in sorted(p for p in root.iterdir() if p.is_dir())[:-_KEPT_RUNS]:
        shutil.rmtree(old, ignore_errors=True)
    return directory
