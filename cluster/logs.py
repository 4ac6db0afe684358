"""Logging of the service's own processes: one line per event on stderr, which Ray keeps in a file per process."""

from __future__ import annotations

import logging

import structlog


def configure(level: int = logging.INFO) -> None:
    """For the process it is called in. Idempotent."""
    ours = [logging.getLogger(name) for name in ("understudy", "workers", "router", "cluster")]
    if ours[0].handlers:
        return
    exporter = logging.getLogger("opentelemetry.exporter")  # says where spans could not be delivered
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    for logger in ours:
        logger.setLevel(level)
    for logger in (*ours, exporter):
        logger.addHandler(handler)
        logger.propagate = False
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
