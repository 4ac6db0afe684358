"""Where the campaign's models are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from service_process import make_tiny_llama


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K where the oracles are there, else a tiny random Llama that speaks bytes."""
    oracles = Path(os.environ.get("UNDERSTUDY_ORACLES", Path(__file__).parents[3] / "shared" / "oracles"))
    stories = oracles / "weights" / "stories260K-hf"
    return stories if stories.is_dir() else make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
