"""What cannot be served is refused with one line, and nothing is left. Each starts what it takes to find out."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import psutil
import pytest
from service_process import UNDERSTUDY, running


def writes_for(process: psutil.Process, pid: int) -> bool:
    """Whether a process has a file open of a Ray session that process `pid` has started, wherever that lies."""
    try:
        return any(re.search(rf"/session_[^/]*_{pid}/", file.path) for file in process.open_files())
    except psutil.Error:
        return False


def test_a_damaged_checkpoint_ends_the_service_with_one_line(tmp_path: Path, text_model: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in text_model.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with running(tmp_path, ["--model", str(damaged)]) as service:
        with pytest.raises(AssertionError, match="ended before it was ready"):
            service.wait_until_ready()
        assert service.process.wait(30) == 1
        assert not service.directory.exists()
        assert not [p for p in psutil.process_iter() if writes_for(p, service.process.pid)]
    said = "\n".join(service.output)
    assert "error: " in service.output[-1]
    assert "model.safetensors" in service.output[-1]
    assert "Traceback" not in said


def test_an_unknown_architecture_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "no_such"}')
    with running(tmp_path, ["--model", str(tmp_path)]) as service:
        with pytest.raises(AssertionError, match="ended before it was ready"):
            service.wait_until_ready()
        assert service.process.wait(30) == 1
    assert len(service.output) == 1
    assert "NoSuchModel" in service.output[0]


def test_a_degree_that_cannot_be_is_refused_before_anything_starts(text_model: Path) -> None:
    command = [UNDERSTUDY, "serve", "--model", str(text_model), "--tensor-parallel", "3"]
    environment = os.environ | {"COLUMNS": "400"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert done.returncode == 1
    assert "--tensor-parallel: 3 ranks cannot share" in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--expert-hosts", "1000"], ["--expert-hosts = 1000", "experts in a layer", "at most"]),
        (["--expert-hosts", "-1"], ["--expert-hosts", "-1"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, demo_model: Path, flags: list[str], words: list[str]
) -> None:
    said = subprocess.run(
        [UNDERSTUDY, "serve", "--model", str(demo_model), *flags], capture_output=True, text=True, check=False
    )
    assert said.returncode == 1
    for word in words:
        assert word in said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_a_dense_model_has_no_experts_to_serve(text_model: Path) -> None:
    said = subprocess.run(
        [UNDERSTUDY, "serve", "--model", str(text_model), "--expert-hosts", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 1
    assert "has no experts; leave it out" in said.stderr
