"""How a gRPC server listens: sizes, keepalive, ports, TLS."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from understudy.errors import ConfigError


@dataclass(frozen=True)
class GatewayConfig:
    """Where and how a gateway listens. Port 0 takes a free one.

    `max_message_bytes` bounds a request. `share_port` lets several gateways listen on one port: only then, and
    deliberately, is SO_REUSEPORT set. `watch_s` is how often the list of replicas is looked at.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    share_port: bool = False
    max_message_bytes: int = 16 << 20
    max_streams: int = 4096
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    tokens: Path | None = None
    watch_s: float = 0.25


def server_options(config: GatewayConfig) -> list[tuple[str, int]]:
    """Channel arguments of a server."""
    return [
        ("grpc.so_reuseport", int(config.share_port)),
        # The interceptor refuses what is too large with an error of ours; far above that the transport does.
        ("grpc.max_receive_message_length", config.max_message_bytes * 2 + (1 << 20)),
        ("grpc.max_send_message_length", -1),
        # Clients may ping every 10 s, with or without a call under way.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 0),
        # Finds clients that vanished without a word.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # what counts in later versions of gRPC
    ]


def address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def probe_port(host: str, port: int) -> None:
    """Raises ConfigError where the port is taken. Call it before sharing a port: a second server would otherwise
    silently get part of a stranger's connections."""
    if port == 0:
        return
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"host: {host!r} cannot be resolved: {error}") from error
    for family, kind, protocol, _, to in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(to)
            except OSError as error:
                raise ConfigError(
                    f"port: cannot listen on {address(host, port)}: {error.strerror}; stop what listens there, or "
                    "choose another port"
                ) from error


def bind(server: Any, config: GatewayConfig) -> int:
    """Listens, with TLS where a certificate is configured; the port. Raises ConfigError."""
    if not config.share_port:
        probe_port(config.host, config.port)
    where = address(config.host, config.port)
    try:
        if config.tls_cert is None:
            if config.tls_client_ca is not None:
                raise ConfigError("tls_client_ca: needs tls_cert and tls_key")
            port: int = server.add_insecure_port(where)
        else:
            port = server.add_secure_port(where, _credentials(config))
    except RuntimeError as error:
        raise ConfigError(f"port: cannot listen on {where}: {error}; choose another port") from error
    if port == 0:
        raise ConfigError(f"port: cannot listen on {where}; choose another port, or check the certificate")
    return port


def _credentials(config: GatewayConfig) -> grpc.ServerCredentials:
    if config.tls_key is None or config.tls_cert is None:
        raise ConfigError("tls_cert and tls_key: give both")

    def read(key: str, path: Path) -> bytes:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{key}: {path} cannot be read: {error.strerror}") from error
        if b"-----BEGIN" not in data:
            raise ConfigError(f"{key}: {path} is not a PEM file")
        return data

    pair = (read("tls_key", config.tls_key), read("tls_cert", config.tls_cert))
    client_ca = None if config.tls_client_ca is None else read("tls_client_ca", config.tls_client_ca)
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)
