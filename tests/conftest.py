"""What every test may use: where the reference material lies, and the bundled model."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent


settings.register_profile("fixed", derandomize=True, deadline=None)  # the same draws each time, however busy it is
settings.load_profile("fixed")

# Matrices are small and tests run beside each other: a second thread of torch only waits for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    # A shell that runs something in the background has it ignore Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Reference material that this project did not write; tests that need it skip where it is absent."""
    path = Path(os.environ.get("UNDERSTUDY_ORACLES", ROOT.parent / "shared" / "oracles"))
    if not path.is_dir():
        pytest.skip(f"no oracles at {path} (set UNDERSTUDY_ORACLES)")
    return path


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K where the oracles are there, else a tiny random Llama that speaks bytes."""
    from service_process import make_tiny_llama

    oracles = Path(os.environ.get("UNDERSTUDY_ORACLES", ROOT.parent / "shared" / "oracles"))
    stories = oracles / "weights" / "stories260K-hf"
    return stories if stories.is_dir() else make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The bundled checkpoint."""
    return ROOT / "models" / "demo"
