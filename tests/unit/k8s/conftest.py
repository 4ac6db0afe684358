"""The manifests as Kubernetes would get them: rendered by kubectl, with Secrets made as the documentation says."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_manifests import OVERLAYS, Manifest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def kubectl() -> str:
    """Of 1.28 or newer, by $KUBECTL or the PATH."""
    found = os.environ.get("KUBECTL") or shutil.which("kubectl")
    if found is None:
        pytest.skip("no kubectl here to render the manifests (set KUBECTL)")
    return found


@pytest.fixture(scope="session")
def k8s(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `k8s/` with the files of its Secrets."""
    place = tmp_path_factory.mktemp("manifests") / "k8s"
    shutil.copytree(ROOT / "k8s", place, ignore=shutil.ignore_patterns("secrets"))
    subprocess.run([place / "make-secrets.sh"], check=True, capture_output=True, timeout=60)
    return place


@pytest.fixture(scope="session")
def render(kubectl: str, k8s: Path) -> Any:
    """A function from an overlay's name to its documents."""

    @functools.cache
    def rendered(overlay: str) -> list[Manifest]:
        done = subprocess.run(
            [kubectl, "kustomize", k8s / overlay], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "kustomize warns"
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return rendered


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest, render: Any) -> list[Manifest]:
    """Each overlay's documents."""
    documents: list[Manifest] = render(request.param)
    return documents
