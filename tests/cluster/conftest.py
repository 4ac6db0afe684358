"""One real service for the files that are called test_service_…; the others start their own.

At its end nothing may be left: no running sequence, no block, no process, no directory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import fate
import pytest
from otlp_collector import Collector
from service_process import TOKEN, Service, idle, running, until


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def service(
    tmp_path_factory: pytest.TempPathFactory, text_model: Path, demo_model: Path, collector: Collector
) -> Iterator[Service]:
    """Two replicas of `text`, and one of `shared`, over two ranks, behind two gateways that want a token; and the
    bundled model where it is there, as `demo`, as `apart`, its experts on two hosts, and as `shared`, its experts at
    the ranks. Spans go to `collector`; engines have a fault: see `fate`."""
    place = tmp_path_factory.mktemp("service")
    tokens, config = place / "tokens", place / "service.yaml"
    tokens.write_text(f"# for tests\n{TOKEN} tester\n")
    models: dict[str, object] = {"text": {"path": str(text_model), "dtype": "float32", "replicas": 2}}
    models["shared"] = {"path": str(text_model), "dtype": "float32", "tensor_parallel": 2}
    if (demo_model / "model.safetensors").is_file():
        models["demo"] = {"path": str(demo_model)}
        models["apart"] = {"path": str(demo_model), "expert_hosts": 2}
        models["shared"] = {"path": str(demo_model), "dtype": "float32", "tensor_parallel": 2, "expert_parallel": True}
    told = {"models": models, "gateways": 2, "tokens": str(tokens), "drain_seconds": 10}
    config.write_text(json.dumps(told | {"otlp_endpoint": collector.endpoint}))
    with running(place, ["--config", str(config), "--threads", "1"], fate.environment(place)) as made:
        made.wait_until_ready()
        yield made
        until(lambda: idle(made.status()))
        assert made.stop()[-1] == "understudy: stopped"
