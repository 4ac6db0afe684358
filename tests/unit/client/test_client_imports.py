"""What an import brings along, seen in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that are there after a statement in a process of its own."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import understudy",
        "from understudy import errors, UnderstudyError",
        "from understudy import Piece, Retry, Tls, FinishReason",
    ],
)
def test_errors_and_values_bring_neither_grpc_nor_protobuf(statement: str) -> None:
    assert not loaded_by(statement) & {"grpc", "google", "rich", "typer", "torch", "ray"}


@pytest.mark.parametrize(
    "statement",
    [
        "from understudy import Client, AsyncClient",
        "import understudy.testing",
        "import understudy.cli.main",
    ],
)
def test_a_client_brings_nothing_of_the_server(statement: str) -> None:
    server = {"torch", "ray", "numpy", "workers", "router", "cluster", "msgspec", "pydantic_settings"}
    assert not loaded_by(statement) & server


def test_every_exported_name_is_there() -> None:
    loaded_by("import understudy\nfor name in understudy.__all__: getattr(understudy, name)")


def test_an_unknown_name_is_an_attribute_error() -> None:
    import understudy

    with pytest.raises(AttributeError, match="Cleint"):
        understudy.Cleint  # noqa: B018
