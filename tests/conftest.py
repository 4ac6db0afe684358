"""What every test may use: where the reference material lies, and the bundled model."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
def demo_model() -> Path:
    """The bundled checkpoint."""
    return ROOT / "models" / "demo"
