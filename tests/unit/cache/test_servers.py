"""Every kind of Redis that a URL can name: with a password, by TLS, by Sentinel, a Cluster."""

from __future__ import annotations

import datetime
import ipaddress
import random
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import redis as client_library
from ports import free_port
from redis_server import TestRedis
from tier_stage import Rank, keys_of

from cluster.redis import find_server
from workers.cache.values import value_name
from workers.cache.wire import check_url, open_servers, shown_url


def share(url: str, others: str | None = None, count: int = 12) -> None:
    """What one rank writes another finds and loads."""
    keys = keys_of(count, seed=len(url))
    with Rank(url) as a, Rank(others or url) as b:
        a.save(keys)
        a.settle()
        assert a.store.counts.store_writes_dropped == 0
        assert b.find([*keys, bytes(32)]) == [(True,)] * count + [(False,)]
        assert all(e.ok for e in b.load(keys))


@pytest.fixture
def redis() -> Iterator[TestRedis]:
    with TestRedis(tcp=True) as server:
        yield server


def test_a_password(redis: TestRedis):
    client = redis.client()
    client.config_set("requirepass", "open sesame")
    share(f"redis://:open%20sesame@127.0.0.1:{redis.port}/3")
    keys = keys_of(3)
    for url in (redis.url, f"redis://:wrong@127.0.0.1:{redis.port}"):
        with Rank(url) as rank:  # no error: nothing is found and nothing written
            rank.save(keys)
            assert rank.find(keys) == [(False,)] * 3
            rank.settle()
            assert rank.store.counts.store_failures > 0


def test_tls(redis: TestRedis, tmp_path: Path):
    pytest.importorskip("cryptography")
    cert, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with Tunnel(context, redis.port) as tunnel:
        url = f"rediss://127.0.0.1:{tunnel.port}"
        share(f"{url}?ssl_ca_certs={cert}", redis.url)
        with Rank(url) as rank:  # nobody vouches for it
            assert rank.find(keys_of(1)) == [(False,)]
            assert rank.store.counts.store_failures == 1


def test_sentinel(redis: TestRedis, tmp_path: Path):
    port, server = free_port(), find_server()
    assert server is not None
    file = tmp_path / "sentinel.conf"
    file.write_text(f"port {port}\ndir {tmp_path}\nsentinel monitor prefixes 127.0.0.1 {redis.port} 1\n")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([server, str(file), "--sentinel"], stdout=log, stderr=log)
    try:
        sentinel = client_library.Redis(port=port)
        until(lambda: sentinel.sentinel_get_master_addr_by_name("prefixes") is not None)
        sentinel.close()
        share(f"redis+sentinel://127.0.0.1:{port}/prefixes", redis.url)
        share(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/prefixes/0", redis.url)
    finally:
        process.kill()
        process.wait()


def test_a_cluster():
    """Three servers, and a slot that moves while it is used."""
    with ExitStack() as stack:
        rng = random.Random()
        nodes = []
        for _ in range(3):
            port = next(p for p in iter(lambda: rng.randrange(20_000, 30_000), 0) if is_free(p) and is_free(p + 10_000))
            options = {"cluster_enabled": "yes", "cluster_node_timeout": "5000", "cluster_config_file": "nodes.conf"}
            nodes.append(stack.enter_context(TestRedis(port=port, **options)))
        clients = [node.client() for node in nodes]
        for i, client in enumerate(clients):
            client.execute_command("CLUSTER", "ADDSLOTS", *range(i * 16384 // 3, (i + 1) * 16384 // 3))
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        until(lambda: all(c.execute_command("CLUSTER INFO")["cluster_state"] == "ok" for c in clients))
        until(lambda: all(c.execute_command("CLUSTER INFO")["cluster_known_nodes"] == "3" for c in clients))
        share(nodes[1].url, nodes[2].url, count=30)
        assert all(client.dbsize() > 0 for client in clients), "all of them hold something"

        keys = keys_of(20, seed=8)
        with Rank(nodes[0].url) as rank:
            rank.save(keys)
            rank.settle()
            name = value_name(keys[0], 0, 0)
            slot = clients[0].execute_command("CLUSTER", "KEYSLOT", name)
            owner = next(i for i in range(3) if slot < (i + 1) * 16384 // 3)
            taker = (owner + 1) % 3
            clients[owner].delete(*[value_name(keys[0], 0, head) for head in range(2)])
            ids = [c.execute_command("CLUSTER", "MYID") for c in clients]
            for client in (clients[taker], clients[owner], clients[3 - owner - taker]):
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[taker])
            found = rank.load(keys)
            assert [e.ok for e in found] == [False] + [True] * 19
            rank.store._known.forget()
            rank.save(keys)  # the new owner takes it
            rank.settle()
            until(lambda: rank.find(keys) == [(True,)] * 20)
            assert all(e.ok for e in rank.load(keys))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://localhost", "must begin with redis://"),
        ("localhost:6379", "must begin with redis://"),
        ("unix://", "names no socket"),
        ("redis+sentinel://localhost/x", "is no Sentinel URL"),
        ("redis+sentinel://localhost:1", "is no Sentinel URL"),
        ("redis+sentinel://localhost:1/x/y", "names no database"),
    ],
)
def test_urls_that_name_nothing(url: str, said: str):
    with pytest.raises(ValueError, match=said):
        check_url(url)


def test_passwords_are_not_shown():
    url = "rediss://user:secret@host:6380/1?ssl_ca_certs=/ca.pem"
    check_url(url)
    assert shown_url(url) == "rediss://host:6380/1"
    assert shown_url("unix:///tmp/s") == "unix:///tmp/s"


def test_nobody_there_is_said_when_it_is_opened():
    with pytest.raises((OSError, client_library.RedisError)):
        open_servers("redis://127.0.0.1:1", 0.5)


def until(true: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        with suppress(client_library.RedisError):
            if true():  # type: ignore[operator]
                return
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def is_free(port: int) -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that vouches for itself, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "redis")])
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
    made = made.not_valid_after(now + datetime.timedelta(days=1)).add_extension(names, critical=False)
    made = made.add_extension(x509.BasicConstraints(True, None), critical=True)
    cert, secret = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    secret.write_bytes(pem)
    return cert, secret


class Tunnel:
    """Takes TLS off in front of a port: this redis-server is built without."""

    def __init__(self, context: ssl.SSLContext, port: int) -> None:
        self._context, self._to = context, port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                raw, _ = self._server.accept()
                raw.settimeout(1.0)  # a client that does not trust us may just go away
                try:
                    near = self._context.wrap_socket(raw, server_side=True)
                except OSError:  # the client does not trust us
                    raw.close()
                    continue
                near.settimeout(None)
                far = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [near, far]
                for a, b in ((near, far), (far, near)):
                    self._threads.append(threading.Thread(target=self._pump, args=(a, b)))
                    self._threads[-1].start()

    def _pump(self, a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError, ValueError):
            while data := a.recv(1 << 16):
                b.sendall(data)
        for s in (a, b):
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Tunnel:
        self._threads[0].start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for end in self._ends:
            end.close()
