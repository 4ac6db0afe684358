"""A tiny mixture, and a look at the end of each test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_mixture import write_mixture


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every thread of a host or of links has ended with its test."""
    yield
    left = [t.name for t in threading.enumerate() if t.name.startswith("expert-")]
    assert left == []
