"""What a gateway says over HTTP: metrics for Prometheus, and probes for those that cannot ask gRPC.

`/metrics`; `/livez`: 200 while the process answers; `/readyz`: 200 while a token can be had, else 503. Probes answer in
JSON with the troubles of every model.
"""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from router.health import Verdict

_StartResponse = Callable[[str, list[tuple[str, str]]], object]


class HealthView(Protocol):
    """What a probe asks for; read from any thread."""

    verdicts: dict[str, Verdict]

    @property
    def serving(self) -> bool: ...


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a probe every second is no news."""


class HttpServer:
    """Listens from construction until `close`, on threads of its own. Raises OSError where it cannot."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, health: HealthView) -> None:
        self._metrics = make_wsgi_app(registry)
        self._health = health
        self._server = make_server(host, port, self._answer, _Server, _Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path in ("/livez", "/readyz"):
            return self._probe(path, start)
        if path in ("/", "/metrics"):
            answer: Iterable[bytes] = self._metrics(environ, start)
            return answer
        start("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there are /metrics, /livez and /readyz\n"]

    def _probe(self, path: str, start: _StartResponse) -> Iterable[bytes]:
        verdicts = self._health.verdicts
        well = path == "/livez" or self._health.serving
        models = {name: {"serving": v.serving, "troubles": list(v.troubles)} for name, v in verdicts.items()}
        start("200 OK" if well else "503 Service Unavailable", [("Content-Type", "application/json")])
        return [json.dumps({"ok": well, "models": models}).encode() + b"\n"]

    def close(self) -> None:
        """Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
