"""A Ray of our own on this machine: on loopback, with a secret of its own, gone with the process that started it."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cluster import undertaker
from understudy.errors import ConfigError

NAMESPACE = "understudy"
_PREFIX = "understudy-"


def local_directory() -> Path:
    """Where the files of this process's service lie while it runs; a short path."""
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{os.getpid()}"


class LocalRay:
    """Ray's processes on this machine. `start` must run on the main thread: the kernel ends them when the thread
    that started them ends. `logs` is where what Ray and Serve wrote is kept."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._mark = secrets.token_hex(16)
        # Ray's sockets lie in it, whose paths must be short.
        self.directory = local_directory()
        self._watcher = undertaker.watch(self._mark, self.directory)

    def start(self, cpus: int, verbose: bool) -> None:
        """Starts Ray with `cpus` CPUs to share out."""
        _remove_stale()
        self._set_environment()

        import ray  # which reads the environment when it is imported

        with _agent_on_any_port():
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                namespace=NAMESPACE,
                object_store_memory=128 << 20,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(self.directory),
                **_logging(verbose),
            )

    def stop(self) -> int:
        """Ends every process, keeps the logs, removes the directory. How many processes had to be killed."""
        import ray

        ray.shutdown()
        killed = undertaker.bury(self._mark, self.directory, 3.0)
        for session in self.directory.glob("session_*"):
            if not session.is_symlink() and (session / "logs").is_dir():
                shutil.copytree(session / "logs", self._logs / "ray", dirs_exist_ok=True, ignore_dangling_symlinks=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        os.environ.pop(undertaker.MARK, None)
        if self._watcher.stdin is not None:
            self._watcher.stdin.close()
        self._watcher.wait(10)
        return killed

    def _set_environment(self) -> None:
        """For Ray's processes, which inherit it. Without a token of this cluster's own any local user could run code
        in it; with RAY_AUTH_MODE unset, Ray asks for the token."""
        os.environ[undertaker.MARK] = self._mark
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # A call that comes after the end must fail: by default Ray would start another cluster for it.
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
        os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"
        # Ray would make its workers nicer than everything else on the machine: any other process would slow answers.
        os.environ.setdefault("RAY_worker_niceness", "0")


def join(address: str, verbose: bool) -> None:
    """Becomes a driver of a running cluster. Raises ConfigError where there is none."""
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    import ray

    try:
        ray.init(address=address, namespace=NAMESPACE, **_logging(verbose))
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(
            f"--ray-address = {address!r}: no Ray cluster can be joined there: {why}; start one with "
            "`ray start --head`, or leave the flag out for one of our own"
        ) from error


@contextmanager
def _agent_on_any_port() -> Iterator[None]:
    """`ray.init` has no word for the port of the node's agent, as `ray start` has. A start waits in vain for the usual
    one, 3.4 s, where another Ray has it already."""
    from ray._private import parameter

    usual = parameter.RayParams
    parameter.RayParams = functools.partial(usual, dashboard_agent_listen_port=0)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        parameter.RayParams = usual  # type: ignore[misc]


def _logging(verbose: bool) -> dict[str, Any]:
    level = logging.INFO if verbose else logging.WARNING
    return {"configure_logging": verbose, "logging_level": level, "log_to_driver": verbose}


def _remove_stale() -> None:
    """Directories of services that were killed together with their watcher."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        number = directory.name.removeprefix(_PREFIX)
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(directory, ignore_errors=True)
