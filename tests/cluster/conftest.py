"""One real service for the whole session.

At its end nothing may be left: no running sequence, no block, no process, no directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_process import TOKEN, Service, idle, make_tiny_llama, running, until


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K where the oracles are there, else a tiny random Llama that speaks bytes."""
    oracles = Path(os.environ.get("UNDERSTUDY_ORACLES", Path(__file__).parents[3] / "shared" / "oracles"))
    stories = oracles / "weights" / "stories260K-hf"
    return stories if stories.is_dir() else make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, text_model: Path, demo_model: Path) -> Iterator[Service]:
    """Two replicas of `text`, and one of `shared`, the same model over two ranks, behind two gateways that want a
    token; and the bundled model where it is there."""
    place = tmp_path_factory.mktemp("service")
    tokens, config = place / "tokens", place / "service.yaml"
    tokens.write_text(f"# for tests\n{TOKEN} tester\n")
    models = {"text": {"path": str(text_model), "dtype": "float32", "replicas": 2}}
    models["shared"] = {"path": str(text_model), "dtype": "float32", "tensor_parallel": 2}
    if (demo_model / "model.safetensors").is_file():
        models["demo"] = {"path": str(demo_model)}
    config.write_text(json.dumps({"models": models, "gateways": 2, "tokens": str(tokens), "drain_seconds": 10}))
    with running(place, ["--config", str(config), "--threads", "1"]) as made:
        made.wait_until_ready()
        yield made
        until(lambda: idle(made.status()))
        assert made.stop()[-1] == "understudy: stopped"
